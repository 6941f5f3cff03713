"""Workers have one thread each, and nobody else notices."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import ww_monitor
from ww_monitor.engine.threads import (
    Workers,
    controller,
    held_to_one_thread,
    hold_to_one_thread,
    thread_budget,
    workers,
)
from ww_monitor.spectra.lapack import of_torch


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_that_was_held_to_one_has_its_counts_of_mkl_and_openmp_back():
    set_mkl_threads = of_torch("MKL_Set_Num_Threads_Local", ctypes.c_int, ctypes.c_int)
    if set_mkl_threads is None:
        pytest.skip("torch is not linked with MKL")

    def counts_after():
        torch.set_num_threads(3)
        torch.get_num_threads()  # torch sets both of a thread when it is first asked there
        set_mkl_threads(2)
        with held_to_one_thread():
            held = torch.get_num_threads(), set_mkl_threads(1)
        return held, (torch.get_num_threads(), set_mkl_threads(0))

    before = torch.get_num_threads()
    assert in_a_thread(counts_after) == ((1, 1), (3, 2))
    torch.set_num_threads(before)


def test_the_budget_is_torchs_count_and_no_more_than_the_cores(allow_threads):
    allow_threads(4, cores=64)
    assert thread_budget() == 4
    allow_threads(4, cores=3)
    assert thread_budget() == 3


@pytest.mark.parametrize(
    ("budget", "tasks", "side", "count", "blas"),
    [(4, 9, 768, 4, 1), (4, 2, 768, 2, 2), (4, 1, 768, 1, 4), (4, 1, 500, 1, 1), (1, 5, 768, 1, 1)],
)
def test_fewer_large_tasks_than_threads_leave_them_to_blas(allow_threads, budget, tasks, side, count, blas):
    allow_threads(budget)
    before = blas_threads()
    with workers(tasks, memory=1, largest_side=side) as pool:
        assert pool.count == count
        assert blas_threads() == {blas}
    assert blas_threads() == before


def test_thread_counts_are_given_back_after_an_error(allow_threads):
    allow_threads(2)
    before, ours = blas_threads(), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), workers(3, memory=1, largest_side=768):
        raise KeyboardInterrupt
    assert (blas_threads(), torch.get_num_threads()) == (before, ours)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ww_monitor")]


def test_a_held_thread_has_one_torch_thread_and_no_other_thread_notices(allow_threads):
    allow_threads(4)

    def held():
        hold_to_one_thread()
        return torch.get_num_threads(), in_a_thread(torch.get_num_threads)

    assert in_a_thread(held) == (1, 4)
    assert torch.get_num_threads() == 4
    assert in_a_thread(torch.get_num_threads) == 4


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_back_and_errors_with_them(count):
    pool = Workers(count, memory=10)
    futures = [pool.submit(partial(divmod, 7, k), needs=3) for k in (0, 2)]
    with pytest.raises(ZeroDivisionError):
        futures[0].result()
    assert futures[1].result() == (3, 1)
    pool.close()


@pytest.mark.parametrize(("memory", "together"), [(10, 1), (25, 2), (100, 3)])
def test_tasks_under_way_share_the_memory(memory, together):
    running, most, lock = [0], [0], threading.Lock()

    def task():
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1

    pool = Workers(3, memory=memory)
    for future in [pool.submit(task, needs=12) for _ in range(9)]:
        future.result()
    pool.close()
    assert most[0] == together


def test_numpys_solver_lets_other_threads_run_meanwhile():
    """The premise of the workers: nothing in them holds the interpreter for long."""
    gram = np.eye(700) + 1.0
    done = threading.Event()
    thread = threading.Thread(target=lambda: (np.linalg.eigvalsh(gram), done.set()))
    ticks = 0
    thread.start()
    while not done.is_set():
        ticks += 1
    thread.join()
    assert ticks > 100


@pytest.fixture
def two_each():
    """The libraries have two threads, as this thread's owner has asked."""
    with threadpool_limits(2, user_api="blas"):
        yield


@pytest.mark.parametrize("first_ends", [True, False])
def test_overlapping_analyses_give_the_counts_back_whatever_the_order_of_their_ends(first_ends, two_each):
    """The second to begin, in a thread of its own, saw the first one's limits."""
    before, openmp = counts(), torch.get_num_threads()
    first, second = (workers(2, memory=0, largest_side=64) for _ in range(2))
    with ThreadPoolExecutor(1) as there:
        first.__enter__()
        there.submit(second.__enter__).result()
        assert {number for _, number in counts()} == {1}
        ends = [
            lambda: first.__exit__(None, None, None),
            lambda: there.submit(second.__exit__, None, None, None).result(),
        ]
        for end in ends if first_ends else reversed(ends):
            end()
        assert torch.get_num_threads() == openmp
    assert counts() == before


def test_an_analysis_in_any_thread_holds_the_libraries_to_one(two_each):
    """Also after another thread, which is still there, has set their counts."""
    before = counts()
    with workers(2, memory=0, largest_side=64):
        pass
    with ThreadPoolExecutor(1) as there:
        held = workers(2, memory=0, largest_side=64)
        there.submit(held.__enter__).result()
        assert {number for _, number in counts()} == {1}
        there.submit(held.__exit__, None, None, None).result()
    assert counts() == before


def test_who_limits_the_libraries_in_another_thread_is_heard_after_an_analysis(two_each):
    before = counts()
    with workers(2, memory=0, largest_side=64):
        pass

    def limited():
        with threadpool_limits(3, user_api="blas"):
            return counts()

    with ThreadPoolExecutor(1) as there:
        assert {number for _, number in there.submit(limited).result()} == {3}
    assert counts() == before


def counts():
    return [(pool["prefix"], pool["num_threads"]) for pool in controller().info() if pool["user_api"] == "blas"]


def test_in_a_tight_address_space_the_caller_solves_with_one_thread_and_has_its_own_back(monkeypatch):
    """MKL's second thread finds no room for its buffers there, and tries for minutes."""
    held = []

    @contextmanager
    def recorded():
        with held_to_one_thread():
            held.append(threading.active_count())
            yield
            held.append(threading.active_count())

    before = threading.active_count()
    monkeypatch.setattr("ww_monitor.engine.run.room_for_blas", lambda count: False)
    monkeypatch.setattr("ww_monitor.engine.run.held_to_one_thread", recorded)
    count = torch.get_num_threads()
    assert ww_monitor.analyze(torch.nn.Linear(600, 600)).layers[0].status == "ok"
    assert set(held) == {before}
    assert torch.get_num_threads() == count

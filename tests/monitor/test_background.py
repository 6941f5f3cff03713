"""Jobs go through one thread in order; the newest waits, older ones are dropped and counted, nothing waits for ever."""

import threading
import time

import pytest

from ww_monitor.monitor.background import Background


@pytest.fixture
def gate():
    """A function that waits until the test lets it go on, and the event that lets it."""
    event = threading.Event()

    def run(job):
        assert event.wait(20)
        return job * 10

    yield run, event
    event.set()


def finished(worker):
    """What the worker has done, all of it."""
    return list(iter(worker.next_done, None))


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_results_come_in_the_order_of_the_jobs():
    worker = Background(lambda job: job * 10)
    for job in range(5):
        worker.put(job)
        assert worker.join(20)
    assert [(done.job, done.result, done.error) for done in finished(worker)] == [(k, 10 * k, None) for k in range(5)]
    assert finished(worker) == []
    assert worker.close(20)


def test_a_newer_job_takes_the_place_of_the_one_that_waits(gate):
    run, event = gate
    worker = Background(run)
    worker.put(0)
    wait_until(lambda: not worker._waiting)
    for job in (1, 2, 3):
        worker.put(job)
    assert worker.dropped == 2
    assert not worker.idle
    event.set()
    assert worker.join(20)
    assert [done.job for done in finished(worker)] == [0, 3]
    assert worker.idle
    worker.close(20)


def test_the_first_job_of_a_thread_that_has_not_begun_is_not_the_one_that_waits(gate):
    _, event = gate
    worker = Background(lambda job: job, prepare=lambda: event.wait(20))
    for job in (1, 2, 3):
        worker.put(job)
    event.set()
    assert worker.join(20)
    assert [done.job for done in finished(worker)] == [1, 3]
    assert worker.dropped == 1
    worker.close(20)


def test_an_error_is_handed_over_and_the_next_job_runs():
    worker = Background(lambda job: 1 / job)
    for job in (0, 2):
        worker.put(job)
        worker.join(20)
    first, second = finished(worker)
    assert isinstance(first.error, ZeroDivisionError)
    assert second.result == 0.5
    worker.close(20)


def test_neither_join_nor_close_waits_longer_than_it_is_told(gate):
    run, event = gate
    worker = Background(run)
    worker.put(0)
    start = time.monotonic()
    assert not worker.join(0.05)
    assert not worker.close(0.05)
    assert time.monotonic() - start < 10
    event.set()


def test_close_drops_what_waits_and_ends_the_thread(gate):
    run, event = gate
    worker = Background(run)
    worker.put(0)
    wait_until(lambda: not worker._waiting)
    worker.put(1)
    event.set()
    assert worker.close(20)
    assert [done.job for done in finished(worker)] == [0]
    assert worker.dropped == 1


def test_it_can_be_used_again_after_close():
    worker = Background(lambda job: job)
    worker.put(1)
    worker.join(20)
    worker.close(20)
    worker.put(2)
    assert worker.join(20)
    assert [done.result for done in finished(worker)] == [1, 2]
    worker.close(20)


def test_the_thread_is_prepared_once_and_works_if_that_fails():
    prepared = []

    def prepare():
        prepared.append(threading.current_thread().name)
        raise OSError("not on this system")

    worker = Background(lambda job: job, prepare=prepare)
    for job in (1, 2):
        worker.put(job)
        worker.join(20)
    worker.close(20)
    assert prepared == ["ww_monitor background"]
    assert len(finished(worker)) == 2

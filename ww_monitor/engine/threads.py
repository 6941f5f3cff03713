"""Workers with one BLAS thread each: layers in parallel beat parallel BLAS on the matrices of a network."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from mmap import mmap
from queue import SimpleQueue
from typing import Any, TypeVar

import threadpoolctl
import torch
from threadpoolctl import ThreadpoolController

from ww_monitor.spectra.lapack import of_torch
from ww_monitor.spectra.stop import Stopped, Worker, stop_if_told

Result = TypeVar("Result")


def thread_budget() -> int:
    """How many threads the user lets torch have, at most one a core that this process may use."""
    # cpu_count counts the machine's, also where taskset or a scheduler leaves this process a few; macOS has no other
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores))


class Workers:
    """Runs tasks on threads, or in the caller's; holds at most so many bytes at a time.

    Args:
        count: How many tasks run at a time; fewer where the system gives no more threads.
        memory: Bytes of workspace that the tasks under way may need together; a task that needs more runs alone.
        apart: Give a single worker a thread too: a caller that waits for a thread can be interrupted, one that is in
            a library's code cannot.
    """

    def __init__(self, count: int, *, memory: int, apart: bool = False) -> None:
        self.memory = memory
        self._tasks: SimpleQueue[tuple[Future[Any], list[Callable[[], Any]]] | None] = SimpleQueue()
        self._threads: list[Worker] = []
        self._prepare = hold_to_one_thread if count > 1 else torch.get_num_threads  # which takes over torch's count
        with suppress(RuntimeError):  # no thread is to be had
            for _ in range(count if count > 1 or apart else 0):
                thread = Worker(target=self._work, name="ww_monitor")
                thread.start()
                self._threads.append(thread)
        self.count = max(1, len(self._threads))
        self._in_use = 0
        self._running = 0
        self._freed = threading.Condition()

    def submit(self, task: Callable[[], Result], *, needs: int) -> Future[Result]:
        """Start a task that needs so many bytes; waits while a thread or the memory is not free.

        With one worker it waits for the task too, so that no second one is in memory beside it.
        """
        future: Future[Result] = Future()
        if not self._threads:
            stop_if_told()
            try:
                future.set_result(task())
            except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
                future.set_exception(error)
            return future
        with self._freed:
            self._freed.wait_for(
                lambda: not self._running or (self._running < self.count and self._in_use + needs <= self.memory)
            )
            self._running += 1
            self._in_use += needs
        future.add_done_callback(lambda _: self._release(needs))
        self._tasks.put((future, [task]))
        if self.count == 1:
            wait([future])
        return future

    def _release(self, needs: int) -> None:
        with self._freed:
            self._running -= 1
            self._in_use -= needs
            self._freed.notify_all()

    def _work(self) -> None:
        with suppress(Exception):  # one that keeps more threads of BLAS is slower, and works
            self._prepare()
        while (given := self._tasks.get()) is not None:
            future, box = given
            try:
                stop_if_told()
                result = box.pop()()  # what the task holds is free before its memory is said to be
            except Stopped:  # whoever asked for the result has gone
                return
            except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            del future, given  # or an idle thread would hold what it has made

    def close(self, *, wanted: bool = True, timeout: float | None = None) -> None:
        """End the threads and wait for them, at most so many seconds; what is not `wanted` any more is given up."""
        for thread in self._threads:
            thread.stopped = not wanted
            self._tasks.put(None)
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))


LEAST_PARALLEL_SIDE = 512
"""Short side below which a second BLAS thread costs more than it gains (256: 3–13 ms with two threads, 2 with one)."""

INTERRUPTED_SECONDS = 0.5
"""How long an analysis that was interrupted waits for its threads; one in a library's code ends when that returns."""


@contextmanager
def workers(tasks: int, *, memory: int, largest_side: int) -> Iterator[Workers]:
    """As many workers as threads are allowed and tasks there are, each with its share of BLAS threads.

    The calling thread has one, for what it loads: others would spin where the workers need the cores. Libraries and
    this thread get their counts back afterwards, no other thread notices torch's. `memory` is in bytes, for all of
    them; `largest_side` is the longest short side of a matrix.
    """
    budget = thread_budget()
    large = largest_side >= LEAST_PARALLEL_SIDE
    pool = Workers(max(1, min(budget, tasks)), memory=memory, apart=large)
    try:
        with _BLAS.held_to(max(1, budget // pool.count) if large else 1), held_to_one_thread():
            yield pool
    except BaseException as error:
        pool.close(wanted=False, timeout=None if isinstance(error, Exception) else INTERRUPTED_SECONDS)
        raise
    pool.close()


_BLAS_BUFFERS = 128 << 20
"""Address space that a thread's first products may take in numpy's and SciPy's OpenBLAS together: some 32 MiB each
(measured), and the rest for what is solved."""


def room_for_blas(threads: int) -> bool:
    """Whether the address space has room for the buffers of so many threads: without it OpenBLAS tries for ever."""
    try:
        mmap(-1, threads * _BLAS_BUFFERS).close()  # pages that nobody touches take no memory
    except (OSError, ValueError, MemoryError):
        return False
    return True


class _Blas:
    """The thread counts of the BLAS libraries, for analyses that may overlap in any order: the last gives them back."""

    def __init__(self) -> None:
        self._lock, self._holding = threading.Lock(), 0
        self._original: list[int] = []

    @contextmanager
    def held_to(self, count: int) -> Iterator[None]:
        """Hold them to so many threads."""
        with self._lock:
            libraries = _blas_libraries()
            # while another analysis holds them, what they have is ours and not the user's
            self._original = self._original if self._holding else [one.num_threads for one in libraries]
            self._set([count] * len(libraries))
            self._holding += 1
        try:
            yield
        finally:
            with self._lock:
                self._holding -= 1
                if not self._holding:
                    self._set(self._original)

    def _set(self, counts: Sequence[int]) -> None:
        """From whichever thread: threadpoolctl 3.8 lets the first do so alone and ignores others until it is told."""
        openblas = getattr(threadpoolctl, "OpenBLASController", None)
        let_go = getattr(openblas, "clear_controlling_thread", lambda **_: None)
        for library, count in zip(_blas_libraries(), counts, strict=True):
            let_go(force=True)
            library.set_num_threads(count)
        let_go(force=True)

    def after_fork(self) -> None:
        """In a child: the analyses of other threads of its parent do not go on here, nor does whoever has the lock."""
        self._lock = threading.Lock()
        if self._holding:
            self._holding = 0
            self._set(self._original)


_BLAS = _Blas()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_BLAS.after_fork)


@lru_cache(maxsize=1)
def controller() -> ThreadpoolController:
    """The thread pools of the libraries that are loaded; torch, numpy and scipy are by now."""
    return ThreadpoolController()  # reads the list of all loaded libraries, some 2 ms


@lru_cache(maxsize=1)
def _blas_libraries() -> list[Any]:
    libraries: list[Any] = controller().select(user_api="blas").lib_controllers
    return libraries


def hold_to_one_thread() -> Callable[[], None]:
    """Give the calling thread one OpenMP and one MKL thread, which no other thread notices; returns what undoes it."""
    torch.get_num_threads()  # makes torch set up its count for this thread, so that it does not do so later
    # by the libraries, for torch.set_num_threads would also count for every thread that starts later
    openmp = controller().select(user_api="openmp").limit(limits=1)
    set_mkl_threads = of_torch("MKL_Set_Num_Threads_Local", ctypes.c_int, ctypes.c_int)
    before = set_mkl_threads(1) if set_mkl_threads is not None else 0  # None: torch is not linked with MKL

    def undo() -> None:
        openmp.restore_original_limits()
        if set_mkl_threads is not None:
            set_mkl_threads(before)

    return undo


@contextmanager
def held_to_one_thread() -> Iterator[None]:
    """Hold the calling thread so for a while."""
    undo = hold_to_one_thread()
    try:
        yield
    finally:
        undo()

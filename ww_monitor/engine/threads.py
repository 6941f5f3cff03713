"""Workers with one BLAS thread each: layers in parallel beat parallel BLAS on the matrices of a network."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

from ww_monitor.spectra.lapack import of_torch

Result = TypeVar("Result")


def thread_budget() -> int:
    """How many threads the user lets torch have, at most one a core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores))


class Workers:
    """Runs tasks on `count` threads, or in the caller's where there is one worker.

    Tasks under way may need `memory` bytes of workspace together; a task that needs more runs alone.
    """

    def __init__(self, count: int, *, memory: int) -> None:
        self.count, self.memory = count, memory
        self._executor = ThreadPoolExecutor(count, "ww_monitor", initializer=hold_to_one_thread) if count > 1 else None
        self._in_use = self._running = 0
        self._freed = threading.Condition()

    def submit(self, task: Callable[[], Result], *, needs: int) -> Future[Result]:
        """Start a task that needs so many bytes; waits while a thread or the memory is not free."""
        if self._executor is None:
            future: Future[Result] = Future()
            try:
                future.set_result(task())
            except Exception as error:  # noqa: BLE001 - it is kept for whoever asks for the result
                future.set_exception(error)
            return future
        with self._freed:
            self._freed.wait_for(
                lambda: not self._running or (self._running < self.count and self._in_use + needs <= self.memory)
            )
            self._running += 1
            self._in_use += needs
        future = self._executor.submit(lambda box: box.pop()(), [task])  # what it holds is free when it says so
        future.add_done_callback(lambda _: self._release(needs))
        return future

    def _release(self, needs: int) -> None:
        with self._freed:
            self._running -= 1
            self._in_use -= needs
            self._freed.notify_all()

    def close(self) -> None:
        """Wait for the threads; what has not begun is given up."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


LEAST_PARALLEL_SIDE = 512
"""Short side below which a second BLAS thread costs more than it gains (256: 3–13 ms with two threads, 2 with one)."""


@contextmanager
def workers(tasks: int, *, memory: int, largest_side: int) -> Iterator[Workers]:
    """As many workers as threads are allowed and tasks there are, each with its share of BLAS threads.

    BLAS libraries get their thread counts back afterwards; torch's own count is not touched. `memory` is in bytes, for
    all of them; `largest_side` is the longest short side of a matrix.
    """
    budget = thread_budget()
    pool = Workers(max(1, min(budget, tasks)), memory=memory)
    share = max(1, budget // pool.count) if largest_side >= LEAST_PARALLEL_SIDE else 1
    try:
        with _BLAS.held_to(share):
            yield pool
    finally:
        pool.close()


class _Blas:
    """The thread counts of the BLAS libraries, for analyses that may overlap in any order: the last gives them back."""

    def __init__(self) -> None:
        self._lock, self._holding = threading.Lock(), 0
        self._original: Any = None

    @contextmanager
    def held_to(self, count: int) -> Iterator[None]:
        """Hold them to so many threads."""
        with self._lock:
            limited = controller().limit(limits=count, user_api="blas")
            self._original = self._original if self._holding else limited
            self._holding += 1
        try:
            yield
        finally:
            with self._lock:
                self._holding -= 1
                if not self._holding:
                    self._original.restore_original_limits()


_BLAS = _Blas()


@lru_cache(maxsize=1)
def controller() -> ThreadpoolController:
    """The thread pools of the libraries that are loaded; torch, numpy and scipy are by now."""
    return ThreadpoolController()


def hold_to_one_thread() -> None:
    """Give the calling thread one OpenMP and one MKL thread, which no other thread notices."""
    torch.get_num_threads()  # makes torch set up its count for this thread, so that it does not do so later
    controller().select(user_api="openmp").limit(limits=1)
    set_mkl_threads = of_torch("MKL_Set_Num_Threads_Local", ctypes.c_int, ctypes.c_int)
    if set_mkl_threads is not None:  # torch is linked with MKL
        set_mkl_threads(1)

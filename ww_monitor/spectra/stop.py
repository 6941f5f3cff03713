"""Threads whose result nobody waits for any more: they end when the call of a library that they are in returns."""

from __future__ import annotations

import atexit
import threading
import time
from functools import lru_cache
from weakref import WeakSet

EXIT_SECONDS = 2.0
"""How long Python's end waits for stopped threads: one that comes back from torch's code while the interpreter is
taken down aborts the process."""


class Stopped(BaseException):
    """This thread's result is not wanted any more; never leaves the thread."""


class Worker(threading.Thread):
    """A thread that can be stopped; Python does not wait for it when it ends, unless it was stopped just now."""

    stopped = False

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: if the system gives no thread.
        """
        self.daemon = True  # or Python would wait at its end, also for a solve of minutes
        super().start()
        _wait_at_exit()  # at the first start, for an import registers nothing
        _started.add(self)


_started: WeakSet[Worker] = WeakSet()


def stop_if_told() -> None:
    """End the calling thread's work if it is a worker that was stopped.

    Raises:
        Stopped: if so.
    """
    if getattr(threading.current_thread(), "stopped", False):
        raise Stopped


@lru_cache(maxsize=1)
def _wait_at_exit() -> None:
    atexit.register(_wait_for_stopped)


def _wait_for_stopped() -> None:
    end = time.monotonic() + EXIT_SECONDS
    for worker in list(_started):
        if worker.stopped:
            worker.join(max(0.0, end - time.monotonic()))

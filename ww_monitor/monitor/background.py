"""One thread that works through jobs while training goes on: bounded, in order, and never waited for too long."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

Job = TypeVar("Job")
Result = TypeVar("Result")

NICENESS = 10
"""How far the thread stands back behind the training where both want a core (Linux): measured to cost a training on
the other core 1 % where an equal thread costs more."""


@dataclass(frozen=True)
class Done(Generic[Job, Result]):
    """A job with its result, or with what it raised."""

    job: Job
    result: Result | None
    error: Exception | None = None

    def get(self) -> Result:
        """The result.

        Raises:
            Exception: what the job raised.
        """
        if self.error is not None:
            raise self.error
        return cast("Result", self.result)


class Background(Generic[Job, Result]):
    """Runs jobs one after another on a thread of its own, in the order they come.

    At most one job waits while another runs: a newer one takes the place of the one that waits, and is counted.

    Args:
        run: Makes the result of a job.
        prepare: Called once on the thread, before its first job.
    """

    def __init__(self, run: Callable[[Job], Result], *, prepare: Callable[[], None] | None = None) -> None:
        self.dropped = 0
        self._run = run
        self._prepare = prepare
        self._waiting: deque[Job] = deque()
        self._done: deque[Done[Job, Result]] = deque()
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether no job runs or waits."""
        with self._changed:
            return not self._busy and not self._waiting

    def put(self, job: Job) -> None:
        """Add a job; the one that waits is dropped."""
        with self._changed:
            if self._waiting:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(job)
            self._closed = False
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="ww_monitor background", daemon=True)
                self._thread.start()

    def next_done(self) -> Done[Job, Result] | None:
        """What has been done and not been handed out, the oldest first; never waits."""
        with self._changed:
            return self._done.popleft() if self._done else None

    def join(self, timeout: float) -> bool:
        """Wait until nothing runs or waits; false if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and not self._waiting, timeout)

    def close(self, timeout: float) -> bool:
        """Drop what waits, and wait for what runs; false if that takes longer: the thread then ends by itself."""
        with self._changed:
            self.dropped += len(self._waiting)
            self._waiting.clear()
            self._closed = True
            self._changed.notify_all()
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def _work(self) -> None:
        _lower_priority()
        if self._prepare is not None:
            with contextlib.suppress(Exception):  # a thread that is not prepared works too
                self._prepare()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                job, self._busy = self._waiting.popleft(), True
            done = self._finish(job)
            with self._changed:
                self._done.append(done)
                self._busy = False
                self._changed.notify_all()

    def _finish(self, job: Job) -> Done[Job, Result]:
        try:
            return Done(job, self._run(job))
        except Exception as error:  # noqa: BLE001 - it is the caller's to report, on its own thread
            return Done(job, None, error)


def _lower_priority() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)

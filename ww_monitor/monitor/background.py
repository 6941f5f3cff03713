"""One thread that works through jobs while training goes on: bounded, in order, and never waited for too long."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from ww_monitor.spectra.stop import Stopped, Worker

Job = TypeVar("Job")
Result = TypeVar("Result")

NICENESS = 10
"""How far the thread stands back behind the training where both want a core (Linux): measured to cost a training on
the other core 1 % where an equal thread costs more."""

IDLE_SECONDS = 5.0
"""How long the thread waits for a job before it ends: so long it holds what a monitor that nobody holds had."""


@dataclass(frozen=True)
class Done(Generic[Job, Result]):
    """A job with its result, or with what it raised."""

    job: Job
    result: Result | None
    error: BaseException | None = None

    def get(self) -> Result:
        """The result.

        Raises:
            BaseException: what the job raised.
        """
        if self.error is not None:
            raise self.error
        return cast("Result", self.result)


class Background(Generic[Job, Result]):
    """Runs jobs one after another on a thread of its own, in the order they come.

    At most one job waits while another runs: a newer one takes the place of the one that waits, and is counted. Where
    the system gives no thread a job runs in the caller's. A copy, and a process that was forked, begin without jobs.

    Args:
        run: Makes the result of a job.
        prepare: Called once on the thread, before its first job.
    """

    def __init__(self, run: Callable[[Job], Result], *, prepare: Callable[[], object] | None = None) -> None:
        self.dropped = 0
        self._run = run
        self._prepare = prepare
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._waiting: deque[Job] = deque()
        self._done: deque[Done[Job, Result]] = deque()
        self._busy = False
        self._changed = threading.Condition()
        self._thread: Worker | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"dropped": self.dropped, "_run": self._run, "_prepare": self._prepare}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def _lock(self) -> threading.Condition:
        """Held while anything below is read or changed; in a forked child nobody would give its parent's back."""
        if self._process != os.getpid():
            self._begin()
        return self._changed

    @property
    def idle(self) -> bool:
        """Whether no job runs or waits."""
        with self._lock:
            return not self._busy and not self._waiting

    def put(self, job: Job) -> None:
        """Add a job; the one that waits for another is dropped."""
        with self._lock:
            if len(self._waiting) > (not self._busy):  # where nothing runs the first is as good as begun
                self._waiting.pop()
                self.dropped += 1
            self._waiting.append(job)
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = Worker(target=self._work, name="ww_monitor background")
                try:
                    self._thread.start()
                except RuntimeError:  # no thread is to be had
                    self._thread = None
                    self._done.append(self._finish(self._waiting.popleft()))

    def next_done(self) -> Done[Job, Result] | None:
        """What has been done and not been handed out, the oldest first; never waits."""
        with self._lock:
            return self._done.popleft() if self._done else None

    def join(self, timeout: float) -> bool:
        """Wait until nothing runs or waits; false if that takes longer."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._busy and not self._waiting, timeout)

    def close(self, timeout: float) -> bool:
        """Drop what waits, and wait for what runs; false if that takes longer: it is given up then."""
        with self._lock:
            self.dropped += len(self._waiting)
            self._waiting.clear()
            ended = self._changed.wait_for(lambda: not self._busy, timeout)
            thread, self._thread, self._busy = self._thread, None, False
            if thread is not None:
                thread.stopped = True
            self._changed.notify_all()
        if thread is not None and ended:  # one that was given up is at a solve that cannot be ended
            thread.join(timeout)
        return ended

    def _work(self) -> None:
        _lower_priority()
        if self._prepare is not None:
            with contextlib.suppress(Exception):  # a thread that is not prepared works too
                self._prepare()
        me, done = threading.current_thread(), None
        while True:
            with self._changed:
                if self._thread is not me:  # given up
                    return
                if done is not None:
                    self._done.append(done)
                    done, self._busy = None, False
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._thread is not me, IDLE_SECONDS)
                if self._thread is not me or not self._waiting:
                    self._thread = None if self._thread is me else self._thread
                    return
                job, self._busy = self._waiting.popleft(), True
            try:
                done = self._finish(job)
            except Stopped:  # `close` has given the thread up, and what it holds
                return
            except BaseException as error:  # noqa: BLE001 - a `SystemExit` of a user's metric, say
                done = Done(job, None, error)
            del job  # or a thread that waits would hold the copies of its weights

    def _finish(self, job: Job) -> Done[Job, Result]:
        try:
            return Done(job, self._run(job))
        except Exception as error:  # noqa: BLE001 - it is the caller's to report, on its own thread
            return Done(job, None, error)


def _lower_priority() -> None:
    if sys.platform == "linux":  # which takes a thread's number; elsewhere the training would step back with it
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)

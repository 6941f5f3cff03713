"""Snapshots into a JSON Lines file, one line each, on disk as soon as it is written."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from itertools import count
from pathlib import Path

from ww_monitor.record import Snapshot

MOST_WAITING = 64 << 20
"""Bytes of lines that wait while they cannot be written (our choice: what snapshots in memory may take too)."""


class JsonLines:
    """Appends to a file that `History.read` reads; what is in the file is never changed.

    The file and its folder are made at the first write, and again where somebody has removed them. It is open only
    while a line is written. A line that cannot be written, because the disk is full or the folder cannot be used,
    waits in memory and is written with the next; one that was written in part is ended before the next begins. A copy,
    and a process that was forked, begin without lines that wait: twice in the file, they would look like a resume.

    Args:
        path: Path of the file that the lines go to.
        own: Make a file that is not there yet: where others have `run.jsonl`, also in other processes and on other
            hosts, it is `run-1.jsonl`, and so on. Once it is made, `path` is its path and `own` is false.
    """

    def __init__(self, path: str | Path, *, own: bool = False) -> None:
        self.path = Path(path)
        self.own = own
        self._begin()

    def _begin(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "own": self.own}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._begin()

    def write(self, snapshot: Snapshot) -> None:
        """Append one line, after those that wait."""
        if self._process != os.getpid():
            self._begin()
        self._waiting.append(snapshot.to_json().encode() + b"\n")
        # The latest stays, however long it is.
        while len(self._waiting) > 1 and sum(map(len, self._waiting)) > MOST_WAITING:
            self._waiting.popleft()
        self._append()

    def close(self) -> None:
        """Write what waits, if that is possible now; `write` has raised where it was not."""
        with contextlib.suppress(OSError):
            self._append()

    def _append(self) -> None:
        if not self._waiting or self._process != os.getpid():
            return
        file = self._opened()
        try:
            size = os.fstat(file).st_size
            if size and os.lseek(file, -1, os.SEEK_END) >= 0 and os.read(file, 1) != b"\n":
                _write(file, b"\n")
            while self._waiting:
                _write(file, self._waiting[0])
                self._waiting.popleft()
        finally:
            os.close(file)

    def _opened(self) -> int:
        os.makedirs(os.path.realpath(self.path.parent), exist_ok=True)  # also where a link leads to nothing
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        if not self.own:
            file = os.open(self.path, flags, 0o666)
            if stat.S_ISFIFO(os.fstat(file).st_mode):  # what it is given is gone when it is closed
                os.close(file)
                raise OSError(f"{self.path} is a pipe")
            return file
        for number in count(1):
            path = self.path if number == 1 else self.path.with_stem(f"{self.path.stem}-{number - 1}")
            with contextlib.suppress(FileExistsError):
                file = os.open(path, flags | os.O_EXCL, 0o666)
                self.path, self.own = path, False
                return file
        raise AssertionError("count() has no end")


def _write(file: int, data: bytes) -> None:
    """All of it, or what the disk has room for and an OSError."""
    while data:
        data = data[os.write(file, data) :]

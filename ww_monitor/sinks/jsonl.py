"""Snapshots into a JSON Lines file, one line each, on disk as soon as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from ww_monitor.record import Snapshot


class JsonLines:
    """Appends to a file that `History.read` reads.

    The file and its folder are made at the first write. A last line torn by a killed run is cut off before the
    first append, so that a resumed run does not glue its first snapshot to it.

    Args:
        path: Path of the file that the lines go to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Append one line and flush it."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(snapshot.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _cut_torn_line(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])

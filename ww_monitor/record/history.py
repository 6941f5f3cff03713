"""The snapshots of a run in the order of their steps, and the file that outlives it."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, runtime_checkable

from ww_monitor.errors import SpectralWarning, WWMonitorError
from ww_monitor.record.notebook import Shown, table
from ww_monitor.record.saved import NAN
from ww_monitor.record.snapshot import Finding, Layer, Snapshot

HISTORY_FILE = "ww_history.jsonl"
"""What a run calls the file of its history."""

_HEAD = b'{"schema":'
"""How a line of ours begins."""

_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, MemoryError)
"""What reading a line raises that is no snapshot."""

_LONGEST_LINE = 1 << 29
"""Bytes that a line may have: some 200,000 layers, at 2 KB each (our choice)."""


Read = TypeVar("Read")


class History(Shown):
    """Snapshots in the order of their steps.

    Attributes:
        snapshots: The snapshots that are at hand.
        left_out: How many more there were, between the first and the second at hand (see `forget`).

    >>> history = History([Snapshot((Layer("fc", "dense", (1, 8, 8), metrics={"alpha": 3.0}),), step=10)])
    >>> history.series("alpha", layer="fc")
    ([10], [3.0])
    """

    def __init__(self, snapshots: Iterable[Snapshot] = ()) -> None:
        self.snapshots: list[Snapshot] = list(snapshots)
        self.left_out = 0

    def __len__(self) -> int:
        return len(self.snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self.snapshots)

    def _repr_html_(self) -> str:
        caption = f"{len(self) + self.left_out} snapshots" + ("; the last one:" if len(self) else "")
        return table(caption, self.last.layers if len(self) else (), self.findings[-40:])

    def __getitem__(self, index: int) -> Snapshot:
        return self.snapshots[index]

    @property
    def last(self) -> Snapshot:
        """The latest snapshot."""
        return self.snapshots[-1]

    @property
    def layer_names(self) -> list[str]:
        """Every layer that occurs, in the order of first occurrence."""
        return list(dict.fromkeys(layer.name for snapshot in self.snapshots for layer in snapshot.layers))

    @property
    def findings(self) -> list[Finding]:
        """The findings of all snapshots, in order."""
        return [finding for snapshot in self.snapshots for finding in snapshot.findings]

    def append(self, snapshot: Snapshot) -> None:
        """Add a snapshot."""
        self.snapshots.append(snapshot)

    def forget(self, *, latest: int) -> None:
        """Leave out what lies between the first snapshot and the `latest` last ones.

        >>> history = History(Snapshot((), step=step) for step in range(10))
        >>> history.forget(latest=3)
        >>> [snapshot.step for snapshot in history], history.left_out
        ([0, 7, 8, 9], 6)
        """
        surplus = max(0, len(self.snapshots) - 1 - latest)
        del self.snapshots[1 : 1 + surplus]
        self.left_out += surplus

    def _rewind(self, step: int | None) -> None:
        while step is not None and self.snapshots and self.last.step is not None and self.last.step >= step:
            self.snapshots.pop()

    def of_layer(self, name: str) -> list[Layer]:
        """The records of one layer, where it occurs, in order."""
        return [layer for snapshot in self.snapshots for layer in snapshot.named(name)]

    def series(self, metric: str, *, layer: str | None = None) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, of one layer or (with `None`) of the model; unknown values are NaN."""
        steps, values = [], []
        for index, snapshot in enumerate(self.snapshots):
            if layer is None:
                found = [snapshot.summary.get(metric, NAN)]
            else:
                found = [row.value(metric) for row in snapshot.named(layer)]
            steps += [index if snapshot.step is None else snapshot.step] * len(found)
            values += found
        return steps, values

    @classmethod
    def read(cls, path: str | Path) -> History:
        """The history in a JSON Lines file; a torn last line (a run that was killed) is left out.

        Where a run was resumed from before its last snapshot, what it saw again replaces what was seen first. Lines
        that are damaged (by a disk that was full for a moment) are left out, and said in one `SpectralWarning`.

        Raises:
            FileNotFoundError: if there is no such file.
            WWMonitorError: if it cannot be read, none of its lines is a snapshot, or one is of a later version; it
                names the file and, where there is one, the line.
        """
        history, damaged, foreign = cls(), [], False
        for number, found, line in each_line(path, Snapshot.from_dict, where="History.read"):
            if isinstance(found, Snapshot):
                history._rewind(found.step)
                history.append(found)
                continue
            # a torn line lacks its end; "Extra data" is two lines that ran together
            torn = isinstance(found, json.JSONDecodeError) and begins_as_ours(line) and found.msg != "Extra data"
            foreign = foreign or not torn
            if not torn or line.endswith(b"\n"):
                damaged.append((number, found))
        if damaged:
            said = f"line {_numbers([number for number, _ in damaged])} of {path} is no snapshot"
            said += f" ({type(damaged[0][1]).__name__}: {str(damaged[0][1])[:200]})"
            if foreign and not len(history):
                raise WWMonitorError(f"History.read: {said}, nor is any other") from damaged[0][1]
            warnings.warn(f"History.read: {said}; the others are read", SpectralWarning, stacklevel=2)
        return history


def each_line(
    path: str | Path, read: Callable[[Any], Read], *, where: str
) -> Iterator[tuple[int, Read | Exception, bytes]]:
    """Number, what `read` makes of its JSON or the error of a damaged one, and bytes, of every line that is not blank.

    Raises:
        FileNotFoundError: if there is no such file.
        WWMonitorError: from `where`, if it cannot be read, or of a line that `read` refuses with one.
    """
    with _opened(path, where) as file:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            try:
                yield number, read(json.loads(line)), line
            except WWMonitorError as error:
                raise WWMonitorError(f"{where}: line {number} of {path}: {error}") from error
            except _DAMAGE as error:
                yield number, error, line


@contextmanager
def _opened(path: str | Path, where: str) -> Iterator[BinaryIO]:
    """A regular file: reading a pipe would wait for whoever writes there."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        raise WWMonitorError(f"{where}: {str(path)!r} cannot be read: {error}") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """One at a time; of one that no snapshot can be as long as, the beginning."""
    while line := file.readline(_LONGEST_LINE):
        rest = line
        while len(rest) > 1 and not rest.endswith(b"\n") and len(line) == _LONGEST_LINE:
            rest = file.readline(1 << 20)
        yield line


def begins_as_ours(line: bytes) -> bool:
    """Whether it may be a part of a line of ours, as a killed run leaves it."""
    return line.startswith(_HEAD) or _HEAD.startswith(line.strip())


def _numbers(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:10]))
    return shown if len(lines) <= 10 else f"{shown} and {len(lines) - 10} more"


Rule = Callable[[History], Iterable[Finding]]
"""The findings that hold at the last snapshot; see `ww_monitor.rules`."""


@runtime_checkable
class Sink(Protocol):
    """Where snapshots go. A write may raise: the monitor says so once and goes on with the other sinks."""

    def write(self, snapshot: Snapshot) -> None:
        """Take one snapshot, with the findings that begin or end with it."""

    def close(self) -> None:
        """Flush and release; further writes may reopen. Called at the end of a run, possibly more than once."""


@runtime_checkable
class Action(Protocol):
    """Something that changes a run, layer by layer: factors on an option of the optimizer's parameter groups.

    Attributes:
        option: The option of a group that it changes, such as `"lr"`.
        metric: What a factor is called in a snapshot.
        needs: Metrics that a snapshot must have for it.
        dry_run: Whether the factors are only logged.
    """

    @property
    def option(self) -> str: ...  # noqa: D102 - see above

    @property
    def metric(self) -> str: ...  # noqa: D102

    @property
    def needs(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def dry_run(self) -> bool: ...  # noqa: D102

    def factors(self, snapshot: Snapshot) -> Mapping[str, float]:
        """Layer → factor, at least 0; a layer that is not there keeps the base."""

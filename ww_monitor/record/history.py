"""The snapshots of a run in the order of their steps, and the file that outlives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from ww_monitor.errors import WWMonitorError
from ww_monitor.record.notebook import Shown, table
from ww_monitor.record.snapshot import NAN, Finding, Layer, Snapshot


class History(Shown):
    """Snapshots in the order of their steps.

    Attributes:
        snapshots: Those at hand.
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

        Where a run was resumed from before its last snapshot, what it saw again replaces what was seen first.

        Raises:
            FileNotFoundError: if there is no such file.
            WWMonitorError: if a line before the last is no snapshot, naming the line.
        """
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        history = cls()
        for number, line in enumerate(lines, start=1):
            try:
                snapshot = Snapshot.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if number < len(lines):
                    raise WWMonitorError(f"History.read: line {number} of {path} is no snapshot") from error
            else:
                history._rewind(snapshot.step)
                history.append(snapshot)
        return history


Rule = Callable[[History], Iterable[Finding]]
"""The findings that hold at the last snapshot; see `ww_monitor.rules`."""


@runtime_checkable
class Sink(Protocol):
    """Where snapshots go. A write may raise: the monitor says so once and goes on with the other sinks."""

    def write(self, snapshot: Snapshot) -> None:
        """Take one snapshot, with the findings that begin or end with it."""

    def close(self) -> None:
        """Flush and release; further writes may reopen. Called at the end of a run, possibly more than once."""

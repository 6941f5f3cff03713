"""What several files ask of a history."""

from __future__ import annotations

from collections.abc import Iterable

from ww_monitor import History, Snapshot
from ww_monitor.sinks.published import Published


def steps_of(history: History) -> list[int | None]:
    """The steps of its snapshots."""
    return [snapshot.step for snapshot in history]


def published(history: Iterable[Snapshot], *, layers: bool = True) -> list[dict[str, float]]:
    """What a tracker gets of each snapshot by default."""
    chosen = Published()
    return [chosen.scalars(snapshot, layers=layers) for snapshot in history]

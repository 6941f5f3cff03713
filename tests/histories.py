"""What several files ask of a history."""

from __future__ import annotations

from ww_monitor import History


def steps_of(history: History) -> list[int | None]:
    """The steps of its snapshots."""
    return [snapshot.step for snapshot in history]

"""Snapshots into a list: the public test double."""

from __future__ import annotations

from ww_monitor.record import History, Snapshot


class Memory:
    """Keeps what it is given.

    >>> sink = Memory()
    >>> sink.write(Snapshot((), step=3))
    >>> [snapshot.step for snapshot in sink.history]
    [3]
    """

    def __init__(self) -> None:
        self.history = History()
        self.closed = False

    def write(self, snapshot: Snapshot) -> None:
        """Append the snapshot."""
        self.history.append(snapshot)

    def close(self) -> None:
        """Remember that the run is over."""
        self.closed = True

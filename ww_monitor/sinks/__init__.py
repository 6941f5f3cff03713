"""Sinks: a Snapshot → somewhere. A sink has `write(snapshot)` and `close()`; users pass instances."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ww_monitor.record import Snapshot


@runtime_checkable
class Sink(Protocol):
    """Where snapshots go. A write may raise: the monitor says so once and goes on with the other sinks."""

    def write(self, snapshot: Snapshot) -> None:
        """Take one snapshot, with the findings that begin or end with it."""

    def close(self) -> None:
        """Flush and release; further writes may reopen. Called at the end of a run, possibly more than once."""

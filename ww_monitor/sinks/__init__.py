"""Sinks: a Snapshot → somewhere. A sink has `write(snapshot)` and `close()`; users pass instances."""

from ww_monitor.record import Sink

__all__ = ["Sink"]

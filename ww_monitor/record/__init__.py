"""What was seen: snapshots, findings and their history, as plain frozen data that outlives the run."""

from ww_monitor.record.history import History, Rule, Sink
from ww_monitor.record.snapshot import (
    NAN,
    SCHEMA,
    UNREAD,
    Finding,
    Histogram,
    Layer,
    Severity,
    Skipped,
    Snapshot,
    TrapEntry,
    layer_key,
    summary_key,
)

__all__ = [
    "NAN",
    "SCHEMA",
    "UNREAD",
    "Finding",
    "Histogram",
    "History",
    "Layer",
    "Rule",
    "Severity",
    "Sink",
    "Skipped",
    "Snapshot",
    "TrapEntry",
    "layer_key",
    "summary_key",
]

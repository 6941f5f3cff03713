"""What was seen: snapshots, findings and their history, as plain frozen data that outlives the run."""

from ww_monitor.record.history import HISTORY_FILE, Action, History, Rule, Sink, begins_as_ours, each_line
from ww_monitor.record.saved import NAN, computed_once
from ww_monitor.record.snapshot import (
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
    "HISTORY_FILE",
    "NAN",
    "SCHEMA",
    "UNREAD",
    "Action",
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
    "begins_as_ours",
    "computed_once",
    "each_line",
    "layer_key",
    "summary_key",
]

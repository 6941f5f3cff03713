"""What is measured of a spectrum: the table of metrics, and the batches that its functions work on."""

from ww_monitor.metric import default, weightwatcher
from ww_monitor.metric.batch import FITS, FIX_FINGERS, Batch, Definitions, phases, statuses, verdicts
from ww_monitor.metric.table import PRESETS, TABLE, Metric, choose, metrics

__all__ = [
    "FITS",
    "FIX_FINGERS",
    "PRESETS",
    "TABLE",
    "Batch",
    "Definitions",
    "Metric",
    "choose",
    "default",
    "metrics",
    "phases",
    "statuses",
    "verdicts",
    "weightwatcher",
]

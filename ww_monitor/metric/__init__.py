"""What is measured of a spectrum: the table of metrics, the registry of measurements, and the batches they fill."""

from ww_monitor.metric import default, measurements, weightwatcher
from ww_monitor.metric.batch import Batch
from ww_monitor.metric.registry import MEASUREMENTS, Loaded, measure, measurement, reads_weights
from ww_monitor.metric.table import PRESETS, TABLE, Metric, choose, metrics
from ww_monitor.metric.verdict import PHASES, VERDICTS, phases, statuses, verdicts

__all__ = [
    "MEASUREMENTS",
    "PHASES",
    "PRESETS",
    "TABLE",
    "VERDICTS",
    "Batch",
    "Loaded",
    "Metric",
    "choose",
    "default",
    "measure",
    "measurement",
    "measurements",
    "metrics",
    "phases",
    "reads_weights",
    "statuses",
    "verdicts",
    "weightwatcher",
]

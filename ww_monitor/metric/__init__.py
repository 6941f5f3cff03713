"""What is measured of a spectrum: the table of metrics, the registry of measurements, and the batches they fill."""

from ww_monitor.metric import default, drift, measurements, scale, weightwatcher
from ww_monitor.metric.batch import Batch
from ww_monitor.metric.registry import MEASUREMENTS, Loaded, measure, measurement, reads_weights
from ww_monitor.metric.table import PRESETS, TABLE, Metric, choose, metrics
from ww_monitor.metric.verdict import NORMS, PHASES, VERDICTS, phases, statuses, verdicts

__all__ = [
    "MEASUREMENTS",
    "NORMS",
    "PHASES",
    "PRESETS",
    "TABLE",
    "VERDICTS",
    "Batch",
    "Loaded",
    "Metric",
    "choose",
    "default",
    "drift",
    "measure",
    "measurement",
    "measurements",
    "metrics",
    "phases",
    "reads_weights",
    "scale",
    "statuses",
    "verdicts",
    "weightwatcher",
]

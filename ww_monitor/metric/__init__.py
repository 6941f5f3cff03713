"""What is measured of a spectrum: the table of metrics, the registry of measurements, and the batches they fill."""

from ww_monitor.metric import default, measurements, weightwatcher
from ww_monitor.metric.batch import (
    PHASES,
    VERDICTS,
    Batch,
    phases,
    statuses,
    verdicts,
)
from ww_monitor.metric.registry import MEASUREMENTS, Loaded, measure, measurement, reads_weights
from ww_monitor.metric.table import PRESETS, TABLE, Metric, choose, metrics

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

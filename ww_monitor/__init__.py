"""How well each layer of a network is learning, seen from its weights alone.

    snapshot = ww_monitor.analyze(model)
    snapshot.summary, snapshot.findings, snapshot.to_pandas()

While a model trains, add a callback: `ww_monitor.callbacks.lightning.SpectralMonitor`.
"""

from ww_monitor.analysis import analyze
from ww_monitor.baseline import Baseline
from ww_monitor.checkpoints import replay_checkpoints
from ww_monitor.compare import Distances, distances
from ww_monitor.description import Description, describe
from ww_monitor.engine import Options
from ww_monitor.errors import (
    InvalidArgument,
    LayerError,
    MissingDependency,
    RankFailed,
    SpectralWarning,
    WWMonitorError,
)
from ww_monitor.harm import TrapHarm, trap_harm
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.metric import metrics
from ww_monitor.monitor import Monitor
from ww_monitor.record import Finding, History, Layer, Snapshot
from ww_monitor.report import write_report
from ww_monitor.settings import Select
from ww_monitor.spectra.shuffle import keep_permutations
from ww_monitor.transforms import Transformed, svd_sharpen, svd_smooth

__version__ = "0.1.0"

__all__ = [
    "Baseline",
    "Description",
    "Distances",
    "Finding",
    "History",
    "InvalidArgument",
    "Layer",
    "LayerError",
    "Matrix",
    "MissingDependency",
    "Monitor",
    "Options",
    "RankFailed",
    "Select",
    "Skipped",
    "Snapshot",
    "SpectralWarning",
    "Transformed",
    "TrapHarm",
    "WWMonitorError",
    "analyze",
    "describe",
    "distances",
    "keep_permutations",
    "metrics",
    "replay_checkpoints",
    "svd_sharpen",
    "svd_smooth",
    "trap_harm",
    "write_report",
]

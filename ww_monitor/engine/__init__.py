"""Matrices → Snapshot: plan, run in parallel within a memory budget, isolate failures.

`run` orders the work, `solve` decides for a device, `threads` are the workers, `measure` reads weights, `rows` ends it.
"""

from ww_monitor.engine.options import Options
from ww_monitor.engine.rows import snapshot_of
from ww_monitor.engine.run import analyze_matrices, warm_up

__all__ = ["Options", "analyze_matrices", "snapshot_of", "warm_up"]

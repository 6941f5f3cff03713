"""Matrices → Snapshot: plan, run in parallel within a memory budget, isolate failures.

`run` orders the work and keeps the snapshot, `threads` are the workers, `measure` takes the numbers that need the
weights, on whatever device they are, and `rows` makes layers of them.
"""

from ww_monitor.engine.options import Options
from ww_monitor.engine.rows import snapshot_of
from ww_monitor.engine.run import analyze_matrices, warm_up

__all__ = ["Options", "analyze_matrices", "snapshot_of", "warm_up"]

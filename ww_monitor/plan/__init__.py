"""What an analysis would do, without reading a weight.

`description` lists the matrices of a model that is there, with the time each takes; `architectures` lists those of a
model that is only configured, and `ranks` deals them to the ranks that would analyse them.
"""

from ww_monitor.plan.architectures import BUILT_IN, Laid, architecture
from ww_monitor.plan.description import (
    Description,
    Planned,
    Rates,
    describe,
    measured_rates,
    operations,
    plan_matrices,
)
from ww_monitor.plan.ranks import SHARDINGS, RankPlan, RankShare, plan_ranks

__all__ = [
    "BUILT_IN",
    "SHARDINGS",
    "Description",
    "Laid",
    "Planned",
    "RankPlan",
    "RankShare",
    "Rates",
    "architecture",
    "describe",
    "measured_rates",
    "operations",
    "plan_matrices",
    "plan_ranks",
]

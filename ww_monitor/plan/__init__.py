"""What an analysis would cost on many ranks, computed from a model of which only the configuration is there."""

from ww_monitor.plan.models import BUILT_IN, configured
from ww_monitor.plan.ranks import OVERALL, PER_RANK, RankPlan, plan_ranks

__all__ = ["BUILT_IN", "OVERALL", "PER_RANK", "RankPlan", "configured", "plan_ranks"]

"""Rules: a History in, the findings that hold at its last snapshot out.

A rule is a generator function of a `History`; thresholds are keywords, so `functools.partial` makes a variant. It
sees plain records only, hence works on a saved file too. NaN compares false and wakes no rule. A rule that reads
metrics of earlier snapshots may say which (`looks_back`): a checkpoint then holds those and not all.
"""

from ww_monitor.rules.declare import BROKEN, LOOKBACK, looks_back, metrics_of_the_past, named
from ww_monitor.rules.holding import (
    SINGLE_RULES,
    STOP_ON,
    TRAINING_RULES,
    Holding,
    apply_rules,
    transitions,
    with_stop_rule,
)
from ww_monitor.rules.layers import (
    broken_layer,
    harmful_trap,
    mean_shift,
    other_layers,
    over_trained,
    trap,
    trap_approaching,
    under_trained,
)
from ww_monitor.rules.trends import norm_growth, stable_rank_collapse

__all__ = [
    "BROKEN",
    "LOOKBACK",
    "SINGLE_RULES",
    "STOP_ON",
    "TRAINING_RULES",
    "Holding",
    "apply_rules",
    "broken_layer",
    "harmful_trap",
    "looks_back",
    "mean_shift",
    "metrics_of_the_past",
    "named",
    "norm_growth",
    "other_layers",
    "over_trained",
    "stable_rank_collapse",
    "transitions",
    "trap",
    "trap_approaching",
    "under_trained",
    "with_stop_rule",
]

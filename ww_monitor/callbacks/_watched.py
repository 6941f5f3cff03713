"""What other callbacks act on: the values of ours that they watch exist, are of now, and may improve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ww_monitor.record import NAN, History, summary_key

TRAP_FREE = "trap_free_until"
"""Name of the step of the latest snapshot without a correlation trap: it grows while a run is healthy, so that what
waits for an improvement stops a run with a trap and no other. It is published where a callback watches it."""

WITHOUT_SHUFFLES = {"trap_severity": 1.0, "trap_p_value": 1.0}
"""What stands for these where no matrix had to be shuffled: one without a large entry ends at its edge."""

FLAT = frozenset(("num_traps", "rand_num_traps", "snapshots_dropped", *WITHOUT_SHUFFLES))
"""Metrics that stay where they are while a run is healthy."""

_FIELDS = re.compile(r"{([^{}:!]+)")


def trap_free_until(history: History) -> float:
    """The step of the latest snapshot whose layers have less than half a trap between them, −1 if there is none."""
    free = [snapshot.step for snapshot in history if snapshot.summary.get("num_traps", NAN) < 0.5]
    return float(free[-1] or 0) if free else -1.0


def fields_of(template: object) -> list[str]:
    """The names in a template of a file name.

    >>> fields_of("{epoch}-{ww/alpha:.2f}"), fields_of(None)
    (['epoch', 'ww/alpha'], [])
    """
    return _FIELDS.findall(str(template)) if template else []


class Watched:
    """The model-level values that somebody else acts on.

    Args:
        name: What stands before our keys.
        keys: Keys that others watch, with the value that is the worst for whoever does; which are ours is found here.
    """

    def __init__(self, name: str = "", keys: Mapping[str, float] | None = None) -> None:
        start = name + summary_key("")
        ours = {key.removeprefix(start): worst for key, worst in (keys or {}).items() if key.startswith(start)}
        self.worst = ours
        self.name = name

    def __bool__(self) -> bool:
        return bool(self.worst)

    def values(self, history: History) -> dict[str, float]:
        """Key → value at the last snapshot, of every metric that is watched and that there is.

        A value that is not known is what a matrix without a trap has, or the worst: what watches it finds no key
        otherwise and ends the run.
        """
        if not len(history):
            return {}
        now, found = history.last.summary, {}
        for metric, worst in self.worst.items():
            if metric == TRAP_FREE:
                found[metric] = trap_free_until(history)
            elif metric in now:
                known = float(now[metric])
                found[metric] = known if abs(known) < float("inf") else WITHOUT_SHUFFLES.get(metric, worst)
        return {self.name + summary_key(metric): value for metric, value in found.items()}

    def advice(self, stoppers: Sequence[tuple[Any, str]], key: Any) -> list[str]:
        """What to say of those that wait for an improvement of a value that stays where it is while all is well.

        Args:
            stoppers: Each with the key that it watches.
            key: The framework's name of a key of ours.
        """
        flat = {key(self.name + summary_key(metric)) for metric in FLAT}
        better = key(self.name + summary_key(TRAP_FREE))
        return [
            f"{type(stopper).__name__} waits for {watched} to improve, which it cannot while no layer has a trap, and"
            f" so ends a healthy run; use stop_on='traps', or let it watch {better}, which grows until there is a trap"
            for stopper, watched in stoppers
            if watched in flat
        ]

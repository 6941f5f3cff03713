"""What other callbacks act on: the values of ours that they watch exist, are of now, and may improve."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ww_monitor.record import NAN, History, summary_key

TRAP_FREE = "trap_free_until"
"""Name of the step up to which no correlation trap was seen: it grows while a run is healthy, also between two readings
at one step, so that what waits for an improvement stops a run with a trap and no other. It is published where a
callback watches it."""

WITHOUT_SHUFFLES = {"trap_severity": 1.0, "trap_p_value": 1.0}
"""What stands for these where no matrix had to be shuffled: one without a large entry ends at its edge."""

FLAT = frozenset(("num_traps", "rand_num_traps", "snapshots_dropped", *WITHOUT_SHUFFLES))
"""Metrics that stay where they are while a run is healthy."""

_FIELDS = re.compile(r"{([^{}:!]+)")


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
        known: Names of the values that there may be.
        patient: Those keys that nobody watches but who passes over one that is not there.
    """

    def __init__(
        self,
        name: str = "",
        keys: Mapping[str, float] | None = None,
        known: Collection[str] = (),
        patient: Collection[str] = (),
    ) -> None:
        start = name + summary_key("")
        self._patient = {key.removeprefix(start) for key in patient}
        ours = {key.removeprefix(start): worst for key, worst in (keys or {}).items() if key.startswith(start)}
        self.worst = ours
        self.name = name
        self._known = known
        self._read_at, self._readings = -1, 0

    def __bool__(self) -> bool:
        return bool(self.worst)

    def values(self, history: History, step: int | None = None) -> dict[str, float]:
        """Key → value of every metric that is watched and that there is.

        A value that is not known is what a matrix without a trap has, or the worst: what watches it finds no key
        otherwise and ends the run. Where nobody does so it is left out, and counts for nothing.

        Args:
            history: What was seen.
            step: Of the weights that it is read for: where no snapshot is of them, no value is known. `None` takes the
                last snapshot.
        """
        last = history.last if len(history) else None
        now = last.summary if last is not None and step in (None, last.step) else {}
        found = {}
        for metric, worst in self.worst.items():
            if metric == TRAP_FREE:
                found[metric] = self._trap_free_until(history, step)
            elif metric in now or metric in self._known:
                known = float(now.get(metric, NAN))
                known = known if abs(known) < float("inf") else WITHOUT_SHUFFLES.get(metric, worst)  # false of NaN, too
                if known != worst or metric not in self._patient:
                    found[metric] = known
        return {self.name + summary_key(metric): value for metric, value in found.items()}

    @property
    def all_keys(self) -> list[str]:
        """The keys of all watched values, also of those that are not known now."""
        return [self.name + summary_key(metric) for metric in self.worst]

    def lost(self, history: History, step: int, values: Mapping[str, float], key: Any = str) -> str:
        """What to say where the analysis of the weights at this step has failed, and somebody reads a value of them.

        Args:
            history: What was seen.
            step: Of the weights.
            values: What `values` gave.
            key: The framework's name of a key of ours.
        """
        lost = [] if len(history) and history.last.step == step else [name for name in self.worst if name != TRAP_FREE]
        if not lost:
            return ""
        left = [name for name in lost if self.name + summary_key(name) not in values]
        named = ", ".join(key(self.name + summary_key(name)) for name in lost)
        start = f"there is no analysis of step {step}, at which {named} is watched; while that is so it"
        if len(left) == len(lost):
            return f"{start} is left out, which is passed over"
        return f"{start} counts as the worst: no checkpoint is chosen by it, but a stopper may end the run"

    def _trap_free_until(self, history: History, step: int | None) -> float:
        """Now, or where a trap is there the step of the latest snapshot without one, −1 if there is none."""
        # A mean over shuffles, from ½ on a trap, as in `rules.trap`.
        trapped = [snapshot.summary.get("num_traps", NAN) >= 0.5 for snapshot in history]
        if trapped and trapped[-1]:
            return float(max((one.step or 0 for one, bad in zip(history, trapped, strict=True) if not bad), default=-1))
        now = step if step is not None else (history.last.step or 0) if trapped else 0
        self._readings = self._readings + 1 if now == self._read_at else 0
        self._read_at = now
        return now + min(self._readings, 1023) / 1024  # less than a step: the next one is larger still

    def advice(self, stoppers: Sequence[tuple[Any, str]], key: Any) -> list[str]:
        """What to say of those that wait for an improvement of a value that stays where it is while all is well.

        Args:
            stoppers: Each with the key that it watches.
            key: The framework's name of a key of ours.
        """
        better = key(self.name + summary_key(TRAP_FREE))
        if TRAP_FREE in self.worst and "num_traps" not in self._known:
            return [f"{better} is watched, but metrics leave num_traps out: it grows whatever happens"]
        flat = {key(self.name + summary_key(metric)) for metric in FLAT}
        return [
            f"{type(stopper).__name__} waits for {watched} to improve, which it cannot while no layer has a trap, and"
            f" so ends a healthy run; use stop_on='traps', or let it watch {better}, which grows until there is a trap"
            for stopper, watched in stoppers
            if watched in flat
        ]

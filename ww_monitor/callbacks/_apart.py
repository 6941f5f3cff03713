"""What tells the monitors of one run apart, and the parts of a run that was cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ww_monitor.rules import named
from ww_monitor.settings import AnalysisOptions, CallbackOptions, Select, WalkOptions
from ww_monitor.signatures import Settings, options_of

_ANALYSIS: tuple[type[Settings], ...] = (AnalysisOptions, Select, WalkOptions)
_ACTS = ("stop_on", "rules", "track_delta")
_START = "ww_monitor.SpectralMonitor("
_EVERY = re.compile("every=(?:'[^']*'|\"[^\"]*\")(?:, )?")  # how often, in the keys of the last release
_REST = re.compile(rf"(?:(?:^|, )(?:{'|'.join(_ACTS)}|number )\b.*)?\)")


class StateKey:
    """The key of a monitor's state in a checkpoint: equal for monitors that do the same, however often.

    Args:
        given: What a callback was made with.
    """

    def __init__(self, given: CallbackOptions) -> None:
        # `strict` says how errors end, which is no part of what is analysed.
        names = [name for part in _ANALYSIS for name in part.of(given).keywords() if name != "strict"]
        defaults = {option.name: option.default for option in options_of(type(given))}
        # Rules by name: the repr of a function has its address, which differs in the process that resumes.
        values: dict[str, Any] = {**given.keywords(), "rules": given.rules and [named(rule) for rule in given.rules]}
        # Defaults stay out: an option that joins in a later release changes no key.
        changed = {name: f"{name}={value!r}" for name, value in values.items() if value != defaults[name]}
        self.analysis = [changed[name] for name in (*names, "prefix") if name in changed]
        self.settings = [*self.analysis, *(changed[name] for name in _ACTS if name in changed)]
        # The keys of the last release had no options of walkers.
        before = {name for part in _ANALYSIS[:2] for name in part.of(given).keywords()}
        self._before = ", ".join(changed[name] for name in names if name in changed and name in before)
        self.number = 1
        """Which one it is in its run, of those that do the same."""

    def __str__(self) -> str:
        return f"{_START}{', '.join([*self.settings, *[f'number {self.number}'] * (self.number > 1)])})"

    def among(self, saved: Iterable[str], others: Sequence[StateKey]) -> str:
        """The key that a resumed run continues: its own, else the only one of the same analysis that nobody claims.

        So a run goes on that now stops on something else, and one of the last release.

        Args:
            saved: Keys in a checkpoint.
            others: Of the other monitors in the run.
        """
        keys = [key for key in saved if isinstance(key, str) and key.startswith(_START)]
        free = [key for key in keys if self._is_of_same_analysis(key) and key not in map(str, others)]
        return str(self) if str(self) in keys or len(free) != 1 else free[0]

    def _is_of_same_analysis(self, key: str) -> bool:
        inside, replaced = _EVERY.subn("", key.removeprefix(_START), count=1)
        if replaced:
            return inside == f"{self._before})"
        start = ", ".join(self.analysis)
        return inside.startswith(start) and bool(_REST.fullmatch(inside.removeprefix(start)))


def place_in(callbacks: Sequence[Any], one: object) -> int:
    """Where a callback stands, by identity; 0 where it is not there."""
    return next((place for place, callback in enumerate(callbacks) if callback is one), 0)

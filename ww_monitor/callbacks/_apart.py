"""What tells the monitors of one run apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ww_monitor.rules import named
from ww_monitor.settings import AnalysisOptions, CallbackOptions, Select, WalkOptions
from ww_monitor.signatures import Settings, options_of


def state_settings(given: CallbackOptions) -> list[str]:
    """What is done, as texts: equal for monitors that do the same, however often and wherever it goes."""
    parts: tuple[type[Settings], ...] = (AnalysisOptions, Select, WalkOptions)
    names = [name for part in parts for name in part.of(given).keywords() if name != "strict"]
    defaults = {option.name: option.default for option in options_of(type(given))}
    values: dict[str, Any] = {**given.keywords(), "rules": given.rules and [named(rule) for rule in given.rules]}
    names += ["stop_on", "rules", "track_delta", "prefix"]
    return [f"{name}={values[name]!r}" for name in names if values[name] != defaults[name]]


def place_in(callbacks: Sequence[Any], one: object) -> int:
    """Where a callback stands, by identity; 0 where it is not there."""
    return next((place for place, callback in enumerate(callbacks) if callback is one), 0)

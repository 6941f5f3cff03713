"""What a rule says of itself, and the finding that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, TypeVar, cast

from ww_monitor.record import Finding, History, Layer, Rule, Severity

LOOKBACK = 16
"""Snapshots before the last that rules see: it bounds their cost, and what a checkpoint must hold."""


MOST_FINDINGS = 200_000
"""Findings of one rule at one snapshot (our choice: as many as the matrices of the largest model that `plan` takes)."""

BROKEN = ("not_finite",)
"""Statuses of weights that are lost; where no solver gives a spectrum of finite ones they are not."""


_Function = TypeVar("_Function", bound=Callable[..., object])


def looks_back(*metrics: str) -> Callable[[_Function], _Function]:
    """Says of a rule which metrics of layers it reads in earlier snapshots; a rule without it may read all.

    A run that a checkpoint resumes knows those, and of every earlier layer its name, kind, role, shape, status,
    verdict and phase, and the model's values; no histogram, no trap entries.

    >>> from ww_monitor.rules import trap
    >>> @looks_back("alpha")
    ... def alpha_falls(history):
    ...     for layer in history.last.layers:
    ...         if layer.value("alpha") < history.of_layer(layer.name)[0].value("alpha") - 1:
    ...             yield Finding("alpha_falls", layer.name, "info", f"{layer.name}: alpha fell by more than 1")
    >>> sorted(metrics_of_the_past([alpha_falls, trap]))
    ['alpha']
    """

    def declare(rule: _Function) -> _Function:
        rule.__dict__["looks_back"] = metrics
        return rule

    return declare


def lasting(rule: _Function) -> _Function:
    """The rule that still finds what held one snapshot before: a value about a threshold does not flap.

    Of earlier snapshots only the last is read, with what a checkpoint keeps of it (`ww_monitor.monitor.checkpoint`).
    """
    finds = cast("Callable[..., Iterable[Finding]]", rule)

    @wraps(rule)
    def lasts(history: History, **thresholds: Any) -> Iterator[Finding]:
        now = list(finds(history, **thresholds))
        yield from now
        held = finds(History(history.snapshots[:-1]), **thresholds) if len(history) > 1 else ()
        found = {finding.layer for finding in now}
        yield from (one for one in held if one.layer not in found and history.last.named(one.layer))

    return cast("_Function", lasts)


def metrics_of_the_past(rules: Iterable[Rule]) -> frozenset[str] | None:
    """The metrics that rules read in earlier snapshots, `None` if one of them may read all."""
    declared = [getattr(getattr(rule, "func", rule), "looks_back", None) for rule in rules]  # func: of a partial
    return None if None in declared else frozenset(name for names in declared if names for name in names)


def name_of(rule: Rule) -> str:
    """The name of a rule, also of a variant by `functools.partial`; of an object that of its class."""
    function = getattr(rule, "func", rule)
    return str(getattr(function, "__name__", type(function).__name__))


def finding_of(
    history: History, rule: Callable[..., object], layer: Layer, severity: Severity, message: str
) -> Finding:
    """What a rule says of a layer at the last snapshot."""
    name = getattr(rule, "__name__", "rule")
    return Finding(name, layer.name, severity, f"{layer.name}: {message}", step=history.last.step)


def named(rule: Rule) -> str:
    """A rule in words, the same in every process.

    >>> from functools import partial
    >>> from ww_monitor.rules import trap
    >>> named(partial(trap, at_least=2.0))
    'trap(at_least=2.0)'
    """
    given = ", ".join(f"{name}={value!r}" for name, value in getattr(rule, "keywords", {}).items())
    return f"{name_of(rule)}({given})" if given else name_of(rule)

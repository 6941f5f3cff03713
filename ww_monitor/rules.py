"""Rules: a History in, the findings that hold at its last snapshot out.

A rule is a generator function of a `History`; thresholds are keywords, so `functools.partial` makes a variant. It
sees plain records only, hence works on a saved file too. NaN compares false and wakes no rule. A rule that reads
metrics of earlier snapshots may say which (`looks_back`): a checkpoint then holds those and not all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial, wraps
from typing import Any, TypeVar, cast

from ww_monitor.record import Finding, History, Layer, Rule, Severity

LOOKBACK = 16
"""Snapshots before the last that rules see: it bounds their cost, and what a checkpoint must hold."""

BROKEN = ("not_finite", "solver_failed")

_Function = TypeVar("_Function", bound=Callable[..., object])


def looks_back(*metrics: str) -> Callable[[_Function], _Function]:
    """Says of a rule which metrics of layers it reads in earlier snapshots; a rule without it may read all.

    A run that a checkpoint resumes knows those, and of every earlier layer its name, kind, role, shape, status,
    verdict and phase, and the model's values; no histogram, no trap entries.

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


def _lasting(rule: _Function) -> _Function:
    """The rule that still finds what held one snapshot before: a value about a threshold does not flap.

    Of earlier snapshots only the last is read, with what a checkpoint keeps of it (`ww_monitor.monitor.checkpoint`).
    """
    finds = cast("Callable[..., Iterable[Finding]]", rule)

    @wraps(rule)
    def lasting(history: History, **thresholds: Any) -> Iterator[Finding]:
        now = list(finds(history, **thresholds))
        yield from now
        held = finds(History(history.snapshots[:-1]), **thresholds) if len(history) > 1 else ()
        found = {finding.layer for finding in now}
        yield from (one for one in held if one.layer not in found and history.last.named(one.layer))

    return cast("_Function", lasting)


def metrics_of_the_past(rules: Iterable[Rule]) -> frozenset[str] | None:
    """The metrics that rules read in earlier snapshots, `None` if one of them may read all."""
    declared = [getattr(getattr(rule, "func", rule), "looks_back", None) for rule in rules]
    return None if None in declared else frozenset(name for names in declared if names for name in names)


@looks_back()
def broken_layer(history: History) -> Iterator[Finding]:
    """A layer has NaN or infinite weights, or its analysis failed."""
    for layer in history.last.layers:
        if layer.status in BROKEN or layer.status.startswith("error"):
            yield _finding(history, broken_layer, layer, "critical", f"no spectrum: {layer.status}")


@looks_back()
def trap(history: History, *, at_least: float = 0.5) -> Iterator[Finding]:
    """A correlation trap is present: shuffled copies have outliers, at least `at_least` of them on average.

    An orthogonal layer is left out: the entries of an identity matrix are large because the others are zero. One half:
    the outlier shows in most shuffles (our choice; the Tracy–Widom level already keeps noise out).
    """
    for layer in history.last.layers:
        if layer.value("num_traps") >= at_least and layer.verdict != "degenerate":
            yield _finding(history, trap, layer, "critical", _trap_message(layer))


@looks_back("trap_headroom")
def trap_approaching(history: History, *, headroom: float = 0.8, rise: float = 1.1) -> Iterator[Finding]:
    """The largest entry grows, and has reached `headroom` of the size that makes a trap; over 5 % below.

    Growth counts from the oldest snapshot at hand, and must be to `rise` times: in small matrices a headroom near 1
    is chance, so that a level alone says nothing (16 × 16 Gaussian slices of a 3 × 3 kernel are at 0.9).
    """
    for layer in history.last.layers:
        now = layer.value("trap_headroom")
        if not now >= 0.95 * headroom or layer.value("num_traps") >= 0.5:
            continue
        series = [past.value("trap_headroom") for past in history.of_layer(layer.name)]
        known = [value for value in series if value == value]
        if len(known) > 1 and (now >= headroom or known[-2] >= headroom) and now >= rise * known[0]:
            message = f"the largest entry grew from {known[0]:.2f} to {now:.2f} of the size that makes a trap"
            yield _finding(history, trap_approaching, layer, "info", message)


@looks_back()
@_lasting
def mean_shift(history: History, *, ratio: float = 1.0) -> Iterator[Finding]:
    """The mean of the entries makes an outlier of its own; weightwatcher counts it as a trap, it is none."""
    for layer in history.last.layers:
        now = layer.value("mean_shift")
        if now >= ratio and layer.verdict != "degenerate":
            message = f"the mean of the entries is {now:.2f} times the size that makes an outlier; no harm by itself"
            yield _finding(history, mean_shift, layer, "info", message)


@looks_back()
@_lasting
def over_trained(history: History, *, alpha: float = 2.0, sigmas: float = 2.0) -> Iterator[Finding]:
    """Alpha is below 2 by more than `sigmas` of its own standard error, and the power law fits (verdict `ok`).

    2 is where the theory places the ideal (Martin & Mahoney 2021); two standard errors are our choice.
    """
    for layer in history.last.layers:
        value, sigma = (layer.value(name) if layer.verdict == "ok" else float("nan") for name in ("alpha", "sigma"))
        if value + sigmas * sigma < alpha:
            message = f"alpha {value:.2f} ± {sigma:.2f} is below {alpha:g}: very heavy-tailed, over-trained"
            yield _finding(history, over_trained, layer, "warning", message)


@looks_back()
@_lasting
def under_trained(history: History, *, snapshots: int = 3) -> Iterator[Finding]:
    """The spectrum could not be told from a random matrix's in any of the last `snapshots` snapshots."""
    if len(history) < snapshots:
        return
    recent = history.snapshots[-snapshots:]
    for layer in history.last.layers:
        rows = (row for snapshot in recent for row in snapshot.named(layer.name))
        if all(row.verdict == "random_like" for row in rows):
            message = "no eigenvalue rises above the random bulk: under-trained"
            yield _finding(history, under_trained, layer, "warning", message)


@looks_back()
def other_layers(history: History) -> Iterator[Finding]:
    """The model's alpha is the mean over other layers than one snapshot before; over those known at both it is told."""
    if len(history) < 2:
        return
    before, now = ({row.name: row.value("alpha") for row in one.layers} for one in history.snapshots[-2:])
    before, now = ({name: value for name, value in one.items() if value == value} for one in (before, now))
    both = before.keys() & now.keys()
    if before and now and before.keys() != now.keys():
        came, went, kept = len(now) - len(both), len(before) - len(both), ", "
        if both:
            means = (sum(one[name] for name in both) / len(both) for one in (before, now))
            kept = ", {:.2f} → {:.2f} over those known at both, ".format(*means)
        message = (
            f"alpha {_mean(before):.2f} → {_mean(now):.2f} is a mean over {len(before)}, then {len(now)} layers:"
            f" {came} came, {went} went{kept}".rstrip(", ")
        )
        yield Finding("other_layers", "", "info", message, step=history.last.step)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


TRAINING_RULES: tuple[Rule, ...] = (
    broken_layer,
    trap,
    trap_approaching,
    mean_shift,
    over_trained,
    other_layers,
    under_trained,
)
"""What a monitor applies: a layer counts as under-trained after three random-like snapshots."""

SINGLE_RULES: tuple[Rule, ...] = (*TRAINING_RULES[:-1], partial(under_trained, snapshots=1))
"""What `analyze` applies to its one snapshot."""

STOP_ON: Mapping[str, str] = {"traps": "trap", "broken_layers": "broken_layer"}
"""Choices of `stop_on`, and the rule whose persistence stops the run."""


def with_stop_rule(rules: Sequence[Rule], stop_on: str | None) -> tuple[Rule, ...]:
    """The rules, and the one whose persistence stops the run if it is not among them (as itself or as a variant)."""
    names = {_name(rule) for rule in rules}
    missing = [rule for rule in (trap, broken_layer) if stop_on and rule.__name__ == STOP_ON[stop_on]]
    return (*rules, *(rule for rule in missing if rule.__name__ not in names))


def apply_rules(rules: Sequence[Rule], history: History) -> list[Finding]:
    """Every finding that holds at the last snapshot, seen with no more than `LOOKBACK` before it."""
    seen = History(history.snapshots[-LOOKBACK - 1 :])
    return [finding for rule in rules for finding in rule(seen)]


def transitions(active: Sequence[Finding], holding: Sequence[Finding], *, step: int | None) -> list[Finding]:
    """What begins and what ends between the findings that held before and those that hold now.

    >>> old = Finding("trap", "fc1", "critical", "2 traps", step=10)
    >>> [(f.rule, f.state) for f in transitions([old], [], step=20)]
    [('trap', 'end')]
    """
    before = {(finding.rule, finding.layer): finding for finding in active}
    now = {(finding.rule, finding.layer): finding for finding in holding}
    begun = [finding for key, finding in now.items() if key not in before]
    return begun + [_ended(finding, step) for key, finding in before.items() if key not in now]


def _ended(finding: Finding, step: int | None) -> Finding:
    """The end of a finding, with what had been true in the past tense."""
    start = f"{finding.layer}: " if finding.layer else ""
    when = "" if finding.step is None else f" at step {finding.step}"
    what = finding.message.removeprefix(start)
    return replace(finding, state="end", step=step, message=f"{start}no longer so; last seen{when}: {what}")


class Holding:
    """The findings that hold while a run lasts: which begin and end, for how long, and whether that ends the run.

    Args:
        rules: What to look for.
        stop_on: A key of `STOP_ON` or `None`; its rule is applied also where `rules` leaves it out.
        patience: For how many consecutive snapshots it must hold in the same layer.
    """

    def __init__(self, rules: Sequence[Rule], *, stop_on: str | None, patience: int) -> None:
        self.rules = with_stop_rule(rules, stop_on)
        self.stop_on = stop_on
        self.patience = patience
        self.clear()

    def clear(self) -> None:
        """A new run begins."""
        self.active: list[Finding] = []
        self.held: Counter[tuple[str, str]] = Counter()
        self.stop_reason = ""

    def judge(self, history: History, *, failed: Callable[[str, Exception], None]) -> list[Finding]:
        """What begins and what ends with the last snapshot.

        Args:
            history: What rules see.
            failed: Told of a rule that raises or gives what is no finding; what it had found stays as it was.
        """
        holding: list[Finding] = []
        for rule in self.rules:
            try:
                holding += [_checked(finding) for finding in apply_rules([rule], history)]
            except Exception as error:  # noqa: BLE001 - a rule of the user's costs its own findings only
                failed(_name(rule), error)
                holding += [finding for finding in self.active if finding.rule == _name(rule)]
        told = transitions(self.active, holding, step=history.last.step)
        self.active = holding
        self._count(holding)
        return told

    def _count(self, holding: Sequence[Finding]) -> None:
        keys = {(finding.rule, finding.layer) for finding in holding}
        self.held = Counter({key: self.held[key] + 1 for key in keys})
        if self.stop_on is None:
            return
        for finding in holding:
            count = self.held[finding.rule, finding.layer]
            if finding.rule == STOP_ON[self.stop_on] and count >= self.patience:
                times = "1 snapshot" if count == 1 else f"{count} snapshots in a row"
                self.stop_reason = f"{self.stop_on} in {times}: {finding.message}"
                return

    def state(self) -> dict[str, Any]:
        """Plain Python values that `load` continues from."""
        return {
            "active": [asdict(finding) for finding in self.active],
            "held": [[rule, layer, count] for (rule, layer), count in sorted(self.held.items())],
        }

    def load(self, state: Mapping[str, Any], *, stop_reason: str) -> None:
        """Continue where the state was taken; one that shall not stop forgets the reason."""
        active = [Finding(**finding) for finding in state["active"]]
        self.held = Counter({(rule, layer): count for rule, layer, count in state["held"]})
        self.active, self.stop_reason = active, stop_reason if self.stop_on else ""


def _checked(finding: object) -> Finding:
    texts = (finding.rule, finding.layer, finding.message) if isinstance(finding, Finding) else (None,)
    if not isinstance(finding, Finding) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"expected Findings whose rule, layer and message are texts, got {finding!r}")
    return finding


def _name(rule: Rule) -> str:
    return str(getattr(getattr(rule, "func", rule), "__name__", ""))


def named(rule: Rule) -> str:
    """A rule in words, the same in every process.

    >>> named(partial(trap, at_least=2.0))
    'trap(at_least=2.0)'
    """
    given = ", ".join(f"{name}={value!r}" for name, value in getattr(rule, "keywords", {}).items())
    return f"{_name(rule)}({given})" if given else _name(rule)


def _finding(history: History, rule: Callable[..., object], layer: Layer, severity: Severity, message: str) -> Finding:
    name = getattr(rule, "__name__", "rule")
    return Finding(name, layer.name, severity, f"{layer.name}: {message}", step=history.last.step)


def _trap_message(layer: Layer) -> str:
    count = layer.value("num_traps")
    parts = [f"{count:g} correlation trap{'s' * (count != 1)} a shuffle"]
    if layer.value("trap_severity") == layer.value("trap_severity"):
        parts.append(f"λmax/edge {layer.value('trap_severity'):.2f} (p = {layer.value('trap_p_value'):.1g})")
    if layer.trap_entries:
        in_slice = layer.shape[0] > 1
        shown = [
            f"w[{f'{entry.slice}, ' if in_slice else ''}{entry.row}, {entry.column}] = {entry.value:.3g}"
            f" ({entry.headroom:.2f}×)"
            for entry in layer.trap_entries[:3]
        ]
        parts.append("large entries " + ", ".join(shown))
    return "; ".join(parts)

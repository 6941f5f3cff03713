"""Rules: a History in, the findings that hold at its last snapshot out.

A rule is a generator function of a `History`; thresholds are keywords, so `functools.partial` makes a variant. It
sees plain records only, hence works on a saved file too. NaN compares false and wakes no rule. A rule that reads
metrics of earlier snapshots may say which (`looks_back`): a checkpoint then holds those and not all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

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


def metrics_of_the_past(rules: Iterable[Rule]) -> frozenset[str] | None:
    """The metrics that rules read in earlier snapshots, `None` if one of them may read all."""
    declared = [getattr(getattr(rule, "func", rule), "looks_back", None) for rule in rules]
    return None if None in declared else frozenset(name for names in declared if names for name in names)


@looks_back()
def broken_layer(history: History) -> Iterator[Finding]:
    """A layer has NaN or infinite weights, or a spectrum that no solver gives; a failure of our own is none."""
    for layer in history.last.layers:
        if layer.status in BROKEN:
            yield _finding(history, broken_layer, layer, "critical", f"no spectrum: {layer.status}")


@looks_back()
def trap(history: History, *, at_least: float = 0.5) -> Iterator[Finding]:
    """A correlation trap is present: shuffled copies have outliers, at least `at_least` of them on average.

    An orthogonal layer is left out: the entries of an identity matrix are large because the others are zero. One half:
    the outlier shows in most shuffles (our choice; the Tracy–Widom level already keeps noise out).

    A layer with few eigenvalues (verdict `few_eigenvalues`: a head of ten classes) gets a warning instead of a critical
    finding, and `stop_on="traps"` may act on it. In four runs of anti-grokking, seen at 49 steps each, such a head was
    the only layer to raise a finding in the three that collapsed (test accuracy .876, .878, .857 at best, .686, .661,
    .619 at the end); it also did in the one that never did (.917, .915), before a wide layer of that run. Stopping
    at its third snapshot in a row would have ended at .869, .852 and .857, which saves .18 to .24, and cost .005 in the
    healthy run; without it nothing would have stopped the three. One healthy run measures no rate of false alarms.
    """
    for layer in history.last.layers:
        if layer.value("num_traps") >= at_least and layer.verdict != "degenerate":
            severity: Severity = "warning" if layer.verdict == "few_eigenvalues" else "critical"
            yield _finding(history, trap, layer, severity, _trap_message(layer))


@looks_back()
def harmful_trap(history: History, *, harm: float = 0.001) -> Iterator[Finding]:
    """The outputs depend on a trap: `trap_harm`, where a callback measures it, is at least `harm` in this layer.

    By `ww_monitor.trap_harm` on its own Gaussian inputs, the traps of three nets that collapsed have 0.0013 to 0.0026,
    those of a healthy one 0.0001 and 0.0004: the level was chosen between them, and no rate of false alarms is known.
    """
    for layer in history.last.layers:
        if "trap_harm" in layer.metrics and layer.value("trap_harm") >= harm:
            message = (
                f"without its trap outputs differ by a Jensen–Shannon divergence of {layer.value('trap_harm'):.2g}"
            )
            yield _finding(history, harmful_trap, layer, "info", message)


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
def mean_shift(history: History, *, ratio: float = 1.0) -> Iterator[Finding]:
    """The mean of the entries makes an outlier of its own; weightwatcher counts it as a trap, it is none."""
    for layer in history.last.layers:
        now = layer.value("mean_shift")
        if now >= ratio and layer.verdict != "degenerate":
            message = f"the mean of the entries is {now:.2f} times the size that makes an outlier; no harm by itself"
            yield _finding(history, mean_shift, layer, "info", message)


@looks_back()
def over_trained(history: History, *, alpha: float = 2.0, sigmas: float = 2.0) -> Iterator[Finding]:
    """Alpha is below 2 by more than `sigmas` of its own standard error, and the power law fits (verdict `ok`).

    2 is where the theory places the ideal (Martin & Mahoney 2021); two standard errors are our choice.
    """
    for layer in history.last.layers:
        value, sigma = layer.value("alpha"), layer.value("sigma")
        if layer.verdict == "ok" and value + sigmas * sigma < alpha:
            message = f"alpha {value:.2f} ± {sigma:.2f} is below {alpha:g}: very heavy-tailed, over-trained"
            yield _finding(history, over_trained, layer, "warning", message)


@looks_back()
def under_trained(
    history: History, *, snapshots: int = 3, alpha: float = 6.0, sigmas: float = 2.0
) -> Iterator[Finding]:
    """The spectrum could not be told from a random matrix's in any of the last `snapshots`; or its tail is light.

    A light tail (information only) has alpha above 6, where weightwatcher's users call a layer under-trained (Martin &
    Mahoney 2021), by more than `sigmas` of its own standard error, now, and a power law that fitted in all of them.
    """
    if len(history) < snapshots:
        return
    recent = history.snapshots[-snapshots:]
    for layer in history.last.layers:
        verdicts = {row.verdict for snapshot in recent for row in snapshot.named(layer.name)}
        if verdicts == {"random_like"}:
            message = "no eigenvalue rises above the random bulk: under-trained"
            yield _finding(history, under_trained, layer, "warning", message)
        elif verdicts == {"ok"}:
            value, sigma = layer.value("alpha"), layer.value("sigma")
            if alpha < value - sigmas * sigma < math.inf:
                message = f"alpha {value:.2f} ± {sigma:.2f} is above {alpha:g}: a light tail, little is learnt yet"
                yield _finding(history, under_trained, layer, "info", message)


def _steady(history: History, layer: Layer, metric: str, count: int, *, sign: int) -> list[tuple[int, float]]:
    """The last `count` steps and values, if each value is above (`sign` 1) or below (-1) that before; else nothing."""
    found: list[tuple[int, float]] = []
    for snapshot in reversed(history.snapshots[-count:]):
        value = next((row.value(metric) for row in snapshot.named(layer.name)), math.nan)
        if not snapshot.step or not math.isfinite(value) or (found and not sign * (found[-1][1] - value) > 0):
            return []
        found.append((snapshot.step, value))
    return found[::-1] if len(found) == count and layer.verdict != "thin_slices" else []


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line through the points (x, y), by least squares."""
    middle, level = sum(x) / len(x), sum(y) / len(y)
    spread = sum((one - middle) ** 2 for one in x)
    return sum((one - middle) * (other - level) for one, other in zip(x, y, strict=True)) / spread if spread else 0.0


@looks_back("stable_rank")
def stable_rank_collapse(history: History, *, snapshots: int = 8, fall: float = 2.0) -> Iterator[Finding]:
    """The stable rank of a layer falls: in each of the last `snapshots` snapshots, and in all to a part of `fall`.

    Compared with its own past only: a low rank by itself is no alarm. Idea: MSign (arXiv 2602.01734), where it fell
    10,000 steps before a language model's training failed. It tells no failure from learning: it began in the first two
    layers of three nets that were to collapse (anti-grokking, step 0.2 to 1.0 million) and of the one that was not
    (0.16 to 0.25), and for one snapshot in one of nine layers of three healthy MLPs on digits.
    """
    for layer in history.last.layers:
        values = [value for _, value in _steady(history, layer, "stable_rank", snapshots, sign=-1)]
        if values and values[-1] * fall <= values[0]:
            message = f"the stable rank fell from {values[0]:.3g} to {values[-1]:.3g} in {snapshots} snapshots"
            yield _finding(history, stable_rank_collapse, layer, "info", message)


@looks_back("log_spectral_norm")
def norm_growth(history: History, *, snapshots: int = 12, exponent: float = 0.6) -> Iterator[Finding]:
    """The largest eigenvalue grows without end: in each of the last `snapshots`, as step^`exponent` or faster.

    The slope of log λmax over log step is that much over all of them, and still over the later half; steps and not
    snapshots count, so that it is the same for any cadence. In four runs of anti-grokking it began in fc1 and fc2 of
    the three that were to collapse, first at a test accuracy of .876, .874 and .857 (.876, .878, .857 at best, .686,
    .661, .619 at the end), and never in the one that kept its accuracy, nor in three healthy MLPs on digits seen 40
    times in 3,000 steps. With 10 snapshots it began in four of those nine layers, with an exponent of 0.5 in five: the
    margin is small, and it is information until more runs are counted.
    """
    for layer in history.last.layers:
        points = _steady(history, layer, "log_spectral_norm", snapshots, sign=1)
        x, y = [math.log10(step) for step, _ in points], [value for _, value in points]
        if points and min(_slope(x, y), _slope(x[snapshots // 2 :], y[snapshots // 2 :])) >= exponent:
            message = f"λmax grew by a factor of {10 ** (y[-1] - y[0]):.3g} in {snapshots} snapshots, and does not slow"
            yield _finding(history, norm_growth, layer, "info", message)


TRAINING_RULES: tuple[Rule, ...] = (
    broken_layer, trap, harmful_trap, trap_approaching, mean_shift, over_trained, stable_rank_collapse, norm_growth,
    under_trained,
)  # fmt: skip
"""What a monitor applies: a layer counts as under-trained after three random-like snapshots."""

SINGLE_RULES: tuple[Rule, ...] = (*TRAINING_RULES[:-1], partial(under_trained, snapshots=1))
"""What `analyze` applies to its one snapshot."""

STOP_ON: Mapping[str, str] = {"traps": "trap", "harmful_traps": "harmful_trap", "broken_layers": "broken_layer"}
"""Choices of `stop_on`, and the rule whose persistence stops the run."""


def with_stop_rule(rules: Sequence[Rule], stop_on: str | None) -> tuple[Rule, ...]:
    """The rules, and the one whose persistence stops the run if it is not among them (as itself or as a variant)."""
    names = {_name(rule) for rule in rules}
    missing = [rule for rule in (trap, harmful_trap, broken_layer) if stop_on and rule.__name__ == STOP_ON[stop_on]]
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
    ended = [replace(finding, state="end", step=step) for key, finding in before.items() if key not in now]
    return begun + ended


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
                self.stop_reason = f"{self.stop_on} in {count} snapshots in a row: {finding.message}"
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


def _finding(history: History, rule: Callable[..., object], layer: Layer, severity: Severity, message: str) -> Finding:
    name = getattr(rule, "__name__", "rule")
    return Finding(name, layer.name, severity, f"{layer.name}: {message}", step=history.last.step)


def _trap_message(layer: Layer) -> str:
    parts = [f"{layer.value('num_traps'):g} correlation traps a shuffle"]
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

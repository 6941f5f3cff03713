"""Rules: a History in, the findings that hold at its last snapshot out.

A rule is a generator function of a `History`; thresholds are keywords, so `functools.partial` makes a variant. It
sees plain records only, hence works on a saved file too. NaN compares false and wakes no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ww_monitor.record import Finding, History, Layer, Severity

Rule = Callable[[History], Iterable[Finding]]

BROKEN = ("not_finite", "solver_failed")


def broken_layer(history: History) -> Iterator[Finding]:
    """A layer has NaN or infinite weights, or its analysis failed."""
    for layer in history.last.layers:
        if layer.status in BROKEN or layer.status.startswith("error"):
            yield _finding(history, broken_layer, layer, "critical", f"no spectrum: {layer.status}")


def trap(history: History, *, at_least: float = 0.5) -> Iterator[Finding]:
    """A correlation trap is present: shuffled copies have outliers, at least `at_least` of them on average.

    An orthogonal layer is left out: the entries of an identity matrix are large because the others are zero. One half:
    the outlier shows in most shuffles (our choice; the Tracy–Widom level already keeps noise out).
    """
    for layer in history.last.layers:
        if layer.value("num_traps") >= at_least and layer.verdict != "degenerate":
            yield _finding(history, trap, layer, "critical", _trap_message(layer))


def trap_approaching(history: History, *, headroom: float = 0.8, rise: float = 1.1) -> Iterator[Finding]:
    """The largest entry grows, and has reached `headroom` of the size that makes a trap; over 5 % below.

    Growth counts from the oldest snapshot at hand, and must be to `rise` times: in small matrices a headroom near 1
    is chance, so that a level alone says nothing (16 × 16 Gaussian slices of a 3 × 3 kernel are at 0.9).
    """
    for layer in history.last.layers:
        series = [past.value("trap_headroom") for past in history.of_layer(layer.name)]
        known = [value for value in series if value == value]
        if len(known) < 2 or series[-1] != series[-1] or layer.value("num_traps") >= 0.5:
            continue
        now, held = known[-1], known[-2] >= headroom
        if now >= (0.95 * headroom if held else headroom) and now >= rise * known[0]:
            message = f"the largest entry grew from {known[0]:.2f} to {now:.2f} of the size that makes a trap"
            yield _finding(history, trap_approaching, layer, "info", message)


def mean_shift(history: History, *, ratio: float = 1.0) -> Iterator[Finding]:
    """The mean of the entries makes an outlier of its own; weightwatcher counts it as a trap, it is none."""
    for layer in history.last.layers:
        now = layer.value("mean_shift")
        if now >= ratio and layer.verdict != "degenerate":
            message = f"the mean of the entries is {now:.2f} times the size that makes an outlier; no harm by itself"
            yield _finding(history, mean_shift, layer, "info", message)


def over_trained(history: History, *, alpha: float = 2.0, sigmas: float = 2.0) -> Iterator[Finding]:
    """Alpha is below 2 by more than `sigmas` of its own standard error, and the power law fits (verdict `ok`).

    2 is where the theory places the ideal (Martin & Mahoney 2021); two standard errors are our choice.
    """
    for layer in history.last.layers:
        value, sigma = layer.value("alpha"), layer.value("sigma")
        if layer.verdict == "ok" and value + sigmas * sigma < alpha:
            message = f"alpha {value:.2f} ± {sigma:.2f} is below {alpha:g}: very heavy-tailed, over-trained"
            yield _finding(history, over_trained, layer, "warning", message)


def under_trained(history: History, *, snapshots: int = 3) -> Iterator[Finding]:
    """The spectrum could not be told from a random matrix's in any of the last `snapshots` snapshots."""
    if len(history) < snapshots:
        return
    recent = [{row.name: row for row in snapshot.layers} for snapshot in history.snapshots[-snapshots:]]
    for layer in history.last.layers:
        if all(rows.get(layer.name, layer).verdict == "random_like" for rows in recent):
            message = "no eigenvalue rises above the random bulk: under-trained"
            yield _finding(history, under_trained, layer, "warning", message)


TRAINING_RULES: tuple[Rule, ...] = (broken_layer, trap, trap_approaching, mean_shift, over_trained, under_trained)
"""What a monitor applies: a layer counts as under-trained after three random-like snapshots."""

SINGLE_RULES: tuple[Rule, ...] = (*TRAINING_RULES[:-1], partial(under_trained, snapshots=1))
"""What `analyze` applies to its one snapshot."""

STOP_ON: Mapping[str, str] = {"traps": "trap", "broken_layers": "broken_layer"}
"""Choices of `stop_on`, and the rule whose persistence stops the run."""


def with_stop_rule(rules: Sequence[Rule], stop_on: str | None) -> tuple[Rule, ...]:
    """The rules, and the one whose persistence stops the run if it is not among them (as itself or as a variant)."""
    names = {getattr(getattr(rule, "func", rule), "__name__", "") for rule in rules}
    missing = [rule for rule in (trap, broken_layer) if stop_on and rule.__name__ == STOP_ON[stop_on]]
    return (*rules, *(rule for rule in missing if rule.__name__ not in names))


def apply_rules(rules: Sequence[Rule], history: History) -> list[Finding]:
    """Every finding that holds at the last snapshot."""
    return [finding for rule in rules for finding in rule(history)]


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

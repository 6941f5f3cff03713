"""The rules that are applied, which findings hold, and when one ends a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any, get_args

from ww_monitor.record import Finding, History, Rule, Severity
from ww_monitor.rules import layers, trends
from ww_monitor.rules.declare import LOOKBACK, MOST_FINDINGS, name_of

TRAINING_RULES: tuple[Rule, ...] = (
    layers.broken_layer,
    layers.trap,
    layers.harmful_trap,
    layers.trap_approaching,
    layers.mean_shift,
    layers.over_trained,
    trends.stable_rank_collapse,
    trends.norm_growth,
    layers.other_layers,
    layers.under_trained,
)
"""What a monitor applies: a layer counts as under-trained after three random-like snapshots."""


# the last of them wants three snapshots, of which there is one
SINGLE_RULES: tuple[Rule, ...] = (*TRAINING_RULES[:-1], partial(layers.under_trained, snapshots=1))
"""What `analyze` applies to its one snapshot."""


STOP_ON: Mapping[str, str] = {"traps": "trap", "harmful_traps": "harmful_trap", "broken_layers": "broken_layer"}
"""Choices of `stop_on`, and the rule whose persistence stops the run."""


def with_stop_rule(rules: Sequence[Rule], stop_on: str | None) -> tuple[Rule, ...]:
    """The rules, and the one whose persistence stops the run if it is not among them (as itself or as a variant)."""
    names = {name_of(rule) for rule in rules}
    missing = [rule for rule in TRAINING_RULES if stop_on and name_of(rule) == STOP_ON[stop_on]]
    return (*rules, *(rule for rule in missing if name_of(rule) not in names))


def apply_rules(rules: Sequence[Rule], history: History) -> list[Finding]:
    """Every finding that holds at the last snapshot, seen with no more than `LOOKBACK` before it.

    Raises:
        ValueError: if a rule gives more than `MOST_FINDINGS`, as one that never ends does.
    """
    seen = History(history.snapshots[-LOOKBACK - 1 :])
    found = [list(islice(rule(seen), MOST_FINDINGS + 1)) for rule in rules]  # one more tells too many from enough
    if max(map(len, found), default=0) > MOST_FINDINGS:
        raise ValueError(f"apply_rules: expected at most {MOST_FINDINGS:,} findings of a rule, got more")
    return [finding for of_rule in found for finding in of_rule]


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
                failed(name_of(rule), error)
                # or each would end now and begin again when the rule works
                holding += [finding for finding in self.active if finding.rule == name_of(rule)]
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
            informs = finding.severity == "info" and self.stop_on == "traps"  # a narrow kernel, where traps are common
            if finding.rule == STOP_ON[self.stop_on] and count >= self.patience and not informs:
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


_WORDS = frozenset((*get_args(Severity), "begin", "end"))


def _checked(finding: object) -> Finding:
    if isinstance(finding, Finding):
        texts = finding.rule, finding.layer, finding.message, finding.severity, finding.state
        known = all(isinstance(text, str) for text in texts) and {*texts[3:]} <= _WORDS
        if known and isinstance(finding.step, int | None):
            return finding
    raise TypeError(f"expected Findings whose rule, layer and message are texts, got {finding!r}")


def _ended(finding: Finding, step: int | None) -> Finding:
    """The end of a finding, with what had been true in the past tense."""
    start = f"{finding.layer}: " if finding.layer else ""
    when = "" if finding.step is None else f" at step {finding.step}"
    what = finding.message.removeprefix(start)
    return replace(finding, state="end", step=step, message=f"{start}no longer so; last seen{when}: {what}")

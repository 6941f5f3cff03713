"""What a report says in words: spans of findings, verdicts, and the three sentences on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from ww_monitor.record import NAN
from ww_monitor.report.recording import Recording

SEVERITIES = ("critical", "warning", "info")

VERDICT_WORDS = {
    "ok": "a power law fits",
    "poor_fit": "no power law fits: alpha is not to be trusted",
    "random_like": "cannot be told from random: nothing learnt yet",
    "few_eigenvalues": "too few eigenvalues to judge by alpha",
    "rank_deficient": "more than half of its modes are lost",
    "degenerate": "flat spectrum: all eigenvalues alike",
    "zero": "all weights are zero",
    "not_finite": "weights are NaN or infinite",
    "solver_failed": "no spectrum: the solver failed",
    "error": "the analysis failed",
}
"""A verdict (`ww_monitor.metric.verdict`) or status → what it means."""

_TOLD = {
    "broken_layer": ("{has} no spectrum", "the weights are not finite"),
    "trap": ("{has} correlation traps", "weights grown so large that they act alone, a sign of memorising"),
    "trap_approaching": ("{is} close to a correlation trap", "the largest weight keeps growing"),
    "over_trained": ("{is} over-trained", "alpha is below 2 by more than its error"),
    "under_trained": ("{is} under-trained", "nothing stands out from a random matrix"),
    "mean_shift": ("{has} a large mean weight", "it makes an outlier of its own and does no harm by itself"),
}
"""Rule → what is so, and what it means."""


@dataclass(frozen=True)
class Span:
    """A finding from the snapshot where it began to the one where it ended (`None`: it still holds)."""

    rule: str
    layer: str
    severity: str
    message: str
    begin: int
    end: int | None = None


def spans(run: Recording) -> list[Span]:
    """Every finding once, the most severe first, those of layers before notes of the run, then by their begin.

    Where none has a step or an end they are of analyses by themselves (`ww_monitor.analyze`): each holds until an
    analysis lacks it.
    """
    open_: dict[tuple[str, str], Span] = {}
    done: list[Span] = []
    alone = all(one.step is None and one.state == "begin" for findings in run.findings for one in findings)
    for number, findings in enumerate(run.findings):
        if alone:
            for key in open_.keys() - {(finding.rule, finding.layer) for finding in findings}:
                done.append(replace(open_.pop(key), end=number))
        for finding in findings:
            key = finding.rule, finding.layer
            if finding.state == "end":
                if key in open_:
                    done.append(replace(open_.pop(key), end=number))
            else:
                if not finding.layer and key in open_:  # notes of the run, which never end
                    done.append(open_.pop(key))
                open_.setdefault(key, Span(*key, finding.severity, finding.message, number))
    return sorted([*done, *open_.values()], key=lambda span: (_rank(span.severity), not span.layer, span.begin))


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def judged(verdict: str, alpha: float, sigma: float, traps: float) -> str:
    """A row of the table of layers in words.

    >>> judged("ok", 3.1, 0.2, 0.0), judged("ok", 3.1, 0.2, 2.0)
    ('well trained: alpha is from 2 to 6', 'correlation traps; alpha is from 2 to 6')
    """
    words = VERDICT_WORDS.get(verdict, verdict.replace("_", " "))
    if verdict == "ok" and alpha == alpha:
        if alpha + 2 * sigma < 2:  # as `rules.over_trained`
            words = "very heavy-tailed, over-trained"
        elif alpha < 2:
            words = "alpha is below 2, within its error"
        elif alpha <= 6:
            words = "well trained: " * (not traps >= 0.5) + "alpha is from 2 to 6"
        else:
            words = "weakly trained: alpha is above 6"
    return f"correlation traps; {words}" if traps >= 0.5 and verdict != "degenerate" else words


def lead(runs: Sequence[Recording]) -> list[str]:
    """Three sentences as HTML: what to look at in a run, or in two."""
    if len(runs) == 1:
        run = runs[0]
        first, second = _urgent(run)
        return [_sentence(f"Look first at {first}" if first else _nothing(run)), _sentence(second), _state(run)]
    urgent = [_urgent(run)[0] for run in runs]
    told = [
        f"Run {letter} ({_text(run.name)}): {f'look first at {first}' if first else _nothing(run)}"
        for letter, run, first in zip("AB", runs, urgent, strict=True)
    ]
    return [*map(_sentence, told), _difference(*runs)]


def _text(name: str) -> str:
    return f"<bdi>{escape(name)}</bdi>"


def _sentence(html: str) -> str:
    return html[:1].upper() + html[1:] + "."


def _step(run: Recording, number: int) -> str:
    return f"step {run.steps[number]:,}" if run.has_steps else f"snapshot {run.steps[number] + 1:,}"


def _at(run: Recording, number: int) -> str:
    return f"at {_step(run, number)}" if run.has_steps or len(run.steps) > 1 else "here"


def _urgent(run: Recording) -> tuple[str, str]:
    """What the most severe finding that holds says, and what comes next."""
    groups: dict[str, list[Span]] = {}
    over = []
    for span in spans(run):
        if span.end is None:
            groups.setdefault(span.rule, []).append(span)
        else:
            over.append(span)
    told = [_told(run, group) for group in groups.values()]
    if len(told) > 1:
        rest = f" ({len(told) - 2} more kinds of findings are listed below)" if len(told) > 2 else ""
        return told[0], f"then look at {told[1]}{rest}"
    if over:
        last = max(over, key=lambda span: (-_rank(span.severity), span.end))
        what = escape(last.rule.replace("_", " "))
        gone = f"the finding “{what}” in {_names([last.layer])} was over {_at(run, last.end or 0)}"
    else:
        gone = _nearest_to_a_trap(run)
    return (told[0] if told else ""), gone


def _told(run: Recording, group: Sequence[Span]) -> str:
    layers = [span.layer for span in group]
    begins = {span.begin for span in group}
    since = f"{', the first' if len(begins) > 1 else ''} since {_step(run, min(begins))}" if len(run.steps) > 1 else ""
    if group[0].rule not in _TOLD:
        message = group[0].message.removeprefix(f"{group[0].layer}: ").rstrip(".")
        return f"{_names(layers)}{since}: {_text(message)}"
    many = len(layers) > 1
    what, meaning = _TOLD[group[0].rule]
    verb = what.format(**{"has": ("have" if many else "has"), "is": ("are" if many else "is")})
    if since:
        verb = verb.replace("have ", "have had ", 1) if many else verb.replace("has ", "has had ", 1)
        verb = verb.replace("are ", "have been ", 1) if many else verb.replace("is ", "has been ", 1)
    return f"{_names(layers)}, which {verb}{since}: {meaning}"


def _names(layers: Sequence[str], *, most: int = 3) -> str:
    shown = [_name(layer) for layer in layers[:most]]
    if len(layers) > most:
        shown.append(f"{len(layers) - most:,} more {'layer' if len(layers) == most + 1 else 'layers'}")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _name(layer: str) -> str:
    if not layer:
        return "the model"
    return f'<button type="button" class="layer" data-layer="{escape(layer)}">{_text(layer)}</button>'


def _nothing(run: Recording) -> str:
    return f"nothing needs a look: no finding holds {_at(run, -1)}"


def _nearest_to_a_trap(run: Recording) -> str:
    headroom = last_values(run, "trap_headroom")
    if not np.isfinite(headroom).any():
        return "how near the layers are to a correlation trap is not known here"
    worst = int(np.nanargmax(headroom))
    far = f"its largest weight is at {_figure(headroom[worst])} of the size that makes one"
    return f"nearest to a correlation trap is {_name(list(run.layers)[worst])}: {far}"


def last_values(run: Recording, metric: str, *, until: int | None = None) -> np.ndarray:
    """A metric of every layer where it last occurs, up to a snapshot; NaN where it is not known."""
    found = np.full(len(run.layers), NAN)
    index = run.metrics.get(metric, len(run.metrics))
    for number, rows in run.table.items.items():
        if until is None or number <= until:
            found[rows.rows] = rows.values[:, index] if index < rows.values.shape[1] else NAN
    return found


def compared_at(runs: Sequence[Recording]) -> list[int]:
    """The number of the snapshot at which each run is compared: of the last step that all have kept, or the last."""
    steps = [{run.steps[number]: number for number in run.table.items} for run in runs]
    shared = set.intersection(*map(set, steps))
    return [numbers[max(shared)] if shared else len(run.steps) - 1 for run, numbers in zip(runs, steps, strict=True)]


def _figure(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2g}"


def _state(run: Recording) -> str:
    rows = run.table.items[len(run.steps) - 1]
    if not len(rows.rows):
        return _sentence(f"{_at(run, -1)} there is no layer")
    ok = int((rows.verdicts == run.verdicts.get("ok", -1)).sum())
    noun = "layer" if len(rows.rows) == 1 else "layers"
    told = f"{_at(run, -1)} a power law fits {ok:,} of {len(rows.rows):,} {noun}"
    alpha, first = (run.summaries[at].get("alpha", NAN) for at in (-1, 0))
    if math.isfinite(alpha):
        place = "below 2" if alpha < 2 else "above 6" if alpha > 6 else "as in trained layers (2 to 6)"
        told += f", and mean alpha is {_figure(alpha)}, {place}"
        if len(run.steps) > 1 and math.isfinite(first):
            told += f", after {_figure(first)} {_at(run, 0)}"
    return _sentence(told)


def _difference(a: Recording, b: Recording) -> str:
    at = compared_at([a, b])
    same = a.steps[at[0]] == b.steps[at[1]]
    where = f"at {_step(a, at[0])}, the last that both have," if same else "at the end, for they share no step,"
    parts = []
    for metric, words in (
        ("alpha", "mean alpha"),
        ("trap_headroom", "the largest headroom"),
        ("num_traps", "the number of traps"),
    ):
        one, two = a.summaries[at[0]].get(metric, NAN), b.summaries[at[1]].get(metric, NAN)
        if math.isfinite(one) and math.isfinite(two):
            parts.append(f"{words} is {_figure(one)} in A and {_figure(two)} in B")
    told = "; ".join(parts) or "no model-level value is known in both"
    apart = "" if a.layers.keys() & b.layers.keys() else "; no layer of A has a partner of its name in B"
    return _sentence(f"{where} {told}{apart}")

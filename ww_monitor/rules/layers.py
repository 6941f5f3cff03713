"""Rules on the values of the layers and of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ww_monitor.record import Finding, History, Layer, Severity
from ww_monitor.rules.declare import BROKEN, finding_of, lasting, looks_back
from ww_monitor.spectra.powerlaw import SMALL_SAMPLE

NARROW = 16
"""Short side of a kernel's slices below which a trap informs. Our choice: of those tried, 8 raised false alarms and 32
did not."""


@looks_back()
def broken_layer(history: History) -> Iterator[Finding]:
    """A layer has NaN or infinite weights; a failure of ours or of a solver is none."""
    for layer in history.last.layers:
        if layer.status in BROKEN:
            yield finding_of(history, broken_layer, layer, "critical", f"no spectrum: {layer.status}")


@looks_back()
def trap(history: History, *, at_least: float = 0.5) -> Iterator[Finding]:
    """A correlation trap is present: shuffled copies have outliers, at least `at_least` of them on average.

    An orthogonal layer is left out: the entries of an identity matrix are large because the others are zero. One half:
    the outlier shows in most shuffles (our choice; the Tracy–Widom level already keeps noise out).

    A layer with few eigenvalues (verdict `few_eigenvalues`: a head of ten classes; or fewer than 20 that are not zero:
    a low-rank delta) gets a warning instead of a critical finding, and `stop_on="traps"` may act on it. In four runs of
    anti-grokking, seen at 49 steps each, such a head was the only layer to raise a finding in the three that collapsed
    (test accuracy .876, .878, .857 at best, .686, .661, .619 at the end); it also did in the one that never did (.917,
    .915), before a wide layer of that run. Stopping at its third snapshot in a row would have ended at .869, .852 and
    .857, which saves .18 to .24, and cost .005 in the healthy run; without it nothing would have stopped the three. One
    healthy run measures no rate of false alarms.

    A kernel whose slices have a short side below 16 gets information only, and stops no run: in healthy CNNs with
    slices of 16 × 8 traps lasted in 10 of 48, and nothing was lost (`benchmarks/evidence`, `healthy`).
    """
    for layer in history.last.layers:
        if layer.value("num_traps") >= at_least and layer.verdict != "degenerate":
            few = layer.verdict == "few_eigenvalues" or layer.value("matrix_rank") < SMALL_SAMPLE
            slices, *sides = layer.shape
            narrow = slices > 1 and min(sides) < NARROW
            severity: Severity = "info" if narrow else "warning" if few else "critical"
            yield finding_of(history, trap, layer, severity, _trap_message(layer))


@looks_back()
def harmful_trap(history: History, *, harm: float = 0.001) -> Iterator[Finding]:
    """The outputs depend on a trap: `trap_harm`, where a callback measures it, is at least `harm` in this layer.

    By `ww_monitor.trap_harm` on its own Gaussian inputs, the traps of three nets that collapsed have 0.0013 to 0.0026,
    those of a healthy one 0.0001 and 0.0004: the level was chosen between them. On 500 held-out digits it is no sign of
    a loss: it spoke in all 17 of 510 small healthy nets that had a trap, in 15 of them three times in a row, and in 4
    of 12 larger ones that had one and lost accuracy (`benchmarks/evidence`).
    """
    for layer in history.last.layers:
        if "trap_harm" in layer.metrics and layer.value("trap_harm") >= harm:
            message = (
                f"without its trap outputs differ by a Jensen–Shannon divergence of {layer.value('trap_harm'):.2g}"
            )
            yield finding_of(history, harmful_trap, layer, "info", message)


@looks_back("trap_headroom")
def trap_approaching(history: History, *, headroom: float = 0.8, rise: float = 1.1) -> Iterator[Finding]:
    """The largest entry grows, and has reached `headroom` of the size that makes a trap; over 5 % below.

    Growth counts from the oldest snapshot at hand, and must be to `rise` times: in small matrices a headroom near 1
    is chance, so that a level alone says nothing (16 × 16 Gaussian slices of a 3 × 3 kernel are at 0.9).
    """
    for layer in history.last.layers:
        now = layer.value("trap_headroom")
        # `not >=` takes NaN too; where there is a trap `trap` says so
        if not now >= 0.95 * headroom or layer.value("num_traps") >= 0.5:
            continue
        series = [past.value("trap_headroom") for past in history.of_layer(layer.name)]
        known = [value for value in series if value == value]
        if len(known) > 1 and (now >= headroom or known[-2] >= headroom) and now >= rise * known[0]:
            message = f"the largest entry grew from {known[0]:.2f} to {now:.2f} of the size that makes a trap"
            yield finding_of(history, trap_approaching, layer, "info", message)


@looks_back()
@lasting
def mean_shift(history: History, *, ratio: float = 1.0) -> Iterator[Finding]:
    """The mean of the entries makes an outlier of its own; weightwatcher counts it as a trap, it is none."""
    for layer in history.last.layers:
        now = layer.value("mean_shift")
        if now >= ratio and layer.verdict != "degenerate":
            message = f"the mean of the entries is {now:.2f} times the size that makes an outlier; no harm by itself"
            yield finding_of(history, mean_shift, layer, "info", message)


@looks_back()
@lasting
def over_trained(history: History, *, alpha: float = 2.0, sigmas: float = 2.0) -> Iterator[Finding]:
    """Alpha is below 2 by more than `sigmas` of its own standard error, and the power law fits (verdict `ok`).

    2 is where the theory places the ideal (Martin & Mahoney 2021); two standard errors are our choice. Information
    only: in 24 of 40 runs that kept their accuracy it held three times in a row (`benchmarks/evidence`).
    """
    for layer in history.last.layers:
        value, sigma = (layer.value(name) if layer.verdict == "ok" else float("nan") for name in ("alpha", "sigma"))
        if value + sigmas * sigma < alpha:
            message = f"alpha {value:.2f} ± {sigma:.2f} is below {alpha:g}: very heavy-tailed, over-trained"
            yield finding_of(history, over_trained, layer, "info", message)


@looks_back()
@lasting
def under_trained(
    history: History, *, snapshots: int = 3, alpha: float = 6.0, sigmas: float = 2.0
) -> Iterator[Finding]:
    """The spectrum could not be told from a random matrix's in any of the last `snapshots`; or its tail is light.

    A light tail has alpha above 6, where weightwatcher's users call a layer under-trained (Martin & Mahoney 2021), by
    more than `sigmas` of its own standard error, now, and a power law that fitted in all of them. Information only: the
    first held in 8 of 40 runs that kept their accuracy, in small GPTs to the end (`benchmarks/evidence`).
    """
    if len(history) < snapshots:
        return
    recent = history.snapshots[-snapshots:]
    for layer in history.last.layers:
        verdicts = {row.verdict for snapshot in recent for row in snapshot.named(layer.name)}
        if verdicts == {"random_like"}:
            message = "no eigenvalue rises above the random bulk: under-trained"
            yield finding_of(history, under_trained, layer, "info", message)
        elif verdicts == {"ok"}:
            value, sigma = layer.value("alpha"), layer.value("sigma")
            if alpha < value - sigmas * sigma < math.inf:
                message = f"alpha {value:.2f} ± {sigma:.2f} is above {alpha:g}: a light tail, little is learnt yet"
                yield finding_of(history, under_trained, layer, "info", message)


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


def _trap_message(layer: Layer) -> str:
    count = layer.value("num_traps")
    parts = [f"{count:.3g} correlation trap{'s' * (count != 1)} a shuffle"]
    if layer.value("trap_severity") == layer.value("trap_severity"):  # NaN where it was not chosen
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

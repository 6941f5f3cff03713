"""Rules on what has risen or fallen for many snapshots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ww_monitor.record import Finding, History, Layer
from ww_monitor.rules.declare import finding_of, looks_back


def _points(history: History, layer: Layer, metric: str, least: int, most: int) -> tuple[list[float], list[float]]:
    """log₁₀ of the step, and values, of the last `least` to `most` steps where they are known; else nothing.

    Of twice as many snapshots at most: one without a value, or of a step that was there, hides no trend.
    """
    x: list[float] = []
    y: list[float] = []
    for snapshot in reversed(history.snapshots[-2 * most :]):
        value = next((row.value(metric) for row in snapshot.named(layer.name)), math.nan)
        if (step := snapshot.step or 0) > 0 and math.isfinite(value) and not (x and math.log10(step) >= x[0]):
            x.insert(0, math.log10(step))
            y.insert(0, value)
        if len(x) in (0, most):  # where the last is not known nothing holds
            break
    # of two points half is one, which has no slope
    return (x, y) if len(x) >= max(3, least) and layer.verdict != "thin_slices" else ([], [])


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the straight line through the points (x, y), by least squares."""
    middle = sum(x) / len(x)
    spread = sum((one - middle) ** 2 for one in x)
    return sum((one - middle) * other for one, other in zip(x, y, strict=True)) / spread


def _rise(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope that is sure: less two standard errors, and no more than that of the later half, so that it lasts.

    The error is the slope that a random walk of the steps from residual to residual has by chance, √Σ(Δr)²/(xₙ − x₁):
    what wanders has residuals that hang together, and the error of independent ones would call most excursions a trend.
    """
    slope, half = _slope(x, y), len(x) // 2
    residuals = [other - slope * one for one, other in zip(x, y, strict=True)]
    error = math.hypot(*(after - before for before, after in pairwise(residuals))) / (x[-1] - x[0])
    return min(slope - 2 * error, _slope(x[half:], y[half:]))


@looks_back("stable_rank")
def stable_rank_collapse(
    history: History, *, snapshots: int = 8, exponent: float = 0.5, fall: float = 1.2
) -> Iterator[Finding]:
    """The stable rank of a layer falls against its own past: as step^−`exponent` or faster, and does not slow.

    The slope of log stable rank over log step, less two standard errors, is that much over the last `snapshots` to
    twice as many, and still over the later half; and so much that it is a fall by a factor of `fall` in all. Steps and
    not snapshots count: a cadence at which `fall` takes more than all these snapshots is too fine, else it decides only
    how soon. A low rank by itself is no alarm. Idea: MSign
    (arXiv 2602.01734), where it fell 10,000 steps before a language model's training failed. It tells no failure from
    learning: in four runs of anti-grokking it began in the second layer of the three that were to collapse (step 1.0
    to 1.26 million) and of the one that was not (0.63). The thresholds were chosen on these and on the 62 runs of
    `benchmarks/evidence`, so that neither are a test of them.
    """
    for layer in history.last.layers:
        x, ranks = _points(history, layer, "stable_rank", snapshots, 2 * snapshots)
        if not ranks or min(ranks) <= 0:
            continue
        if _rise(x, [-math.log10(rank) for rank in ranks]) >= max(exponent, math.log10(fall) / (x[-1] - x[0])):
            message = f"the stable rank fell from {ranks[0]:.3g} to {ranks[-1]:.3g} in {len(ranks)} snapshots"
            yield finding_of(history, stable_rank_collapse, layer, "info", message)


@looks_back("log_spectral_norm")
def norm_growth(
    history: History, *, snapshots: int = 12, exponent: float = 0.6, growth: float = 1.1
) -> Iterator[Finding]:
    """The largest eigenvalue grows without end: as step^`exponent` or faster over the last `snapshots`, by `growth`.

    The slope of log λmax over log step, less two standard errors, is that much over all of them, and still over the
    later half; steps and not snapshots count, and late in a run, where any rise is steep in log step, the factor does.
    In four runs of anti-grokking it
    began in fc1 and fc2 of the three that were to collapse, first at a test accuracy of .866, .878 and .854 (.876,
    .878, .857 at best, .686, .661, .619 at the end), and never in the one that kept its accuracy. Number and exponent
    were chosen on these four; it is information, for small GPTs that stay good have it too (`benchmarks/evidence`).
    """
    for layer in history.last.layers:
        x, y = _points(history, layer, "log_spectral_norm", snapshots, snapshots)
        if y and _rise(x, y) >= max(exponent, math.log10(growth) / (x[-1] - x[0])):
            message = f"λmax grew by a factor of {10 ** (y[-1] - y[0]):.3g} in {snapshots} snapshots, and does not slow"
            yield finding_of(history, norm_growth, layer, "info", message)

"""Rules on what has risen or fallen for many snapshots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ww_monitor.record import Finding, History, Layer
from ww_monitor.rules.declare import finding_of, looks_back


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
            yield finding_of(history, stable_rank_collapse, layer, "info", message)


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
            yield finding_of(history, norm_growth, layer, "info", message)

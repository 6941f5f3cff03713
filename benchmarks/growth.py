"""How the time of an analysis grows with the side of a matrix and with the number of layers, and the figure of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import ww_monitor
from benchmarks.table import Bound, claim

PICTURE = Path(__file__).parents[1] / "docs" / "growth.png"

SIDES = (64, 128, 256, 512, 1024, 2048, 4096)
COUNTS = (1, 3, 10, 30, 100, 300, 1000)
LAYER_SIDES = (64, 256)


@dataclass(frozen=True)
class Curve:
    """Seconds by size, medians of rounds."""

    label: str
    sizes: Sequence[int]
    seconds: Sequence[float]

    @property
    def exponent(self) -> float:
        """Slope of log time over log size by least squares, over the upper half of the sizes."""
        half = len(self.sizes) // 2
        return float(np.polyfit(np.log(self.sizes[half:]), np.log(self.seconds[half:]), 1)[0])

    @property
    def slope(self) -> float:
        """Seconds a unit of size, by least squares with an intercept."""
        return float(np.polyfit(self.sizes, self.seconds, 1)[0])


def layers(side: int, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer{i}.weight": torch.randn(side, side, generator=generator) for i in range(count)}


def seconds(weights: dict[str, torch.Tensor], *, rounds: int) -> float:
    each = []
    for _ in range(rounds):
        start = time.perf_counter()
        ww_monitor.analyze(weights)
        each.append(time.perf_counter() - start)
    return statistics.median(each)


def by_side(sides: Sequence[int] = SIDES, *, say: Callable[[str], None]) -> Curve:
    """One square matrix; small ones are repeated more often."""
    ww_monitor.analyze(layers(16, 1))
    found = []
    for side in sides:
        found.append(seconds(layers(side, 1), rounds=1 if side > 2048 else 3 if side > 512 else 15))
        say(f"growth: one {side}²")
    return Curve("one square matrix", sides, found)


def by_count(side: int, counts: Sequence[int] = COUNTS, *, say: Callable[[str], None]) -> Curve:
    """So many square matrices of one side."""
    every = layers(side, max(counts))
    ww_monitor.analyze(layers(16, 1))
    found = []
    for count in counts:
        some = dict(list(every.items())[:count])
        found.append(seconds(some, rounds=1 if count * side >= 1 << 17 else 3))
    say(f"growth: up to {max(counts)} layers {side}²")
    return Curve(f"layers of {side} × {side}", counts, found)


def rows(side: Curve, counts: Sequence[Curve]) -> list[list[str]]:
    """Claims; "near" 3 is 2.5 to 3.25, near 1 is 0.85 to 1.15."""
    found = [
        claim(
            f"exponent of the time in M, M = {side.sizes[len(side.sizes) // 2]} … {side.sizes[-1]} (near 3)",
            f"{side.exponent:.2f}", Bound(2.5, 3.25, unit=""), side.exponent,
        )
    ]  # fmt: skip
    for curve in counts:
        half = curve.sizes[len(curve.sizes) // 2]
        what = f"exponent of the time in the number of {curve.label}, {half} … {curve.sizes[-1]} (near 1)"
        found.append(claim(what, f"{curve.exponent:.2f}", Bound(0.85, 1.15, unit=""), curve.exponent))
    smallest = counts[0]
    cost = 1e3 * smallest.slope
    found.append(claim(f"each further one of the {smallest.label}", f"{cost:.2f} ms", Bound(most=1, unit=" ms"), cost))
    return found


def draw(side: Curve, counts: Sequence[Curve], path: Path = PICTURE) -> None:
    """Two panels with logarithmic axes, each curve with a straight line of the whole exponent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, [side], whole=3, title="one M × M matrix", label="M")
    _panel(right, counts, whole=1, title="many layers", label="layers")
    figure.savefig(path, dpi=120)


def _panel(axes: object, curves: Sequence[Curve], *, whole: int, title: str, label: str) -> None:
    for curve in curves:
        text = f"{curve.label}: exponent {curve.exponent:.2f}"
        axes.loglog(curve.sizes, curve.seconds, "o-", label=text)  # type: ignore[attr-defined]
        guide = curve.seconds[-1] * (np.array(curve.sizes) / curve.sizes[-1]) ** whole
        name = f"slope {whole}" if curve is curves[-1] else None
        axes.loglog(curve.sizes, guide, ":", color="grey", linewidth=1, label=name)  # type: ignore[attr-defined]
    lowest = min(min(curve.seconds) for curve in curves)
    axes.set(  # type: ignore[attr-defined]
        title=f"Time of analyze, {title}", xlabel=label, ylabel="seconds",
        ylim=(lowest / 3, 3 * max(max(curve.seconds) for curve in curves)),
    )  # fmt: skip
    axes.set_xticks(list(curves[0].sizes), [f"{size:,}" for size in curves[0].sizes], minor=False)  # type: ignore[attr-defined]
    axes.minorticks_off()  # type: ignore[attr-defined]
    axes.grid(alpha=0.3)  # type: ignore[attr-defined]
    axes.legend(frameon=False)  # type: ignore[attr-defined]

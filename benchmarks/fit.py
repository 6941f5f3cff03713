"""The power-law fit alone against weightwatcher's, on the same eigenvalues, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import rivals
from benchmarks.table import Bound, Ratio, claim
from ww_monitor.spectra.powerlaw import fit_tail

CASES = (
    ("trained-like", 768, Bound(least=7)),
    ("pure power law", 768, None),
    ("trained-like", 4096, Bound(least=20)),
    ("pure power law", 4096, Bound(least=7)),
    ("trained-like", 15_000, Bound(least=20)),
)

OURS_A_ROUND = 5
"""Runs of ours in a round, of which the median counts: it is the shorter by far."""


def power_law(n: int, *, alpha: float = 3.0, start: float = 1.0) -> np.ndarray:
    """Draws from p(λ) ∝ λ^-alpha for λ ≥ start, ascending."""
    u = np.random.default_rng(0).random(n)
    return np.sort(start * (1 - u) ** (-1 / (alpha - 1)))


def trained_like(n: int, *, tail: float = 0.15) -> np.ndarray:
    """A Marchenko–Pastur bulk (aspect ratio ¼, unit variance) and a power law that begins at its upper edge."""
    low, high = 0.25, 2.25  # (1 ± √¼)²
    grid = np.linspace(low, high, 20_001)[1:-1]
    density = np.sqrt((high - grid) * (grid - low)) / grid
    cumulative = np.cumsum(density) / density.sum()
    in_tail = round(tail * n)
    u = np.random.default_rng(1).random(n - in_tail)
    return np.sort(np.concatenate([np.interp(u, cumulative, grid), power_law(in_tail, start=high)]))


def theirs(eigenvalues: np.ndarray) -> Any:
    """The fit of weightwatcher, called as its analysis does."""
    with rivals.silent():
        from weightwatcher.WW_powerlaw import pl_fit

        return pl_fit(data=eigenvalues, xmax=None, verbose=False, distribution="power_law")


def ours(eigenvalues: torch.Tensor) -> Any:
    return fit_tail(eigenvalues[None])


def rows(*, rounds: int = 3, scale: float = 1.0, say: Callable[[str], None]) -> Iterator[list[str]]:
    """One claim a spectrum; `scale` makes them smaller."""
    for kind, size, bound in CASES:
        n = max(40, round(scale * size))
        values = trained_like(n) if kind == "trained-like" else power_law(n)
        tensor = torch.from_numpy(values)
        ratio, same = compare(values, tensor, rounds)
        say(f"fit of {n} eigenvalues, {kind}")
        held = bound if scale == 1 else None
        yield claim(
            f"power-law fit alone, {n} eigenvalues, {kind}: weightwatcher ÷ ours", f"{ratio}{same}", held, ratio.value
        )


def compare(values: np.ndarray, tensor: torch.Tensor, rounds: int) -> tuple[Ratio, str]:
    """The ratio, and a remark where the two fits do not start at the same eigenvalue."""
    theirs(values[:40])
    ours(tensor[:40])
    over, under = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        their_fit = theirs(values)
        over.append(time.perf_counter() - start)
        each = []
        for _ in range(OURS_A_ROUND):
            start = time.perf_counter()
            our_fit = ours(tensor)
            each.append(time.perf_counter() - start)
        under.append(statistics.median(each))
    same = float(our_fit.xmin) == float(their_fit.xmin)
    return Ratio(over, under), "" if same else ", **another xmin**"

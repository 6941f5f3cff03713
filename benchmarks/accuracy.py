"""Alpha, D and xmin against a float64 singular value decomposition and a scan of every candidate.

On the benchmark's own matrices those are the peer's, whose run has given them anyway; on matrices of condition number
10⁶ the reference is written here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch

import ww_monitor
from benchmarks.table import Bound, claim, number
from ww_monitor.record import Snapshot

ILL_CONDITIONED = 4
CONDITION = 1e6


@dataclass(frozen=True)
class Agreement:
    """Largest relative differences over layers, and how many layers do not start their tail at the same eigenvalue."""

    layers: int
    alpha: float
    ks: float
    other_xmin: int


def with_peer(snapshot: Snapshot, details: Any) -> Agreement:
    """Layer by layer with weightwatcher's table; it solves in float64 on a CPU."""
    theirs = {row["longname"]: row for row in details.to_dict("records")}
    pairs = [(layer, theirs[layer.name]) for layer in snapshot.layers]
    return agreement(
        [(layer.value("alpha"), layer.value("ks"), layer.value("n_tail")) for layer, _ in pairs],
        [(row["alpha"], row["D"], row["num_pl_spikes"]) for _, row in pairs],
    )


def agreement(ours: Iterable[tuple[float, ...]], theirs: Iterable[tuple[float, ...]]) -> Agreement:
    """Of triples alpha, D, size of the tail; NaN on one side is an infinite difference."""
    a, b = np.array(list(ours), dtype=float), np.array(list(theirs), dtype=float)
    difference = np.nan_to_num(np.abs(a - b) / np.abs(b), nan=np.inf)
    return Agreement(
        len(a), float(difference[:, 0].max()), float(difference[:, 1].max()), int((a[:, 2] != b[:, 2]).sum())
    )


def ill_conditioned(side: int, *, seed: int) -> torch.Tensor:
    """A float64 matrix, twice as long as wide, with singular values from 1 to 10⁻⁶ in even steps of the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(2 * side, side, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64)).Q
    return left * torch.logspace(0, -np.log10(CONDITION), side, dtype=torch.float64) @ right.T


def reference(weights: torch.Tensor) -> tuple[float, float, float]:
    """Alpha, D and size of the tail of one matrix, by LAPACK's gesvd and a scan that leaves out no eigenvalue."""
    singular_values = scipy.linalg.svd(weights.double().numpy(), compute_uv=False, lapack_driver="gesvd")
    x = np.sort(singular_values) ** 2
    best = (np.inf, np.nan, np.nan)
    for i in range(len(x) - 1):
        tail = x[i:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        empirical = np.arange(len(tail)) / len(tail)
        distance = np.abs(1 - (tail / tail[0]) ** (1 - alpha) - empirical).max()
        best = min(best, (distance, alpha, float(len(tail))))
    return best[1], best[0], best[2]


def hard(side: int = 256) -> Agreement:
    """The matrices of condition number 10⁶."""
    weights = {f"m{seed}.weight": ill_conditioned(side, seed=seed) for seed in range(ILL_CONDITIONED)}
    layers = ww_monitor.analyze(weights).layers
    return agreement(
        [(layer.value("alpha"), layer.value("ks"), layer.value("n_tail")) for layer in layers],
        [reference(one) for one in weights.values()],
    )


def rows(ordinary: Iterable[Agreement], ill: Agreement) -> list[list[str]]:
    """Claims: the worst over all cases."""
    every = list(ordinary)
    layers = sum(one.layers for one in every)
    found = []
    if every:
        alpha, ks = max(one.alpha for one in every), max(one.ks for one in every)
        others = sum(one.other_xmin for one in every)
        tight, none = Bound(most=1e-9, unit=""), Bound(most=0, unit="")
        found += [
            claim(f"alpha against the float64 SVD, worst of {layers} layers, relative", number(alpha), tight, alpha),
            claim(f"D, worst of {layers} layers, relative", number(ks), tight, ks),
            claim(f"layers of {layers} with another xmin", str(others), none, others),
        ]
    text = f"alpha at a condition number of 10⁶, worst of {ill.layers}, relative"
    found.append(claim(text, number(ill.alpha), Bound(most=1e-6, unit=""), ill.alpha))
    found.append(claim("of them with another xmin", str(ill.other_xmin), Bound(most=0, unit=""), ill.other_xmin))
    return found

"""How far a spectrum has moved since the last snapshot: a sketch of each layer's, and the distance of two sketches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ww_monitor.metric.batch import NAN, Batch
from ww_monitor.metric.table import metric

DRIFT = "spectral_drift"

SKETCH_SIZE = 32
"""Numbers that are kept of a spectrum. Our choice: some 170 bytes a layer in a checkpoint, where a whole spectrum takes
thousands. With as many eigenvalues at most nothing is summed up."""


@metric(
    source="the trace-normalised σ of Zhang et al. 2026, arXiv 2605.26489; total variation is our choice",
    read="10⁻² while the loss falls fast, 10⁻⁴ once it is slow; not known at the first snapshot",
)
def spectral_drift(batch: Batch) -> torch.Tensor:
    """½ Σ |p − p′| of p = σ/Σσ at this snapshot and p′ at the one before, summed up in 32 blocks, the largest σ alone.

    The blocks are `sketch`'s. One analysis alone does not know it: `ww_monitor.Monitor` has the snapshot before.
    """
    return torch.full_like(batch.floor, NAN)


@lru_cache(maxsize=256)
def _ends(n: int) -> tuple[int, ...]:
    """Where the blocks of n values end: each holds one at least, and they widen by one ratio from the first on."""
    low, high, ends = 1.0, float(n), list(range(1, n + 1))
    if n <= SKETCH_SIZE:
        return tuple(ends)
    for _ in range(60):  # halvings, to the last digit of a ratio
        ratio, ends = (low + high) / 2, [0]
        width = 1.0
        for _ in range(SKETCH_SIZE):
            ends.append(ends[-1] + max(1, round(min(width, n))))
            width *= ratio
        low, high = (low, ratio) if ends[-1] >= n else (ratio, high)
    kept = [end for end in ends[1:] if end < n]
    return (*kept[: SKETCH_SIZE - 1], n)


def sketch(eigenvalues: torch.Tensor) -> torch.Tensor:
    """σ/Σσ of each row, from the largest on, summed in at most `SKETCH_SIZE` blocks that widen geometrically.

    Args:
        eigenvalues: `[B, n]` float64, ascending.

    Returns:
        `[B, min(n, SKETCH_SIZE)]` in the values of float32, which a checkpoint holds; NaN for a row without a spectrum.

    >>> sketch(torch.tensor([[1.0, 9.0, 36.0]], dtype=torch.float64))
    tensor([[0.6000, 0.3000, 0.1000]], dtype=torch.float64)
    """
    singular = eigenvalues.flip(1).sqrt()
    share = singular / singular.sum(1, keepdim=True)
    ends = torch.tensor(_ends(eigenvalues.shape[1]), dtype=torch.int64, device=eigenvalues.device) - 1
    until = share.cumsum(1)[:, ends]
    return torch.diff(until, dim=1, prepend=torch.zeros_like(until[:, :1])).float().double()


def distance(before: Sequence[float], now: Sequence[float]) -> float:
    """½ Σ |p − p′| of two sketches; NaN where they are of different spectra's sizes.

    >>> round(distance((0.6, 0.3, 0.1), (0.5, 0.3, 0.2)), 12)
    0.1
    """
    return sum(abs(p - q) for p, q in zip(before, now, strict=True)) / 2 if len(before) == len(now) else NAN

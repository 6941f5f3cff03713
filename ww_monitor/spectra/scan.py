"""The scan over candidate xmin: the candidate with the smallest Kolmogorov–Smirnov distance, always the exact one.

On the host a branch and bound evaluates a few of the n candidates in full, an accelerator all of a batch at once.
"""

from __future__ import annotations

import numpy as np
import torch

_CHUNK, _DEVICE_CHUNK = 1 << 20, 1 << 23
"""Elements of the candidate × eigenvalue array that the host holds at a time (8 MiB in float64: it stays in cache), and
a device (64 MiB), where few large operations cost less than many."""

_ANCHORS = 96
"""Ranks at which every candidate is bounded from below before any is evaluated in full: with 64 of them a fit of 768 or
4096 eigenvalues took 5 to 20 % longer, with 128 one of a pure power law 20 %."""

_ALL_AT_ONCE = 100
"""Eigenvalues up to which every candidate of a batch at once beats a search row by row on the host too."""

_BOUNDS_CHUNK = 1 << 15
"""Elements of the candidate × anchor array held at a time (128 KiB in single precision)."""

_SINGLE_ROUNDING = 5e-7
"""How far single precision may move a deviation, per 1 + (alpha − 1)·max|ln λ/λmax|."""


def best_candidates(
    log_x: torch.Tensor, exponent: torch.Tensor, candidate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmin_i D_i and min_i D_i over the candidates of each row; the first on ties.

    Args:
        log_x: `[B, n]` ln λ, ascending.
        exponent: `[B, n]` alpha_i − 1; any finite number where i is no candidate.
        candidate: `[B, n]` bool; a row without any gets index 0 and infinity.
    """
    if log_x.device.type != "cpu" or log_x.shape[1] <= _ALL_AT_ONCE:
        distances = torch.where(candidate, ks_distances(log_x, exponent), float("inf"))
        smallest, index = distances.min(1)
        return index, smallest
    arrays = zip(log_x.numpy(), exponent.numpy(), candidate.numpy(), strict=True)
    with np.errstate(over="ignore"):  # of candidates that cannot win
        rows = [_branch_and_bound(*row) for row in arrays]
    index = torch.tensor([i for i, _ in rows], dtype=torch.int64, device="cpu")
    return index, torch.tensor([d for _, d in rows], dtype=torch.float64, device="cpu")


def ks_distances(log_x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """D_i = max_{j ≥ i} |m_j/m_i − (λ_j/λ_i)^-(alpha_i − 1)| for every i, m_i = number of points from i on.

    All are `[B, n]`: D, ln λ, ascending, and the exponents alpha − 1.
    """
    batch, n = log_x.shape
    tail_size = torch.arange(n, 0, -1, dtype=log_x.dtype, device=log_x.device)
    distances, stop, chunk = torch.empty_like(log_x), 0, _CHUNK if log_x.device.type == "cpu" else _DEVICE_CHUNK
    while stop < n:  # ranges of candidates whose `[B, candidates, n − start]` array fits the chunk size
        start, stop = stop, min(n, stop + max(1, chunk // (batch * (n - stop))))
        model = (log_x[:, start:stop, None] - log_x[:, None, start:]).mul_(exponent[:, start:stop, None]).exp_()
        deviation = model.sub_(tail_size[start:] / tail_size[start:stop, None]).abs_()
        below = torch.ones(stop - start, n - start, dtype=torch.bool, device=log_x.device).tril(-1)
        distances[:, start:stop] = deviation.masked_fill_(below, 0.0).amax(2)
    return distances


def _branch_and_bound(log_x: np.ndarray, exponent: np.ndarray, candidate: np.ndarray) -> tuple[int, float]:
    """Bound D_i from below at a few ranks, then evaluate in the order of the bounds until none can win.

    The maximum over some j is a bound for the maximum over all, so the first minimiser is exact.
    """
    index = np.flatnonzero(candidate)
    if len(index) == 0:
        return 0, float("inf")
    size = np.arange(len(log_x), 0, -1, dtype=np.float64)
    bound = _bounds(log_x, exponent, size, index)
    best, best_distance = int(index[0]), float("inf")
    for at in np.argsort(bound, kind="stable"):
        if bound[at] > best_distance:  # an equal bound may be an earlier candidate's
            break
        i = int(index[at])
        model = np.exp((log_x[i] - log_x[i:]) * exponent[i])
        model -= size[i:] / size[i]
        distance = max(float(model.max()), -float(model.min()))
        if distance < best_distance or (distance == best_distance and i < best):
            best, best_distance = i, distance
    return best, best_distance


def _bounds(log_x: np.ndarray, exponent: np.ndarray, size: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Largest deviation over the anchors j ≥ i, for each candidate of `index`, less the rounding: in single precision.

    With L = max|ln λ/λmax| and a = alpha − 1, rounding moves the exponent a·(l_j − l_i) by at most 4e-7·a·L, and the
    deviation by no more than that and two units in the last place.
    """
    n = len(log_x)
    anchors = np.unique(np.append(np.arange(0, n, max(1, n // _ANCHORS)), n - 1))
    log_32, exponent_32, size_32 = (values.astype(np.float32) for values in (log_x, exponent, size))
    bound, rows = np.empty(len(index)), max(1, _BOUNDS_CHUNK // len(anchors))
    for start in range(0, len(index), rows):
        part = index[start : start + rows]
        reachable = anchors[np.searchsorted(anchors, part[0]) :]
        # an anchor before its candidate counts nothing: both terms are cut to 1
        deviation = np.minimum(log_32[part, None] - log_32[reachable], np.float32(0))
        deviation *= exponent_32[part, None]
        np.exp(deviation, out=deviation)
        deviation -= np.minimum(size_32[reachable] / size_32[part, None], np.float32(1))
        bound[start : start + rows] = np.maximum(deviation.max(1), -deviation.min(1))
    bound -= _SINGLE_ROUNDING * (1 + exponent[index] * np.abs(log_x[index]).max())
    return bound

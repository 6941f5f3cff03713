"""The scan over candidate xmin: the candidate with the smallest Kolmogorov–Smirnov distance, always the exact one.

Two ways to one answer: on the host a branch and bound that evaluates a few of the n candidates in full, on an
accelerator every candidate of a whole batch at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

_CHUNK = 1 << 20
"""Elements of the candidate × eigenvalue array held at a time (8 MiB in float64: it stays in cache)."""

_ANCHORS = 64
"""Ranks at which every candidate is bounded from below before any is evaluated in full."""

_ROUNDING = 1e-13
"""How far a distance computed at an anchor may lie above the same distance computed in full."""


def best_candidates(
    log_x: torch.Tensor, exponent: torch.Tensor, candidate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmin_i D_i and min_i D_i over the candidates of each row; the first on ties.

    Args:
        log_x: `[B, n]` ln λ, ascending.
        exponent: `[B, n]` alpha_i − 1; any finite number where i is no candidate.
        candidate: `[B, n]` bool; a row without any gets index 0 and infinity.
    """
    if log_x.device.type != "cpu":
        distances = torch.where(candidate, ks_distances(log_x, exponent), float("inf"))
        smallest, index = distances.min(1)
        return index, smallest
    rows = [_branch_and_bound(*row) for row in zip(log_x.numpy(), exponent.numpy(), candidate.numpy(), strict=True)]
    return torch.tensor([i for i, _ in rows]), torch.tensor([d for _, d in rows], dtype=torch.float64)


def ks_distances(log_x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """D_i = max_{j ≥ i} |m_j/m_i − (λ_j/λ_i)^-(alpha_i − 1)| for every i, m_i = number of points from i on.

    Args:
        log_x: `[B, n]` ln λ, ascending.
        exponent: `[B, n]` alpha_i − 1.

    Returns:
        `[B, n]`.
    """
    batch, n = log_x.shape
    tail_size = torch.arange(n, 0, -1, dtype=log_x.dtype, device=log_x.device)
    distances = torch.empty_like(log_x)
    for start, stop in _candidate_chunks(batch, n):
        model = (log_x[:, start:stop, None] - log_x[:, None, start:]).mul_(exponent[:, start:stop, None]).exp_()
        deviation = model.sub_(tail_size[start:] / tail_size[start:stop, None]).abs_()
        below = torch.ones(stop - start, n - start, dtype=torch.bool, device=log_x.device).tril(-1)
        distances[:, start:stop] = deviation.masked_fill_(below, 0.0).amax(2)
    return distances


def _candidate_chunks(batch: int, n: int) -> Iterator[tuple[int, int]]:
    """Ranges of candidates whose `[B, candidates, n − start]` array fits the chunk size."""
    start = 0
    while start < n:
        stop = min(n, start + max(1, _CHUNK // (batch * (n - start))))
        yield start, stop
        start = stop


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
        if bound[at] > best_distance:
            break
        i = int(index[at])
        model = np.exp((log_x[i] - log_x[i:]) * exponent[i])
        model -= size[i:] / size[i]
        distance = max(float(model.max()), -float(model.min()))
        if distance < best_distance or (distance == best_distance and i < best):
            best, best_distance = i, distance
    return best, best_distance


def _bounds(log_x: np.ndarray, exponent: np.ndarray, size: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Largest deviation over the anchors j ≥ i, for each candidate of `index`, less the rounding."""
    n = len(log_x)
    anchors = np.unique(np.append(np.arange(0, n, max(1, n // _ANCHORS)), n - 1))
    bound = np.empty(len(index))
    for start in range(0, len(index), max(1, _CHUNK // 4 // len(anchors))):
        part = index[start : start + max(1, _CHUNK // 4 // len(anchors))]
        reachable = anchors[np.searchsorted(anchors, part[0]) :]
        gap = np.minimum(log_x[part, None] - log_x[reachable], 0.0)
        deviation = np.exp(gap * exponent[part, None])
        deviation -= np.minimum(size[reachable] / size[part, None], 1.0)
        bound[start : start + len(part)] = np.maximum(deviation.max(1), -deviation.min(1))
    return bound - _ROUNDING

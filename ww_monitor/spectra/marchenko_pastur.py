"""Eigenvalues → the random bulk: its variance and edges, the Tracy–Widom law of its largest eigenvalue, and spikes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.special import airy

SIGNIFICANCE = 1e-3
"""Probability of one false spike, or one false trap a replica, in a purely random matrix. Our choice: a network
has tens of matrices and is looked at hundreds of times, so the customary 1 % would cry wolf every day."""


@dataclass(frozen=True)
class Bulk:
    """The random part of B spectra, each field `[B]`.

    Attributes:
        variance: Variance of the entries of the random part, in the scale of the eigenvalues.
        edge_min: Lower Marchenko–Pastur edge, variance · (√N − √M)²; `edge_max` · (√N + √M)².
        threshold: Eigenvalue above which one counts as a spike; `num_spikes` of them, int64.
        p_value: Probability that the random part alone has an eigenvalue as large as λmax.
    """

    variance: torch.Tensor
    edge_min: torch.Tensor
    edge_max: torch.Tensor
    threshold: torch.Tensor
    num_spikes: torch.Tensor
    p_value: torch.Tensor


def bulk(
    eigenvalues: torch.Tensor,
    *,
    long_side: torch.Tensor | float,
    short_side: torch.Tensor | float,
    slices: int = 1,
    significance: float = SIGNIFICANCE,
) -> Bulk:
    """σ²_k = Σ_{j ≤ n−k} λ_j / (slices · (N − k/slices)(M − k/slices)), with k = the number of spikes.

    k is the largest number of eigenvalues, at most half of them, of which the last still exceeds the Tracy–Widom
    quantile of the matrix that remains without them. Taking the largest k rather than the first test that does not
    reject (Kritchman & Nadler 2009, IEEE Trans. Signal Processing 57) keeps many spikes from hiding one another:
    the variance is unharmed while fewer than half of the eigenvalues are spikes, as with a median.

    Args:
        eigenvalues: `[B, n]` float64, ascending, of WᵀW (not divided by N), pooled over the slices, any common scale.
        long_side: N of a slice, rows and columns of zeros not counted; scalar or `[B]`.
        short_side: M of a slice, likewise.
        slices: Number of matrices whose eigenvalues are pooled; the level is shared among them (Šidák).
        significance: Probability of a false spike in the whole row.

    Returns:
        NaN (and no spikes) for a row that holds NaN or is all zero.

    >>> noise = torch.randn(300, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> fit = bulk(torch.linalg.svdvals(noise).square().flip(0)[None], long_side=300, short_side=100)
    >>> fit.num_spikes.item(), round(fit.variance.item(), 2)
    (0, 1.01)
    """
    n = eigenvalues.shape[1]
    removed = torch.arange(n // 2 + 1, dtype=torch.float64, device=eigenvalues.device)
    n_side, m_side = (
        torch.as_tensor(side, dtype=torch.float64, device=eigenvalues.device).reshape(-1, 1)
        for side in (long_side, short_side)
    )
    # fewer rows or columns may be alive than are removed here; `is_spike` leaves those tests out
    rows, columns = ((side - removed / slices).clamp(min=0.5) for side in (n_side, m_side))
    remaining_sum = eigenvalues.cumsum(1).flip(1)[:, : len(removed)]
    variance = remaining_sum / (slices * rows * columns)
    centre, scale = johnstone(rows, columns)
    quantile = tracy_widom_quantile(per_matrix(significance, slices))
    threshold = variance * (centre + quantile * scale)
    largest_remaining = eigenvalues.flip(1)[:, : len(removed)]
    is_spike = (largest_remaining > threshold) & (removed <= slices * m_side / 2)
    num_spikes = torch.where(is_spike, removed + 1, 0.0).amax(1).clamp(max=len(removed) - 1).long()
    fields = (field.expand_as(variance) for field in (variance, centre, scale, threshold))
    sigma_sq, centre, scale, threshold = (field.gather(1, num_spikes[:, None])[:, 0] for field in fields)
    deviate = (eigenvalues[:, -1] / sigma_sq - centre) / scale
    p_value = -torch.expm1(slices * torch.log1p(-tracy_widom_sf(deviate)))
    known, root_n, root_m = sigma_sq > 0, n_side.sqrt()[:, 0], m_side.sqrt()[:, 0]
    edges = sigma_sq * (root_n - root_m).square(), sigma_sq * (root_n + root_m).square()
    num_spikes, p_value = torch.where(known, num_spikes, 0), torch.where(known, p_value, float("nan"))
    return Bulk(sigma_sq, *edges, threshold, num_spikes, p_value)


def per_matrix(significance: float, matrices: int) -> float:
    """The level of one test such that `matrices` independent ones have the given level together (Šidák 1967)."""
    return float(-np.expm1(np.log1p(-significance) / matrices))


def johnstone(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre (√(N−1) + √M)² and scale (√(N−1) + √M)(1/√(N−1) + 1/√M)^⅓ of λmax of WᵀW with unit-variance entries.

    Source: Johnstone 2001 (Annals of Statistics 29, theorem 1.1). Real Gaussian entries; the law is approached from
    M ≈ 5 on, and universal for entries with four moments.

    `rows` are N, of any shape, `columns` M ≤ N.
    """
    root_n, root_m = (rows - 1).clamp(min=0.5).sqrt(), columns.clamp(min=0.5).sqrt()
    return (root_n + root_m).square(), (root_n + root_m) * (1 / root_n + 1 / root_m) ** (1 / 3)


_GRID_LOW, _GRID_HIGH, _GRID_STEP = -8.0, 60.0, 0.0025


def tracy_widom_sf(s: torch.Tensor) -> torch.Tensor:
    """P(TW₁ > s), the upper tail of the Tracy–Widom law for real matrices, to 1e-6 relative.

    Interpolated in log P from `tracy_widom_sf_exact`: by a cubic spline over steps of 0.2 to 1, then linearly over
    0.0025; 1 below s = −8 and constant (4e-137) above s = 60. NaN stays NaN.

    >>> [round(p, 4) for p in tracy_widom_sf(torch.tensor([0.9793, 2.0234, 3.2724])).tolist()]
    [0.05, 0.01, 0.001]
    """
    log_sf = _log_sf(s.device)
    position = ((s.double() - _GRID_LOW) / _GRID_STEP).clamp(0, len(log_sf) - 1.001)  # the last has a neighbour
    left = torch.nan_to_num(position).long()  # NaN is no place, and stays in `fraction`
    fraction = position - left
    return torch.exp(log_sf[left] * (1 - fraction) + log_sf[left + 1] * fraction)


@lru_cache(maxsize=256)
def tracy_widom_quantile(p: float) -> float:
    """The s with P(TW₁ > s) = p, for 1e-136 < p < 1.

    >>> round(tracy_widom_quantile(0.01), 3)
    2.023
    """
    log_sf = _log_sf(torch.device("cpu"))
    target = np.log(p) if p > 0 else -np.inf
    if not float(log_sf[-1]) < target < float(log_sf[0]):
        raise ValueError(f"tracy_widom_quantile: p must be between 1e-136 and 1; got {p!r}")

    def excess(s: float) -> float:
        return float(tracy_widom_sf(torch.tensor(s, dtype=torch.float64, device="cpu")).log()) - target

    return float(brentq(excess, -8.0, 60.0))


@lru_cache
def _log_sf(device: torch.device) -> torch.Tensor:
    """The grid, kept where it is needed: a device would wait for a copy at every call."""
    if device.type != "cpu":
        return _log_sf(torch.device("cpu")).to(device)
    ranges = ((_GRID_LOW, 8.0, 0.2), (8.0, 20.0, 0.5), (20.0, _GRID_HIGH + 1.5, 1.0))
    knots = np.concatenate([np.arange(*part) for part in ranges])
    spline = CubicSpline(knots, np.log(tracy_widom_sf_exact(knots, nodes=32)))
    return torch.from_numpy(spline(np.arange(_GRID_LOW, _GRID_HIGH + _GRID_STEP, _GRID_STEP)))


def tracy_widom_sf_exact(s: np.ndarray, *, nodes: int = 64) -> np.ndarray:
    """P(TW₁ > s) = 1 − det(I − V_s), V_s(x, y) = ½ Ai((x + y)/2) on L²(s, ∞).

    Source: Ferrari & Spohn 2005 (J. Phys. A 38, L557) for the determinant; Bornemann 2010 (Math. Comp. 79) for its
    evaluation by Gauss–Legendre quadrature, which converges exponentially. Written as −expm1(Σ log1p(−μ)) over the
    eigenvalues of V_s, so that small tails keep their relative accuracy (1e-12 for s ≤ 60 with 32 nodes).

    Args:
        s: `[K]` points.
        nodes: Quadrature nodes on (s, max(16, s + 16)).
    """
    node, weight = np.polynomial.legendre.leggauss(nodes)
    result = np.empty(len(s))
    for start in range(0, len(s), 1024):
        part = np.asarray(s[start : start + 1024], dtype=float)
        half = (np.maximum(16.0, part + 16.0) - part)[:, None] / 2
        x = part[:, None] + half * (node + 1)
        root_weight = np.sqrt(half * weight)
        kernel = 0.5 * airy((x[:, :, None] + x[:, None, :]) / 2)[0]
        modes = np.linalg.eigvalsh(root_weight[:, :, None] * kernel * root_weight[:, None, :])
        # below −15 or so the quadrature takes the largest mode beyond 1
        result[start : start + 1024] = -np.expm1(np.log1p(-np.minimum(modes, 1 - 1e-16)).sum(1))
    return result

"""What weightwatcher 0.7.7 defines in its own way and the default preset does differently, formula by formula.

Used under `preset="weightwatcher"` only, so that results stay comparable with published ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import fmin

from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.shuffle import permutation

EIGENVALUE_FLOOR = 1e-5
"""Absolute; eigenvalues at or below it take no part in the power-law fit."""

_BANDWIDTH, _GRID_POINTS, _LEAST_DENSITY = 0.1, 1000, 0.01


@dataclass(frozen=True)
class DensityFit:
    """A Marchenko–Pastur law fitted to a kernel density; its edges are in the scale of the eigenvalues.

    Attributes:
        sigma: Fitted standard deviation, of entries rescaled (by `w_scale`) so that the mean eigenvalue is 1.
        num_spikes: Eigenvalues above the upper edge plus its Tracy–Widom slack.
        mp_softrank: Upper edge over λmax.
    """

    sigma: float
    bulk_min: float
    bulk_max: float
    num_spikes: int
    mp_softrank: float
    w_scale: float


def fit_density(eigenvalues: np.ndarray, *, long_side: int, short_side: int) -> DensityFit | None:
    """argmin_σ Σ_g (f_MP(g; σ) − d(g))² over a grid of 195 σ, polished by Nelder–Mead.

    d is a triangular kernel density of half-width 0.1 at 1,000 points of the rescaled eigenvalues (their square
    roots and a quarter circle of fixed radius 2 where N = M), kept where it exceeds 0.01. It does not depend on σ
    and is computed once, in closed form. Source: weightwatcher 0.7.7, whose result it gives to 1e-13.

    Args:
        eigenvalues: `[n]` ascending.
        long_side: N.
        short_side: M.

    Returns:
        The fit, or `None` where nothing can be fitted.
    """
    total = float(eigenvalues.sum())
    if not (np.isfinite(total) and total > 0):
        return None
    ratio, w_sq = long_side / short_side, len(eigenvalues) / total
    x = w_sq * eigenvalues
    points = np.sqrt(x) if ratio == 1 else x
    grid = np.linspace(0, points.max() + 0.5, _GRID_POINTS)
    density = triangular_density(points, grid, _BANDWIDTH)
    kept = density > _LEAST_DENSITY
    if not kept.any():
        return None
    first = math.sqrt(x.max()) / (1 + ratio**-0.5)
    candidates = np.arange(0.05 * first, 2.0 * first, 0.01 * first)
    one_cost = partial(_cost, grid=grid[kept], density=density[kept], ratio=ratio)
    best = candidates[int(np.argmin(one_cost(candidates)))]

    def cost_of(s: np.ndarray) -> float:
        return float(one_cost(np.ravel(s)[:1])[0])

    sigma = float(fmin(cost_of, [best], disp=False)[0])
    upper, lower = (sigma * (1 + ratio**-0.5)) ** 2, (sigma * (1 - ratio**-0.5)) ** 2
    slack = math.sqrt(ratio**-0.5 * upper ** (2 / 3) * short_side ** (-2 / 3))
    return DensityFit(
        sigma, lower / w_sq, upper / w_sq, int((x > upper + slack).sum()), upper / float(x.max()), math.sqrt(w_sq)
    )


def triangular_density(points: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """d(g) = Σ_i max(0, 1 − |x_i − g|/h)/(n h), h the width, for `[n]` ascending x and `[G]` g, from prefix sums."""
    prefix = np.concatenate([[0.0], np.cumsum(points)])
    low, middle, high = (np.searchsorted(points, edge) for edge in (grid - width, grid, grid + width))
    left = (middle - low) - ((middle - low) * grid - (prefix[middle] - prefix[low])) / width
    right = (high - middle) - ((prefix[high] - prefix[middle]) - (high - middle) * grid) / width
    return np.asarray((left + right) / (len(points) * width))


def _cost(sigma: np.ndarray, grid: np.ndarray, density: np.ndarray, ratio: float) -> np.ndarray:
    """Σ_g (f(g; σ) − d(g))² for each σ: f is the quarter circle where N = M, else the Marchenko–Pastur law."""
    s = sigma[:, None]
    low, high = (s * (1 - ratio**-0.5)) ** 2, (s * (1 + ratio**-0.5)) ** 2
    mode, top = grid[np.argmax(density)], grid.max()
    outside = ((high < mode) | (high > top) | (low > mode))[:, 0]
    with np.errstate(all="ignore"):  # beyond its edges the law is the root of a negative number, which counts as 0
        if ratio == 1:
            law = np.sqrt(4 - grid**2) / (np.pi * s * s)
        else:
            law = ratio / (2 * np.pi * s * s * grid) * np.sqrt((high - grid) * (grid - low))
    costs = ((np.nan_to_num(law) - density) ** 2).sum(1)
    return np.where(outside & (ratio != 1), 1e6 * len(grid), costs)  # the tool's penalty: 10⁶ a point


@dataclass(frozen=True)
class Randomized:
    """Ascending spectra of shuffled slices: over five replicas (one from 100 eigenvalues on), and of a further one."""

    pooled: np.ndarray
    single: np.ndarray


def randomize(slices: torch.Tensor, *, seed: int) -> Randomized:
    """Eigenvalues of slices `[R, N, M]` with their entries shuffled, by a private generator and not numpy's global."""
    replicas = 5 if slices.shape[0] * min(slices.shape[1:]) < 100 else 1

    def draw(replica: int) -> np.ndarray:
        flat = slices.double().flatten(1)
        orders = [permutation(flat.shape[1], seed=seed + k, replica=replica).to(flat.device) for k in range(len(flat))]
        mixed = torch.stack([row[order] for row, order in zip(flat, orders, strict=True)])
        return np.asarray(eigenvalues(mixed.view(slices.shape)).values.flatten().cpu().numpy())

    pooled = np.sort(np.concatenate([draw(replica) for replica in range(replicas)]))
    return Randomized(pooled, np.sort(draw(replicas)))


def spectral_distance(first: np.ndarray, second: np.ndarray) -> float:
    """√((KL(p‖m) + KL(q‖m))/2) with p, q the sorted eigenvalues over their sums and m their mean: `rand_distance`.

    Not a distance between densities: the j-th smallest eigenvalues are compared as if they were probabilities of
    one category. The radicand is clamped at 0, where weightwatcher gives NaN for equal spectra. Both are `[n]`.
    """
    with np.errstate(all="ignore"):
        p, q = first / first.sum(), second / second.sum()
        m = (p + q) / 2
        divergence = np.where(p > 0, p * np.log(p / m), 0.0).sum() + np.where(q > 0, q * np.log(q / m), 0.0).sum()
    return float(np.sqrt(np.maximum(divergence / 2, 0.0)))

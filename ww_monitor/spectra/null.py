"""What a random matrix of the same shape would show: the null band of alpha, ks and λmax."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal

from ww_monitor.spectra.powerlaw import fit_tail

DRAWS = 40
"""Random spectra behind a band. Our choice: enough for the 5 and 95 % points, and cheap (O(M²) each)."""


@dataclass(frozen=True)
class NullBand:
    """5, 50 and 95 % points of alpha, of the Kolmogorov–Smirnov distance and of λmax for entries of unit variance."""

    alpha: tuple[float, float, float]
    ks: tuple[float, float, float]
    lambda_max: tuple[float, float, float]


@lru_cache(maxsize=512)
def null_band(long_side: int, short_side: int, slices: int = 1, *, draws: int = DRAWS, seed: int = 0) -> NullBand:
    """Quantiles over Gaussian matrices of one shape, computed once a shape.

    Args:
        long_side: N.
        short_side: M ≤ N.
        slices: Number of matrices whose eigenvalues are pooled.
        draws: Number of random spectra behind the band.
        seed: Seed of a private generator.
    """
    # a stream for each shape, so that no band depends on which were asked for before
    generator = np.random.Generator(np.random.PCG64([seed, long_side, short_side, slices]))
    each = [[wishart_eigenvalues(long_side, short_side, generator) for _ in range(slices)] for _ in range(draws)]
    spectra = torch.from_numpy(np.sort(np.array(each).reshape(draws, -1)))
    fit = fit_tail(spectra)

    def points(values: torch.Tensor) -> tuple[float, float, float]:
        known = values[~torch.isnan(values)].numpy()
        low, middle, high = np.quantile(known, [0.05, 0.5, 0.95]).tolist() if len(known) else [float("nan")] * 3
        return low, middle, high

    return NullBand(points(fit.alpha), points(fit.ks), points(spectra[:, -1]))


def wishart_eigenvalues(long_side: int, short_side: int, generator: np.random.Generator) -> np.ndarray:
    """Eigenvalues of WᵀW for W with N × M standard normal entries, drawn in O(M²) without W.

    They are the squared singular values of the M × M lower bidiagonal matrix with χ_N, χ_{N−1}, …, χ_{N−M+1} on the
    diagonal and χ_{M−1}, …, χ_1 below it. Source: Dumitriu & Edelman 2002 (J. Math. Phys. 43), β = 1.
    """
    diagonal = np.sqrt(generator.chisquare(long_side - np.arange(short_side)))
    below = np.sqrt(generator.chisquare(np.arange(short_side - 1, 0, -1))) if short_side > 1 else np.empty(0)
    square = diagonal**2
    square[1:] += below**2
    return np.maximum(np.asarray(eigvalsh_tridiagonal(square, diagonal[:-1] * below)), 0.0)

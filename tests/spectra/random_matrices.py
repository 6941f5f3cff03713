"""Random matrices by which the detectors are judged, drawn from generators of their own."""

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

SHAPES = [
    (64, 64),
    (128, 64),
    (128, 128),
    (200, 100),
    (256, 32),
    (256, 256),
    (512, 256),
    (1000, 100),
    (1024, 512),
    (2048, 512),
]


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pareto(alpha, size, *, draws=1, seed=0):
    """`[draws, size]` ascending draws of a density ∝ x^-alpha on x ≥ 1."""
    uniform = torch.rand(draws, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - uniform).pow(-1 / (alpha - 1)).sort(1).values


def wishart_eigenvalues(long_side, short_side, *, draws, seed):
    """Eigenvalues `[draws, M]` of WᵀW for N × M standard normal W, exact in law and O(M²) each.

    W has the singular values of a lower bidiagonal matrix with independent χ entries, N, …, N − M + 1 degrees of
    freedom on the diagonal and M − 1, …, 1 below it (Bartlett 1933; Dumitriu & Edelman 2002, J. Math. Phys. 43).
    """
    rng = np.random.default_rng(seed)
    spectra = np.empty((draws, short_side))
    for row in spectra:
        on_diagonal = np.sqrt(rng.chisquare(long_side - np.arange(short_side)))
        below = np.sqrt(rng.chisquare(np.arange(short_side - 1, 0, -1)))
        diagonal = on_diagonal**2
        diagonal[1:] += below**2
        row[:] = eigh_tridiagonal(diagonal, on_diagonal[:-1] * below, eigvals_only=True, lapack_driver="sterf")
    return torch.from_numpy(spectra.clip(min=0.0))


def with_spikes(long_side, short_side, strengths, *, seed):
    """Standard normal N × M plus Σ θ u vᵀ with random orthonormal u and v."""
    count = len(strengths)
    left = torch.linalg.qr(normal(long_side, count, seed=seed + 1)).Q
    right = torch.linalg.qr(normal(short_side, count, seed=seed + 2)).Q
    return normal(long_side, short_side, seed=seed) + (left * torch.as_tensor(strengths, dtype=left.dtype)) @ right.mT


def outlier(theta, long_side, short_side):
    """Where a spike θ > (NM)^¼ puts its eigenvalue, (θ² + N)(θ² + M)/θ² (Benaych-Georges & Nadakuditi 2012)."""
    return (theta**2 + long_side) * (theta**2 + short_side) / theta**2

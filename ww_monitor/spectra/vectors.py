"""How spread out the singular vectors of a matrix are: entropy, localization and participation of each."""

from __future__ import annotations

import numpy as np
import torch

from ww_monitor.spectra.eigenvalues import tall_of

VECTOR_METRICS = ("vec_entropy", "loc_ratio", "part_ratio")
"""Rows of what `vector_metrics` returns."""

_BINS, _EPSILON = 100, 1e-10


def vector_metrics(slices: torch.Tensor) -> np.ndarray:
    """Entropy of the histogram of |v_i|, ‖v‖₁/‖v‖_∞ and ‖v‖₂/‖v‖₄ of every singular vector v on the short side.

    The entropy is −Σ p ln p over the densities of a histogram of |v| − mean|v| in 100 bins, each plus 1e-10 and
    normalised. Large values mean a vector spread over all entries, as a random one is. Source: weightwatcher 0.7.7
    (`vectors=True`); Martin & Mahoney 2021 (JMLR 22) for the ratios.

    Args:
        slices: `[R, N, M]` of one layer, finite.

    Returns:
        `[3, R, M]`, the vectors in the order of ascending eigenvalues.
    """
    tall = tall_of(slices.double())
    vectors = np.abs(np.linalg.eigh((tall.mT @ tall).cpu().numpy())[1])
    entropy = [[_entropy(vector) for vector in vectors_of_slice.T] for vectors_of_slice in vectors]
    localization = vectors.sum(1) / vectors.max(1)
    participation = np.sqrt((vectors**2).sum(1)) / (vectors**4).sum(1) ** 0.25
    return np.stack([np.array(entropy), localization, participation])


def _entropy(magnitude: np.ndarray) -> float:
    height = np.histogram(magnitude - magnitude.mean(), bins=_BINS, density=True)[0] + _EPSILON
    p = height / height.sum()
    return float(-(p * np.log(p)).sum())

"""The effective correlation space of SETOL: the part of a spectrum whose volume is conserved."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CorrelationSpace:
    """How many eigenvalues it has, its smallest one, and that after rescaling to a mean of 1: `[B]`, NaN if unknown."""

    size: torch.Tensor
    boundary: torch.Tensor
    rescaled_boundary: torch.Tensor


def correlation_space(eigenvalues: torch.Tensor) -> CorrelationSpace:
    """Size = first k with Σ_{j > n−k} ln(λ_j/mean λ) < 0: the k largest rescaled eigenvalues have a product below 1.

    The eigenvalue that takes the product below 1 belongs to the space, as in weightwatcher 0.7.7 (`detX`); at its ideal
    the power-law tail and this space coincide. Summed in the log domain: a product over- and underflows from some 4,000
    on. Source: Martin & Hinrichs 2025 (SETOL, arXiv 2507.17912), the exact renormalisation group condition.

    Args:
        eigenvalues: `[B, n]` float64, ascending.

    >>> space = correlation_space(torch.tensor([[0.01, 0.2, 1.0, 2.0, 4.0]], dtype=torch.float64))
    >>> space.size.item(), space.boundary.item()
    (4.0, 0.2)
    """
    n = eigenvalues.shape[1]
    rescaled = eigenvalues * (n / eigenvalues.sum(1, keepdim=True))
    log_volume = rescaled.log().flip(1).cumsum(1)
    # as weightwatcher's, the scan ends before the smallest: then all count, and the second smallest is the boundary
    below = log_volume[:, : max(n - 1, 1)] < 0
    count = torch.where(below.any(1), below.double().argmax(1) + 1, n)
    index = torch.where(below.any(1), n - count, min(1, n - 1))
    varied = eigenvalues[:, 0] < eigenvalues[:, -1]  # equal ones have no space there
    count, index = count * varied, (index * varied)[:, None]
    found = (count.double(), eigenvalues.gather(1, index)[:, 0], rescaled.gather(1, index)[:, 0])
    known = torch.isfinite(rescaled[:, -1])
    return CorrelationSpace(*(torch.where(known, value, float("nan")) for value in found))

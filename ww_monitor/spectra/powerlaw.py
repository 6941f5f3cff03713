"""Eigenvalues → power-law tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ww_monitor.spectra.scan import best_candidates
from ww_monitor.spectra.status import Rows, Status

SMALL_SAMPLE, SMALL_SAMPLE_TAIL = 20, 8
"""Fewer eigenvalues than this get the bias-corrected exponent and a tail of at least so many (weightwatcher 0.7.7)."""


@dataclass(frozen=True)
class TailFit(Rows):
    """Power-law tails of B spectra, each field `[B]`; NaN (`n_tail` 0) where `status` is not OK.

    Attributes:
        alpha: Exponent of the density p(λ) ∝ λ^-alpha for λ ≥ xmin.
        xmin: Start of the tail, an eigenvalue.
        ks: Kolmogorov–Smirnov distance between the tail and the fit.
        sigma: Standard error of alpha, (alpha − 1)/√n_tail.
        n_tail: Number of eigenvalues in the tail.
        num_fitted: Number of eigenvalues above the floor, from which the tail was chosen.
        status: int64 of `Status`.
    """

    alpha: torch.Tensor
    xmin: torch.Tensor
    ks: torch.Tensor
    sigma: torch.Tensor
    n_tail: torch.Tensor
    num_fitted: torch.Tensor
    status: torch.Tensor


def fit_tail(eigenvalues: torch.Tensor, *, floor: torch.Tensor | float = 0.0, allow_short: bool = False) -> TailFit:
    """Alpha = 1 + n/Σ ln(λ_j/xmin) over λ_j ≥ xmin, with the xmin that minimises the Kolmogorov–Smirnov distance.

    Every eigenvalue but the largest is a candidate xmin, ties included; the first minimiser wins. The empirical
    distribution counts points strictly below, as in plfit and weightwatcher. Spectra of fewer than 20 eigenvalues
    use the bias-corrected alpha = 1 + (n − 1)/Σ and tails of at least 8. Source: Clauset, Shalizi & Newman 2009
    (SIAM Review 51, eqs. 3.1, 3.9); the small-sample rule is weightwatcher 0.7.7's.

    Args:
        eigenvalues: `[B, n]` float64, ascending; a row with NaN is not fitted.
        floor: Scalar or `[B]`; eigenvalues at or below it are numerically zero and take no part.
        allow_short: Fit a sample of 2 to 7 eigenvalues as a whole, as weightwatcher does, instead of giving
            `few_eigenvalues`.

    >>> x = (1 - (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000) ** (-1 / (3 - 1))   # quantiles of x^-3
    >>> round(fit_tail(x[None]).alpha.item(), 2)
    3.0
    """
    batch, n = eigenvalues.shape
    known, log_x, log_sum = tail_exponents(eigenvalues, floor)
    num_fitted = known.sum(1)
    tail_size = torch.arange(n, 0, -1, dtype=torch.float64, device=eigenvalues.device)

    small = (num_fitted < SMALL_SAMPLE)[:, None]
    alpha = 1 + (tail_size - small.double()) / log_sum
    shortest = torch.where(small, SMALL_SAMPLE_TAIL, 2)
    if allow_short:
        shortest = shortest.minimum(num_fitted[:, None].clamp(min=2))
    # 1e-12 is weightwatcher's: a tail of equal eigenvalues has a sum of 0 but for rounding
    candidate = known & (tail_size >= shortest) & (log_sum > 1e-12) & torch.isfinite(alpha)

    best, ks = best_candidates(log_x, torch.where(candidate, alpha - 1, 0.0), candidate)

    fields = (alpha, tail_size.expand(batch, n), eigenvalues)
    best_alpha, n_tail, xmin = (field.gather(1, best[:, None])[:, 0] for field in fields)
    found = candidate.any(1)
    status = torch.where(num_fitted >= shortest[:, 0], int(Status.DEGENERATE), int(Status.FEW_EIGENVALUES))
    status = torch.where(found, int(Status.OK), status)
    best_alpha, xmin, ks = (torch.where(found, value, float("nan")) for value in (best_alpha, xmin, ks))
    n_tail = torch.where(found, n_tail, 0.0)
    return TailFit(best_alpha, xmin, ks, (best_alpha - 1) / n_tail.sqrt(), n_tail, num_fitted, status)


def tail_exponents(
    eigenvalues: torch.Tensor, floor: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return λ > floor, ln(λ/λmax) and Σ_{j ≥ i} ln(λ_j/λ_i) for every i, each `[B, n]`; 0 logs below the floor."""
    known = eigenvalues > torch.as_tensor(floor, dtype=torch.float64, device=eigenvalues.device).reshape(-1, 1)
    log_x = torch.where(known, eigenvalues, 1.0).log()
    log_x = torch.where(known, log_x - log_x[:, -1:], 0.0)  # far from 0 they would cost the bounds of `scan` digits
    size = torch.arange(eigenvalues.shape[1], 0, -1, dtype=torch.float64, device=eigenvalues.device)
    return known, log_x, log_x.flip(1).cumsum(1).flip(1) - size * log_x

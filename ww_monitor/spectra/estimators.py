"""Further estimators of the tail exponent: Hill with a given tail, one without fingers, and one averaged over xmin."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ww_monitor.spectra.powerlaw import SMALL_SAMPLE_TAIL, TailFit, fit_tail, tail_exponents
from ww_monitor.spectra.scan import ks_distances
from ww_monitor.spectra.status import Status

MAX_FINGERS, FINGER_DROP = 10, 1.0
"""Most eigenvalues that are taken for fingers, and the fall of alpha that makes them fingers (weightwatcher 0.7.7)."""

SOFTNESS = 0.1
"""Excess of ks, in units of 1/√n_tail, that costs a candidate a factor e. Our choice: a third of the standard deviation
of √n·ks under the law itself (0.26 for the Kolmogorov distribution), so that candidates a re-draw of the data could
exchange share the weight."""


def fit_hill(eigenvalues: torch.Tensor, *, k: int | None = None, floor: torch.Tensor | float = 0.0) -> TailFit:
    """Alpha = 1 + k/Σ_{j > n−k} ln(λ_j/λ_{n−k+1}), the Hill estimator on the k largest eigenvalues.

    Source: Hill 1975 (Annals of Statistics 3); with k = n/2 it is TempBalance's PL_Alpha_Hill (Zhou et al. 2023,
    arXiv 2312.00359), whose tail starts at index n // 2.

    Args:
        eigenvalues: `[B, n]` float64, ascending.
        k: Size of the tail; `None` for n − n // 2.
        floor: Scalar or `[B]`; a tail that reaches an eigenvalue at or below it is `few_eigenvalues`.
    """
    n = eigenvalues.shape[1]
    size = n - n // 2 if k is None else min(k, n)
    index = n - size
    known, log_x, log_sum = tail_exponents(eigenvalues, floor)
    exponent = size / log_sum[:, index]
    status = torch.where(log_sum[:, index] > 1e-12, int(Status.OK), int(Status.DEGENERATE))  # as in `fit_tail`
    status = torch.where(known[:, index] & (size >= 2), status, int(Status.FEW_EIGENVALUES))
    good = status == Status.OK
    tail = log_x[:, index:]
    count = torch.arange(size, 0, -1, dtype=torch.float64, device=tail.device) / size
    ks = ((-(tail - tail[:, :1]) * exponent[:, None]).exp() - count).abs().amax(1)
    values = (1 + exponent, eigenvalues[:, index], ks, exponent / size**0.5)
    alpha, xmin, ks, sigma = (torch.where(good, value, float("nan")) for value in values)
    return TailFit(alpha, xmin, ks, sigma, size * good.double(), known.sum(1), status)


@dataclass(frozen=True)
class FingerFit:
    """The fit without fingers, how many largest eigenvalues were left out as such, and alpha with them, each `[B]`."""

    tail: TailFit
    num_fingers: torch.Tensor
    raw_alpha: torch.Tensor


def fit_without_fingers(
    eigenvalues: torch.Tensor, *, floor: torch.Tensor | float = 0.0, weightwatcher: bool = False
) -> FingerFit:
    """The fit without the r largest eigenvalues, for the smallest r ≤ 10 that lowers alpha by over 1; else with all.

    Few eigenvalues far beyond the end of a power law ("fingers") make its alpha too large. weightwatcher 0.7.7
    (`fix_fingers="clip_xmax"`) never tries r = 1, reports r − 1, stops at the first fit with alpha ≤ 2, and fails on
    short spectra; `weightwatcher=True` follows it, but for the last.

    Args:
        eigenvalues: `[B, n]` float64, ascending.
        floor: Scalar or `[B]`; eigenvalues at or below it are numerically zero and take no part.
        weightwatcher: Use that tool's search.
    """
    first = best = fit_tail(eigenvalues, floor=floor, allow_short=weightwatcher)
    num_fingers = torch.zeros_like(first.alpha)
    searching = first.status == Status.OK
    for removed in range(2, MAX_FINGERS) if weightwatcher else range(1, MAX_FINGERS + 1):
        if removed >= eigenvalues.shape[1] - 1 or not bool(searching.any()):  # two are the least that is fitted
            break
        clipped = fit_tail(eigenvalues[:, :-removed], floor=floor, allow_short=weightwatcher)
        accept = searching & (clipped.alpha + FINGER_DROP < first.alpha)
        pairs = zip(vars(clipped).values(), vars(best).values(), strict=True)
        best = TailFit(*(torch.where(accept, new, old) for new, old in pairs))
        num_fingers = torch.where(accept, float(removed - 1 if weightwatcher else removed), num_fingers)
        searching = searching & ~accept
        if weightwatcher:
            searching = searching & ~(clipped.alpha <= 2.0)
    return FingerFit(best, num_fingers, first.alpha)


@dataclass(frozen=True)
class SoftAlpha:
    """`[B]` alpha = Σ w_i alpha_i, and √(Σ w_i (alpha_i − alpha)²): how far the candidates in question disagree."""

    alpha: torch.Tensor
    spread: torch.Tensor


def soft_alpha(eigenvalues: torch.Tensor, *, floor: torch.Tensor | float = 0.0) -> SoftAlpha:
    """Σ w_i alpha_i over all candidates i with w_i ∝ exp(−(D_i − min D) √m / 0.1), m = the tail of the best candidate.

    The usual alpha belongs to the one xmin with the smallest Kolmogorov–Smirnov distance D, and jumps when two nearly
    equal minima change places. The average does not. The idea of averaging an exponent over thresholds is Resnick &
    Stărică's (1997, Adv. Appl. Prob. 29, "Smoothing the Hill estimator"); weights by distance are our choice.

    Args:
        eigenvalues: `[B, n]` float64, ascending.
        floor: Scalar or `[B]`; eigenvalues at or below it are numerically zero and take no part.
    """
    n = eigenvalues.shape[1]
    known, log_x, log_sum = tail_exponents(eigenvalues, floor)
    size = torch.arange(n, 0, -1, dtype=torch.float64, device=eigenvalues.device)
    candidate = known & (size >= SMALL_SAMPLE_TAIL) & (log_sum > 1e-12)  # as in `fit_tail`
    exponent = torch.where(candidate, size / log_sum, 0.0)  # infinite ones would make NaN of a weight of 0
    ks = torch.where(candidate, ks_distances(log_x, exponent), float("inf"))
    smallest, best = ks.min(1, keepdim=True)
    weight = torch.where(candidate, (-(ks - smallest) * size[best].sqrt() / SOFTNESS).exp(), 0.0)
    weight = weight / weight.sum(1, keepdim=True)
    alpha = (weight * (1 + exponent)).sum(1)
    variance = (weight * (1 + exponent - alpha[:, None]).square()).sum(1)
    found = candidate.any(1)
    return SoftAlpha(torch.where(found, alpha, float("nan")), torch.where(found, variance.sqrt(), float("nan")))

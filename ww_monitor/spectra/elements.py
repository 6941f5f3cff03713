"""The element histogram of a matrix: how near its largest entry is to making an outlier of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ww_monitor.spectra.status import Rows

_TRIM_ROUNDS, _NEAR, _LEFT = 50, 0.5, 1e-3
"""Most rounds of trimming; the share of the first limit from which on entries are looked at one by one, since limits
fall; the least share of Σ w² that is left about the mean: three digits of sixteen may be lost."""

_CHUNK = 1 << 16
"""Entries that the host looks at together: they stay in a core's cache."""


@dataclass(frozen=True)
class Elements(Rows):
    """The element histogram of B matrices in four numbers, each field `[B]` float64.

    Attributes:
        mean: Mean of the bulk: of the entries within `std · (NM)^¼` of it.
        std: Standard deviation of the same entries.
        headroom: max|w − mean| / (std (NM)^¼); 1 = a trap is expected. NaN for a constant matrix.
        mean_shift: |mean| (NM)^¼ / std; 1 = the mean is an outlier of its own. NaN for a constant matrix.
    """

    mean: torch.Tensor
    std: torch.Tensor
    headroom: torch.Tensor
    mean_shift: torch.Tensor


@dataclass(frozen=True)
class Moments(Rows):
    """Σ w, Σ w², min w, max w and #{w = 0} of B matrices, each field `[B]` float64 on their device."""

    total: torch.Tensor
    squares: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True)
class LargeEntries:
    """The K largest entries above the threshold, largest first.

    Slice, row and column as stored `[K, 3]`; the weights `[K]`; |w − mean| / (std (NM)^¼) `[K]`, each above 1.
    """

    index: torch.Tensor
    value: torch.Tensor
    headroom: torch.Tensor


def moments(matrices: torch.Tensor) -> Moments:
    """Those of `[B, N, M]` of any floating dtype, summed in float64; no device is waited for."""
    flat = matrices.flatten(1)
    squares = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square()
    zeros = flat.shape[1] - torch.count_nonzero(flat, dim=1)
    total, low, high = flat.sum(1, dtype=torch.float64), flat.amin(1), flat.amax(1)
    return Moments(total, squares, low.double(), high.double(), zeros.double())


def elements(matrices: Sequence[torch.Tensor] | torch.Tensor, *, known: Moments | None = None) -> Elements:
    """Headroom = max|w − mean| / (σ (NM)^¼), mean_shift = |mean| (NM)^¼ / σ, with σ trimmed of entries above σ(NM)^¼.

    Mean and σ are those of the entries that are not trimmed, until as many are kept as before: a few large entries
    would hide in the variance that they inflate and drag the mean. Only matrices with something to trim are read again.

    Args:
        matrices: `[B, N, M]` or B of `[N, M]`, finite, any floating dtype.
        known: Their moments on the host, where they have been taken.

    Returns:
        Fields on the host.

    >>> w = torch.randn(100, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> w[3, 7] = 12.0
    >>> round(elements(w[None]).headroom.item(), 2)       # 12 / 5000^¼ = 1.43
    1.42
    """
    count = matrices[0].numel()
    found = known or Moments.joined([moments(one.detach()[None]) for one in matrices])
    mean, std = _mean_and_std(found, count)
    for b in np.flatnonzero(_far(found, mean, std, count)).tolist():
        sums = float(found.total[b]), float(found.squares[b])
        mean[b], std[b] = _trimmed(matrices[b].detach().flatten(), count**0.25, *sums)
    return _elements(found, mean, std, count)


def elements_of(found: Moments, count: int) -> Elements:
    """The same of matrices of `count` = N·M entries with nothing to trim, from their moments alone."""
    return _elements(found, *_mean_and_std(found, count), count)


def needs_trimming(found: Moments, count: int) -> np.ndarray:
    """`[B]` bool: whether one of `count` = N·M entries lies above σ(NM)^¼, or the spread drowns in the mean."""
    return _far(found, *_mean_and_std(found, count), count)


def _far(found: Moments, mean: np.ndarray, std: np.ndarray, count: int) -> np.ndarray:
    largest = _largest(found, mean)
    with np.errstate(all="ignore"):
        # Σ w²/n − mean² has lost six of its sixteen digits by the second limit
        far = (largest > std * count**0.25) | (std < 1e-3 * np.abs(mean))
    return np.asarray(far & np.isfinite(largest))


def _mean_and_std(found: Moments, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of all entries; in numpy, whose small operations cost a third of torch's."""
    with np.errstate(all="ignore"):  # moments of what is not finite
        mean = found.total.cpu().numpy() / count
        variance = found.squares.cpu().numpy() / count - mean * mean
        return mean, np.sqrt(np.maximum(variance, 0.0))  # a difference, below 0 by rounding


def _largest(found: Moments, mean: np.ndarray) -> np.ndarray:
    """max|w − mean|."""
    with np.errstate(all="ignore"):
        largest: np.ndarray = np.maximum(found.high.cpu().numpy() - mean, mean - found.low.cpu().numpy())
        return largest


def _elements(found: Moments, mean: np.ndarray, std: np.ndarray, count: int) -> Elements:
    reach, largest = count**0.25, _largest(found, mean)
    with np.errstate(all="ignore"):
        std = np.where(std > 1e-12 * np.abs(mean), std, np.nan)  # what is left of a constant matrix is rounding
        headroom, shift = largest / (std * reach), np.abs(mean) * reach / std
    return Elements(*map(torch.from_numpy, (mean, std, headroom, shift)))


def _trimmed(entries: torch.Tensor, reach: float, total: float, squares: float) -> tuple[float, float]:
    """Mean and standard deviation of the entries within `reach` standard deviations of the mean, iterated.

    What is trimmed is taken off their sums; where that would cost digits, all are summed anew each time.
    """
    found = _without_far(entries, reach, total, squares)
    if found is not None:
        return found
    exact = entries.double()
    mean, std, kept = float(exact.mean()), float(exact.std(correction=0)), len(exact)
    for _ in range(_TRIM_ROUNDS):
        inside = exact[(exact - mean).abs() <= std * reach]
        if len(inside) in (0, kept):  # none where the spread underflows
            break
        mean, std, kept = float(inside.mean()), float(inside.std(correction=0)), len(inside)
    return mean, std


def _without_far(entries: torch.Tensor, reach: float, total: float, squares: float) -> tuple[float, float] | None:
    """The same by what the far entries leave of the sums; None where they leave too little of them."""
    kept, removed, removed_sq = len(entries), 0.0, 0.0
    far = near = None
    for _ in range(_TRIM_ROUNDS):
        mean, left = (total - removed) / kept, squares - removed_sq
        variance = left / kept - mean * mean
        if not variance * kept > _LEFT * squares:  # `not >` takes NaN too
            return None
        std = math.sqrt(variance)
        if far is None or near is None:
            centre, near = mean, _NEAR * std * reach
            at = _beyond(entries, centre, near)
            if at is None:
                return None
            far = entries[at].double().cpu()
        if not abs(mean - centre) + near <= std * reach:  # an entry might have to go that is not among them
            return None
        out = far[(far - mean).abs() > std * reach]
        if len(entries) - len(out) == kept:
            break
        kept, removed, removed_sq = len(entries) - len(out), float(out.sum()), float(out.square().sum())
    return mean, std


def _beyond(entries: torch.Tensor, centre: float, distance: float) -> torch.Tensor | None:
    """Where entries are further than `distance` from the centre, rounding aside; None where it is not aside."""
    wide = entries if entries.dtype in (torch.float32, torch.float64) else entries.float()
    rounding = torch.finfo(wide.dtype).eps * abs(centre)
    # numbers are compared in the type of the weights: there limits have to be told apart, and to be finite
    if not (distance > 1e3 * rounding and distance < torch.finfo(wide.dtype).max / 4):
        return None
    low, high = centre - distance, centre + distance
    if wide.device.type != "cpu":
        return ((wide < low) | (wide > high)).nonzero().flatten()
    parts = ((at, wide[at : at + _CHUNK].numpy()) for at in range(0, len(wide), _CHUNK))
    found = [  # torch takes ten times as long for this as numpy, and most parts have none
        np.flatnonzero((part < low) | (part > high)) + start
        for start, part in parts
        if not (part.min() >= low and part.max() <= high)
    ]
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *found]))


def large_entries(matrices: torch.Tensor, stats: Elements, *, limit: int = 8) -> LargeEntries:
    """{(s, i, j): |w_sij − mean_s| > σ_s (NM)^¼}, the addresses of the traps.

    Of one layer `[slices, N, M]`, of which `stats` has a row a slice, at most `limit` entries.
    """
    matrices, size, parts = matrices.detach(), matrices[0].numel(), []
    each = zip(matrices.flatten(1), stats.mean.tolist(), stats.std.tolist(), stats.headroom.tolist(), strict=True)
    for k, (entries, mean, std, headroom) in enumerate(each):
        # some more: the limit itself is asked in float64; of none above it the weights are not read again
        at = _beyond(entries, mean, 0.99 * std * size**0.25) if headroom > 1 else entries.new_empty(0).long()
        if at is None:
            at = torch.arange(size, dtype=torch.int64, device=entries.device)
        ratio = entries[at].double().sub_(mean).abs_().div_(std * size**0.25)
        parts.append((at[ratio > 1.0] + k * size, ratio[ratio > 1.0]))
    where, ratios = map(torch.cat, zip(*parts, strict=True))
    found = ratios.sort(descending=True, stable=True)  # equal entries stay in the order of their places
    at, largest = where[found.indices[:limit]], found.values[:limit]
    index = torch.stack([at // size, at % size // matrices.shape[2], at % matrices.shape[2]], 1)
    return LargeEntries(index, matrices[index[:, 0], index[:, 1], index[:, 2]], largest)

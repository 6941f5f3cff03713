"""The element histogram of a matrix: how near its largest entry is to making an outlier of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

_TRIM_ROUNDS = 50

_NEAR = 0.5
"""Share of the first limit from which on entries are looked at one by one: limits fall as far entries are trimmed."""

_LEFT = 1e-3
"""Least share of Σ w² that is left about the mean: three digits of sixteen may be lost."""

_CHUNK = 1 << 16
"""Entries that the host holds in float64 at a time: half a MiB stays in a core's cache."""


@dataclass(frozen=True)
class Elements:
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
class Moments:
    """What one pass over the entries of B matrices leaves, each field `[B]` on their device, float64 but for `dense`.

    Attributes:
        total: Σ w.
        squares: Σ w².
        low: Smallest entry.
        high: Largest entry.
        dense: Whether no entry is zero.
    """

    total: torch.Tensor
    squares: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    dense: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Those of more matrices, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class LargeEntries:
    """The K largest entries above the threshold, largest first.

    Attributes:
        index: `[K, 3]` slice, row and column, as stored.
        value: `[K]` the weights.
        headroom: `[K]` |w − mean| / (std (NM)^¼), each above 1.
    """

    index: torch.Tensor
    value: torch.Tensor
    headroom: torch.Tensor


def moments(matrices: torch.Tensor, *, squares: torch.Tensor | None = None) -> Moments:
    """Σ w, Σ w², min w, max w of each matrix, and whether a w is zero; sums in float64, no device is waited for.

    Args:
        matrices: `[B, N, M]` of any floating dtype.
        squares: `[B]` Σ w² where it is known.
    """
    if not matrices.is_contiguous() and len(matrices) > 1:  # one slice of a kernel is copied at a time
        parts = [
            moments(matrices[b : b + 1], squares=None if squares is None else squares[b : b + 1])
            for b in range(len(matrices))
        ]
        return Moments.joined(parts)
    flat = matrices.flatten(1)
    if squares is None:
        squares = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square()
    if flat.device.type == "cpu" and flat.dtype == torch.float32:  # numpy's mixed sum takes half the time of torch's
        total = torch.from_numpy(flat.numpy().sum(1, dtype=np.float64))
    else:
        total = flat.sum(1, dtype=torch.float64)
    return Moments(total, squares, flat.amin(1).double(), flat.amax(1).double(), flat.all(1))


def elements(matrices: torch.Tensor, *, known: Moments | None = None) -> Elements:
    """Headroom = max|w − mean| / (σ (NM)^¼), mean_shift = |mean| (NM)^¼ / σ, with σ trimmed of entries above σ(NM)^¼.

    Mean and σ are those of the entries that are not trimmed; this repeats until as many are kept as before. Without it
    a few large entries would hide in the variance that they inflate and drag the mean. O(NM), no eigensolve; only
    matrices with something to trim are read a second time.

    Args:
        matrices: `[B, N, M]`, finite, any floating dtype.
        known: Their moments on the host, where they have been taken.

    Returns:
        Fields on the host.

    >>> w = torch.randn(100, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> w[3, 7] = 12.0
    >>> round(elements(w[None]).headroom.item(), 2)       # 12 / 5000^¼ = 1.43
    1.42
    """
    matrices = matrices.detach()
    found = known or moments(matrices)
    count = matrices[0].numel()
    mean = found.total.cpu() / count
    low, high = found.low.cpu(), found.high.cpu()
    largest = torch.maximum(high - mean, mean - low)
    std = (found.squares.cpu() / count - mean.square()).clamp(min=0).sqrt()
    reach = count**0.25
    needs_care = ((largest > std * reach) | (std < 1e-3 * mean.abs())) & torch.isfinite(largest)
    for b in torch.nonzero(needs_care).flatten().tolist():
        total = float(found.total[b]), float(found.squares[b])
        mean[b], std[b] = _trimmed(matrices[b].flatten(), reach, *total)
        largest[b] = torch.maximum(high[b] - mean[b], mean[b] - low[b])
    std = torch.where(std > 1e-12 * mean.abs(), std, float("nan"))
    return Elements(mean=mean, std=std, headroom=largest / (std * reach), mean_shift=mean.abs() * reach / std)


def _trimmed(entries: torch.Tensor, reach: float, total: float, squares: float) -> tuple[float, float]:
    """Mean and standard deviation of the entries within `reach` standard deviations of the mean, iterated.

    What is trimmed is taken off the sums, which needs one look at the entries; all of them are summed anew each time
    where that would cost digits.

    Args:
        entries: `[n]` of any floating dtype.
        reach: In standard deviations.
        total: Σ w.
        squares: Σ w².
    """
    return _without_far(entries, reach, total, squares) or _summed_anew(entries, reach)


def _summed_anew(entries: torch.Tensor, reach: float) -> tuple[float, float]:
    mean, std, kept = _spread(entries, 0.0, math.inf)
    for _ in range(_TRIM_ROUNDS):
        inside = _spread(entries, mean, std * reach)
        if inside[2] in (0, kept):  # none where the spread underflows
            break
        mean, std, kept = inside
    return mean, std


def _without_far(entries: torch.Tensor, reach: float, total: float, squares: float) -> tuple[float, float] | None:
    """The same by what the far entries leave of the sums; None where they leave too little of them."""
    size = kept = len(entries)
    centre = mean = total / size
    variance = squares / size - mean * mean
    if not variance * size > _LEFT * squares:
        return None
    std = math.sqrt(variance)
    near = _NEAR * std * reach
    at = _beyond(entries, centre, near)
    if at is None:
        return None
    far = entries[at].double().cpu()
    for _ in range(_TRIM_ROUNDS):
        if not abs(mean - centre) + near <= std * reach:  # an entry might have to go that is not among them
            return None
        out = far[(far - mean).abs() > std * reach]
        if size - len(out) == kept:
            return mean, std
        kept = size - len(out)
        left = squares - float(out.square().sum())
        mean = (total - float(out.sum())) / kept
        variance = left / kept - mean * mean
        if not variance * kept > _LEFT * squares:
            return None
        std = math.sqrt(variance)
    return mean, std


def _beyond(entries: torch.Tensor, centre: float, distance: float) -> torch.Tensor | None:
    """Where entries are further than `distance` from the centre, rounding aside; None where it is not aside."""
    wide = entries if entries.dtype in (torch.float32, torch.float64) else entries.float()
    rounding = torch.finfo(wide.dtype).eps * abs(centre)
    if not (distance > 1e3 * rounding and distance < torch.finfo(wide.dtype).max / 4):
        return None
    low, high = centre - distance, centre + distance
    if wide.device.type != "cpu":
        return ((wide < low) | (wide > high)).nonzero().flatten()
    found = [  # torch takes ten times as long for this as numpy
        np.flatnonzero((part < low) | (part > high)) + start
        for start, part in ((at, wide[at : at + _CHUNK].numpy()) for at in range(0, len(wide), _CHUNK))
    ]
    return torch.from_numpy(np.concatenate(found))


def _spread(entries: torch.Tensor, centre: float, distance: float) -> tuple[float, float, int]:
    """Mean, standard deviation and number of the entries no further than `distance` from the centre.

    The squares of some entries are summed about their own mean and put together with the others' (Chan, Golub &
    LeVeque 1983, The American Statistician 37), so that neither a large mean nor a huge entry outside costs digits.
    """
    mean = squares = 0.0
    count = 0
    for part in _in_float64(entries):
        outside = (part - centre).abs_() > distance
        inside = len(part) - int(outside.sum())
        if not inside:
            continue
        part_mean = float(part.masked_fill_(outside, 0.0).sum()) / inside
        part.sub_(part_mean).masked_fill_(outside, 0.0)
        away, share = part_mean - mean, inside / (count + inside)
        squares += float(part @ part) + away * away * count * share
        mean += away * share
        count += inside
    return mean, math.sqrt(squares / max(count, 1)), count


def _in_float64(entries: torch.Tensor) -> Iterator[torch.Tensor]:
    """Copies of some entries at a time; a device takes all at once."""
    size = _CHUNK if entries.device.type == "cpu" else max(1, len(entries))
    for part in torch.split(entries, size):
        yield part.to(torch.float64, copy=True)


def large_entries(matrices: torch.Tensor, stats: Elements, *, limit: int = 8) -> LargeEntries:
    """{(s, i, j): |w_sij − mean_s| > σ_s (NM)^¼}, the addresses of the traps.

    Args:
        matrices: `[slices, N, M]` of one layer.
        stats: Its `elements`, one row a slice.
        limit: At most this many entries.
    """
    matrices = matrices.detach()
    reach, size = (matrices.shape[1] * matrices.shape[2]) ** 0.25, matrices[0].numel()
    where: list[torch.Tensor] = []
    ratios: list[torch.Tensor] = []
    for k, (matrix, mean, std) in enumerate(zip(matrices, stats.mean.tolist(), stats.std.tolist(), strict=True)):
        entries = matrix.flatten()
        at = _beyond(entries, mean, 0.99 * std * reach)
        if at is None:
            at = torch.arange(size, device=entries.device)
        ratio = entries[at].double().sub_(mean).abs_().div_(std * reach)
        above = ratio > 1.0
        where.append(at[above] + k * size)
        ratios.append(ratio[above])
    found = torch.cat(ratios).sort(descending=True, stable=True)
    at, headroom = torch.cat(where)[found.indices[:limit]], found.values[:limit]
    index = torch.stack([at // size, at % size // matrices.shape[2], at % matrices.shape[2]], 1)
    return LargeEntries(index, matrices[index[:, 0], index[:, 1], index[:, 2]], headroom)

"""The largest entries of matrices on a device, and the sums of the others: what trims a histogram without a wait each.

On the host a pass over a matrix is cheap and ends when nothing more is trimmed (`spectra.elements`). A device would
wait for the host at every pass; here it is asked once for everything, and the host trims what it got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ww_monitor.spectra.device import Accelerator
from ww_monitor.spectra.elements import TRIM_ROUNDS, LargeEntries, Moments

LARGEST = 64
"""Entries that are looked at one by one. Student t elements with 4 degrees of freedom have about ten above the limit in
a matrix of two million; a matrix with more than this is trimmed pass by pass."""

_PIECE = 1 << 23
"""Entries that a device holds in float64 at a time (64 MiB)."""


@dataclass(frozen=True)
class Extremes:
    """The entries of one matrix farthest from a centre, and what the others add up to; on the host.

    Attributes:
        centre: About which distances are taken.
        index: `[K]` places in the flat matrix.
        value: `[K]` the entries, float64.
        reach: Distance from the centre that no other entry exceeds.
        others: Number, mean and sum of squares about the mean of the others.
    """

    centre: float
    index: np.ndarray
    value: np.ndarray
    reach: float
    others: tuple[float, float, float]

    def spread(self, centre: float, distance: float) -> tuple[float, float, int] | None:
        """Mean, standard deviation and number of the entries no farther than `distance` from `centre`.

        `None` if that takes a look at the others one by one.
        """
        count, mean, squares = self.others
        if abs(centre - self.centre) + self.reach > distance:
            return None
        inside = self.value[np.abs(self.value - centre) <= distance]
        if len(inside):  # Chan, Golub & LeVeque 1983, The American Statistician 37
            own = float(inside.mean())
            total = count + len(inside)
            squares += float(np.square(inside - own).sum()) + (own - mean) ** 2 * count * len(inside) / total
            mean += (own - mean) * len(inside) / total
            count = total
        return mean, float(np.sqrt(squares / max(count, 1.0))), int(count)

    def trimmed(self, reach: float) -> tuple[float, float] | None:
        """Mean and standard deviation of the entries within `reach` standard deviations of the mean, iterated.

        `None` if that takes more than the largest entries.
        """
        found = self.spread(0.0, np.inf)
        for _ in range(TRIM_ROUNDS):
            if found is None:
                return None
            mean, std, kept = found
            found = self.spread(mean, std * reach)
            if found is not None and found[2] in (0, kept):
                return mean, std
        return None if found is None else found[:2]

    def above(self, mean: float, std: float, shape: Sequence[int], *, limit: int = 8) -> LargeEntries | None:
        """The entries above the threshold, largest first; `None` if there may be more than are known.

        Args:
            mean: Of the bulk.
            std: Of the bulk.
            shape: `(N, M)`.
            limit: At most this many entries.
        """
        if not std > 0:
            return None
        ratio = np.abs(self.value - mean) / (std * (shape[0] * shape[1]) ** 0.25)
        beyond = (self.reach + abs(mean - self.centre)) / (std * (shape[0] * shape[1]) ** 0.25)
        order = np.lexsort((self.index, -ratio))[:limit]
        order = order[ratio[order] > 1.0]
        if beyond >= (ratio[order[-1]] if len(order) == limit else 1.0):
            return None
        at = self.index[order]
        index = np.stack([np.zeros_like(at), at // shape[1], at % shape[1]], 1)
        return LargeEntries(*map(torch.from_numpy, (index, self.value[order], ratio[order])))


def extremes(slices: Sequence[torch.Tensor], found: Moments, accelerator: Accelerator) -> list[Extremes]:
    """The `LARGEST` entries of each matrix farthest from its centre; the host reads once.

    Args:
        slices: `[N, M]` each, of one shape, finite, on the device.
        found: Their moments, on the host.
        accelerator: The device.
    """
    sums, count = zip(found.total.tolist(), found.squares.tolist(), strict=True), slices[0].numel()
    centres = [_centre(total, squares, count) for total, squares in sums]
    asked = [tensor for one, centre in zip(slices, centres, strict=True) for tensor in _ask(one.flatten(), centre)]
    answers = [tensor.numpy() for tensor in accelerator.read(asked)]
    result = []
    for centre, places, values, others in zip(centres, answers[::3], answers[1::3], answers[2::3], strict=True):
        distance = np.abs(values - centre)
        reach = float(distance.min())
        beyond = distance > reach  # what ties at the limit may be many more, and counts with the others
        result.append(Extremes(centre, places[beyond].astype(np.int64), values[beyond], reach, _pooled(others)))
    return result


def _centre(total: float, squares: float, count: int) -> float:
    """Their mean, or 0 where it is small beside the spread: a huge entry drags the mean away from all others."""
    mean = total / count
    return mean if mean * mean > 0.2 * squares / count else 0.0


def _ask(entries: torch.Tensor, centre: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places and values of the largest, and `[pieces, 3]` sums of the others; nothing is waited for."""
    places, values, start = [], [], 0
    for piece in torch.split(entries, _PIECE):
        exact = piece.double()
        at = (exact - centre).abs_().topk(min(LARGEST, len(piece))).indices
        places.append(at + start)
        values.append(exact[at])
        start += len(piece)
    value, place = torch.cat(values), torch.cat(places)
    top = (value - centre).abs().topk(min(LARGEST, len(value)))
    sums = [_sums(piece, centre, top.values[-1]) for piece in torch.split(entries, _PIECE)]
    return place[top.indices], value[top.indices], torch.stack(sums)


def _sums(piece: torch.Tensor, centre: float, limit: torch.Tensor) -> torch.Tensor:
    """Number, mean and squares about the mean of the entries no farther from the centre than `limit`."""
    exact = piece.double().sub_(centre)
    inside = exact.abs() <= limit
    count = inside.sum()
    mean = exact.masked_fill_(~inside, 0.0).sum() / count.clamp(min=1)
    squares = exact.sub_(mean).masked_fill_(~inside, 0.0).square_().sum()
    return torch.stack([count.double(), mean + centre, squares])


def _pooled(sums: np.ndarray) -> tuple[float, float, float]:
    count = mean = squares = 0.0
    for n, m, s in sums.tolist():
        if n:
            squares += s + (m - mean) ** 2 * count * n / (count + n)
            mean += (m - mean) * n / (count + n)
            count += n
    return count, mean, squares

"""How a matrix that lies in shards comes to its owner: in rows for the Gram matrix, whole, or read by all together.

Everything here is computed from which part lies where, so that sender and owner agree without a word, and a plan needs
no processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ww_monitor.distributed.inventory import SUMS, Box, Job
from ww_monitor.engine import Options
from ww_monitor.engine.measure import needs_weights
from ww_monitor.matrix import Matrix
from ww_monitor.spectra.elements import Moments

_BLOCK = 1 << 18
"""Entries that travel at a time (1 MiB in float32). Into a Gram matrix an eighth of that where it is more: shorter
products cost more (as in `spectra.host`)."""


@dataclass(frozen=True)
class Delivery:
    """How the parts of one matrix come to its owner, point to point.

    Attributes:
        shape: The shape of the matrix.
        owner: The rank that analyses it.
        short_axis: The axis (1 rows, 2 columns) of the short side where each part has all of it, so that parts can be
            added to the Gram matrix one after the other; `None` where the matrix is put together.
        parts: What lies on each rank of one replica; ranks with nothing are left out.
    """

    shape: tuple[int, int, int]
    owner: int
    short_axis: int | None
    parts: Mapping[int, Box]

    def blocks(self, rank: int) -> Iterator[tuple[slice, slice, slice]]:
        """The part of a rank in pieces of bounded size, as places in that part."""
        lengths = [len(places) for places in self.parts.get(rank, ((), (), ()))]
        if not all(lengths):
            return
        cut = 1 if self.short_axis is None else 3 - self.short_axis  # of the axes 1 and 2 the other one
        line, entries = lengths[3 - cut], self.block_entries
        depth = max(1, entries // (lengths[cut] * line))
        height = max(1, entries // line)
        for first in range(0, lengths[0], depth):
            for start in range(0, lengths[cut], height):
                rows = slice(start, min(start + height, lengths[cut]))
                slices = slice(first, min(first + depth, lengths[0]))
                yield (slices, rows, slice(0, line)) if cut == 1 else (slices, slice(0, line), rows)

    @property
    def block_entries(self) -> int:
        """The most entries of a block, unless one row has more."""
        side = min(self.shape[1:])
        return _BLOCK if self.short_axis is None else max(_BLOCK, side * -(-side // 8))

    def bytes_sent(self, rank: int, itemsize: int) -> int:
        """What a rank sends; the owner has its own part already."""
        part = self.parts.get(rank)
        return 0 if part is None or rank == self.owner else math.prod(map(len, part)) * itemsize

    def bytes_held(self, rank: int, itemsize: int) -> int:
        """Memory that a rank needs while the parts travel: a block, and at the owner what the matrix comes to there.

        That is its Gram matrices, in which the solver works, beside a block in float64; or the weights.
        """
        slices, rows, columns = self.shape
        parts = self.parts if rank == self.owner else {rank: self.parts.get(rank, ((),))}
        block = min(self.block_entries, max(math.prod(map(len, part)) for part in parts.values()))
        if rank != self.owner:
            return block * itemsize
        if self.short_axis is None:
            return (slices * rows * columns + block) * itemsize
        return 8 * slices * min(rows, columns) ** 2 + block * (itemsize + 8)

    def for_rank(self, rank: int) -> Delivery:
        """The delivery with no more parts than a rank must know."""
        if rank == self.owner:
            return self
        return replace(self, parts={one: part for one, part in self.parts.items() if one == rank})


def delivery_of(job: Job, owner: int, options: Options) -> Delivery | None:
    """How the parts of the owner's replica come to it; `None` where some part cannot be read alone."""
    parts = {}
    for rank in _replica(job, owner):
        index = job.held[rank].index
        if index is None:
            return None
        if all(map(len, index)):
            parts[rank] = index
    # parts that overlap or leave a gap would make another matrix, without an error
    if sum(math.prod(map(len, part)) for part in parts.values()) != math.prod(job.matrix.shape):
        return None
    sums = sums_of(job, owner)
    whole = sums is None or needs_weights(job.matrix, sums, options)
    return deliver(job.matrix, owner, parts, whole=whole)


def deliver(matrix: Matrix, owner: int, parts: Mapping[int, Box], *, whole: bool) -> Delivery:
    """How parts that make up a matrix come to its owner.

    Args:
        matrix: The matrix, of which the shape counts.
        owner: The rank that analyses it.
        parts: What lies on each rank.
        whole: Whether the analysis needs the weights themselves.
    """
    short = [axis for axis in (2, 1) if matrix.shape[axis] == matrix.short_side]  # both of a square matrix
    uncut = (axis for axis in short if all(len(part[axis]) == matrix.short_side for part in parts.values()))
    return Delivery(matrix.shape, owner, None if whole else next(uncut, None), parts)


def sums_of(job: Job, owner: int) -> Moments | None:
    """The sums over the parts of the owner's replica; `None` where they are not known."""
    replica = [job.held[rank] for rank in _replica(job, owner)]
    if any(not held.sums or held.index is None for held in replica):
        return None
    slices = job.matrix.shape[0]
    total, squares, zeros = torch.zeros(3, slices, dtype=torch.float64, device="cpu")
    low = torch.full((slices,), math.inf, dtype=torch.float64, device="cpu")
    high = -low
    for held in replica:
        at = torch.tensor(list(held.index[0]) if held.index else [], dtype=torch.long, device="cpu")
        part = torch.tensor(held.sums, dtype=torch.float64, device="cpu").view(SUMS, -1)
        total[at] += part[0]
        squares[at] += part[1]
        low[at] = torch.minimum(low[at], part[2])
        high[at] = torch.maximum(high[at], part[3])
        zeros[at] += part[4]
    return Moments(total, squares, low, high, zeros)


def _replica(job: Job, owner: int) -> list[int]:
    """The ranks of the owner's team whose parts make up the matrix once, the owner's among them."""
    return [rank for rank in job.team(owner) if job.held[rank].replica == job.held[owner].replica]

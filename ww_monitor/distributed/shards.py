"""One matrix in shards → its Gram matrix or its weights, at the owner only.

Every rank of the team calls these together, in the same order for the same matrices, whatever fails: a rank that
cannot read its part sends NaN and keeps the error for the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ww_monitor.distributed.ranks import Ranks
from ww_monitor.matrix import Index, Matrix, Piece

_BLOCK = 1 << 18
"""Entries of a Gram matrix that are summed at a time, of a part that are held in float64 and of one that are sent (2
MiB), or an eighth of the Gram matrix where that is more: what a rank needs for a matrix that it does not own."""


@dataclass
class Reading:
    """One collective reading of a matrix; `error` is what this rank could not do of its part, or `""`."""

    ranks: Ranks
    matrix: Matrix
    owner: int
    error: str = ""

    @property
    def owns(self) -> bool:
        """Whether the matrix is analysed here."""
        return self.ranks.rank == self.owner

    def whole(self) -> torch.Tensor | None:
        """The weights, read by every rank of the team and kept by the owner."""
        weights = self._tried(self.matrix.load)
        return weights if self.owns else None

    def gram(self, piece: Piece, axis: int) -> torch.Tensor | None:
        """Σ AᵀA over the parts A, `[S, M, M]` float64: summed block by block to the owner.

        Args:
            piece: What lies here.
            axis: That of the short side, of which each part has all.
        """
        slices, side = self.matrix.shape[0], self.matrix.shape[axis]
        device = torch.device(piece.mesh.device_type)
        part = self._tried(lambda: piece.load() if axis == 2 else piece.load().mT)
        gram = None
        if self.owns:
            gram = self._tried(lambda: torch.empty(slices, side, side, dtype=torch.float64, device=device))
        self._say_waiting()
        height = max(_BLOCK // side, -(-side // 8))
        where = {place: i for i, place in enumerate(piece.index[0])}
        for place in range(slices):
            for start in range(0, side, height):
                block = self._product(part, where.get(place), slice(start, start + height), side, device)
                self._sum_to_owner(block, piece)
                if gram is not None:
                    gram[place, start : start + height] = block
        return gram

    def _product(
        self, part: torch.Tensor | None, at: int | None, rows: slice, side: int, device: torch.device
    ) -> torch.Tensor:
        """Rows of AᵀA; zeros where no part of the slice lies here, NaN where it could not be read."""
        height = min(rows.stop, side) - rows.start
        value = math.nan if part is None else 0.0
        block = torch.full((height, side), value, dtype=torch.float64, device=device)
        if part is not None and at is not None:
            for some in torch.split(part[at], max(_BLOCK // side, -(-side // 8))):
                a = some.double()
                block.addmm_(a[:, rows].mT, a)
        return block

    def _sum_to_owner(self, block: torch.Tensor, piece: Piece) -> None:
        """One dimension of the mesh after the other, only among the ranks on the way to the owner."""
        for group, target in _way(piece, self.ranks.members[self.owner]):
            work = dist.reduce(block, target, group=group, async_op=True)
            self.ranks.wait(work, self._what)

    def gathered(self, piece: Piece, parts: Mapping[int, tuple[Index, Index, Index]]) -> torch.Tensor | None:
        """The weights at the owner, one part after the other; for parts along one dimension of the mesh.

        Args:
            piece: What lies here.
            parts: Which part lies on each rank of the team.
        """
        for group, target in _way(piece, self.ranks.members[self.owner]):
            if self.owns:
                return self._receive(piece, parts, group)
            self._send(piece, target, group)
        return None

    def _send(self, piece: Piece, target: int, group: dist.ProcessGroup) -> None:
        part = self._tried(piece.load)
        self._say_waiting()
        start = 0
        for index in _few_rows(piece.index):
            lengths = [len(places) for places in index]
            if part is None:
                some = torch.full(lengths, math.nan, dtype=piece.dtype, device=piece.mesh.device_type)
            else:
                some = part[:, start : start + lengths[1]].contiguous()
            start += lengths[1]
            self._transfer(dist.isend, some.view(torch.uint8), target, group)

    def _receive(
        self, piece: Piece, parts: Mapping[int, tuple[Index, Index, Index]], group: dist.ProcessGroup
    ) -> torch.Tensor | None:
        device = torch.device(piece.mesh.device_type)
        weights = self._tried(lambda: torch.empty(self.matrix.shape, dtype=piece.dtype, device=device))
        own = self._tried(piece.load)
        if weights is not None and own is not None and all(piece.index):
            weights[_places(piece.index, device)] = own
        self._say_waiting()
        for source in dist.get_process_group_ranks(group):
            if source == self.ranks.members[self.owner]:
                continue
            for index in _few_rows(parts[self.ranks.members.index(source)]):
                some = torch.empty([len(places) for places in index], dtype=piece.dtype, device=device)
                self._transfer(dist.irecv, some.view(torch.uint8), source, group)
                if weights is not None:
                    weights[_places(index, device)] = some
        return weights

    def _transfer(
        self, direction: Callable[..., dist.Work | None], part: torch.Tensor, peer: int, group: dist.ProcessGroup
    ) -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(direction, part, peer, group)]):
            self.ranks.wait(work, self._what)

    def _say_waiting(self) -> None:
        self.ranks.say(f"waiting for {self._what}")

    @property
    def _what(self) -> str:
        return f"the shards of layer {self.matrix.name!r}"

    def _tried(self, step: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - the others wait in a collective, whatever happens here
            self.error = f"{type(error).__name__}: {error}"
            return None


def _way(piece: Piece, owner: int) -> Iterator[tuple[dist.ProcessGroup, int]]:
    """The groups in which this rank's part travels to the owner, each with the rank (in the job) to travel to."""
    layout = piece.mesh.mesh
    here, there = piece.mesh.get_coordinate(), (layout == owner).nonzero()[0].tolist()
    if here is None or any(here[d] != there[d] for d in range(layout.ndim) if d not in piece.sharded):
        return  # of another replica
    at = list(here)
    for dim in piece.sharded:
        at[dim] = there[dim]
        yield piece.mesh.get_group(dim), int(layout[tuple(at)])
        if here[dim] != there[dim]:
            return


def _few_rows(index: tuple[Index, Index, Index]) -> Iterator[tuple[Index, Index, Index]]:
    """A part cut into such of at most `_BLOCK` entries, or of one row; nothing of an empty part."""
    slices, rows, columns = index
    few = max(1, _BLOCK // max(1, len(slices) * len(columns)))
    if slices and columns:
        yield from ((slices, rows[start : start + few], columns) for start in range(0, len(rows), few))


def _places(index: Sequence[Index], device: torch.device) -> tuple[slice | torch.Tensor, ...]:
    """What indexes the product of the places along three axes; slices where each is a range."""
    if all(isinstance(places, range) and places.step > 0 for places in index):
        return tuple(slice(places[0], places[-1] + 1, places.step) for places in index)  # type: ignore[union-attr]
    return tuple(
        torch.tensor(list(places), device=device).view([-1 if axis == d else 1 for d in range(3)])
        for axis, places in enumerate(index)
    )

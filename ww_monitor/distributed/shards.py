"""The shards of the matrices of one round travel to their owners, all at the same time and a block at a time.

In step k of a round each rank sends its part to the k-th rank after it and hears from the k-th before it. All ranks
take the steps in this order and agree on the blocks from the layout alone, so that none waits in vain, whatever fails:
a rank that cannot read its part sends NaN and keeps the error for the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch

from ww_monitor.distributed.inventory import Box
from ww_monitor.distributed.layout import Delivery
from ww_monitor.distributed.ranks import Ranks
from ww_monitor.matrix import Index, Matrix, Piece
from ww_monitor.spectra import lapack

Places = tuple[slice, slice, slice]
"""A block of a part, by its places there."""


@dataclass
class Shipment:
    """This rank's side of the delivery of one matrix.

    Attributes:
        matrix: The matrix as the walker of this rank gave it, with its piece.
        delivery: How its parts come to the owner.
        rank: Number of this rank in the group.
        arrived: At the owner `[S, M, M]` float64 Gram matrices, or the weights; `None` elsewhere and where that failed.
        error: What this rank could not do, or `""`.
    """

    matrix: Matrix
    delivery: Delivery
    rank: int
    arrived: torch.Tensor | None = None
    error: str = ""

    @property
    def piece(self) -> Piece:
        """The part of the matrix that lies on this rank."""
        assert self.matrix.shards is not None
        assert self.matrix.shards.piece is not None
        return self.matrix.shards.piece

    @property
    def _device(self) -> torch.device:
        return torch.device(self.piece.mesh.device_type)

    def outgoing(self) -> Iterator[tuple[Places, torch.Tensor]]:
        """The blocks of the part that lies here."""
        part = self._tried(self.piece.load)
        for places in self.delivery.blocks(self.rank):
            if part is None:
                yield places, torch.full(_lengths(places), math.nan, dtype=self.piece.dtype, device=self._device)
            else:
                yield places, part[places].contiguous()  # its bytes are sent, in one piece

    def begin(self) -> None:
        """Make room at the owner, and put in what lies there."""
        slices, side = self.delivery.shape[0], min(self.delivery.shape[1:])
        if self.delivery.short_axis is None:
            make = lambda: torch.empty(self.delivery.shape, dtype=self.piece.dtype, device=self._device)  # noqa: E731
        else:
            make = lambda: torch.zeros(slices, side, side, dtype=torch.float64, device=self._device)  # noqa: E731
        self.arrived = self._tried(make)
        for places, block in self.outgoing():
            self.add(self.rank, places, block)

    def incoming(self, source: int) -> Iterator[tuple[Places, torch.Tensor]]:
        """Room for the blocks of another rank's part, one at a time."""
        for places in self.delivery.blocks(source):
            yield places, torch.empty(_lengths(places), dtype=self.piece.dtype, device=self._device)

    def add(self, source: int, places: Places, block: torch.Tensor) -> None:
        """Take in a block of the part that lies on a rank."""
        if self.arrived is None:
            return
        index = self.delivery.parts[source]
        there: Box = (index[0][places[0]], index[1][places[1]], index[2][places[2]])
        if self.delivery.short_axis is None:
            self.arrived[_entries(there, self._device)] = block
            return
        for place, one in zip(there[0], block, strict=True):
            add_gram(self.arrived[place], one if self.delivery.short_axis == 2 else one.mT)

    def end(self) -> torch.Tensor | None:
        """What has arrived, complete."""
        if self.arrived is not None and self.delivery.short_axis is not None:
            for gram in self.arrived:
                mirror(gram)
        return self.arrived

    def _tried(self, step: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - the others wait for this rank, whatever happens here
            self.error = f"{type(error).__name__}: {error}"
            return None


def deliver_all(ranks: Ranks, shipments: Mapping[int, Shipment]) -> None:
    """Move the matrices of one round to their owners.

    Args:
        ranks: The ranks that take part in the analysis.
        shipments: Owner → this rank's side, of those that this rank sends a part of or owns.
    """
    own = shipments.get(ranks.rank)
    if own is not None:
        ranks.heartbeat(f"reading its shard of layer {own.matrix.name!r}")
        own.begin()
    for step in range(1, ranks.world):
        target, source = (ranks.rank + step) % ranks.world, (ranks.rank - step) % ranks.world
        sending = shipments.get(target)
        if sending is not None:
            ranks.heartbeat(f"reading its shard of layer {sending.matrix.name!r}")
        blocks = zip_longest(() if sending is None else sending.outgoing(), () if own is None else own.incoming(source))
        for sent, received in blocks:
            layer = own if received is not None else sending
            assert layer is not None
            what = f"the shards of layer {layer.matrix.name!r}"
            ranks.heartbeat_waiting(what)
            ranks.swap(sent and (sent[1], target), received and (received[1], source), what)
            if received is not None and own is not None:
                ranks.heartbeat(f"adding a shard of layer {own.matrix.name!r}")
                own.add(source, *received)
            del sent, received  # or the next blocks would be in memory beside them


def add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add AᵀA to the upper triangle of `gram`, on a device to all of it.

    Args:
        gram: `[M, M]` float64.
        rows: A `[n, M]` of any floating dtype, on the same device.
    """
    rows = rows.double()
    if gram.device.type == "cpu":
        with np.errstate(all="ignore"):
            lapack.add_gram(rows.numpy(), gram.numpy())
    else:
        gram.addmm_(rows.mT, rows)


def mirror(gram: torch.Tensor, together: int = 256) -> None:
    """Copy the upper triangle of `[M, M]` to the lower one, in place and a few rows at a time."""
    for start in range(0, len(gram), together):
        rows = slice(start, start + together)
        corner = gram[rows, rows].triu()
        gram[rows, rows] = corner + corner.triu(1).mT
        gram[start + together :, rows] = gram[rows, start + together :].mT  # views that do not overlap


def _lengths(places: Places) -> list[int]:
    return [one.stop - one.start for one in places]


def _entries(index: Sequence[Index], device: torch.device) -> tuple[slice | torch.Tensor, ...]:
    """What indexes the product of the places along three axes; slices where each is a range."""
    if all(isinstance(places, range) and places.step > 0 for places in index):
        return tuple(slice(places[0], places[-1] + 1, places.step) for places in index)  # type: ignore[union-attr]
    return tuple(
        torch.tensor(list(places), dtype=torch.long, device=device).view([-1 if axis == d else 1 for d in range(3)])
        for axis, places in enumerate(index)
    )

"""Weights that lie in shards on the ranks of a job: which part of a matrix is here, and how the whole is read.

DTensor (FSDP2, tensor parallel, mixed meshes), FSDP1 and DeepSpeed ZeRO-3. None of them is imported here: only a model
that somebody sharded holds such weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ww_monitor.matrix import Index, Matrix, Piece, Shards, Skipped

_DTENSOR = ("torch.distributed.tensor", "DTensor")
_FSDP = ("torch.distributed.fsdp", "FullyShardedDataParallel")

Take = Callable[[Tensor], Tensor]
"""A whole tensor → the matrix `[slices, rows, columns]` in it."""


def _is(thing: object, home: tuple[str, str]) -> bool:
    """Whether `thing` is an instance of a class, if somebody imported that."""
    return isinstance(thing, getattr(sys.modules.get(home[0]), home[1], ()))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is the part of one that lies on several ranks, or stands for such a one."""
    return _is(tensor, _DTENSOR) or hasattr(tensor, "ds_id")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a DTensor all of it, on every rank of its mesh, which is a collective."""
    if not _is(tensor, _DTENSOR):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def like_whole(stored: Any) -> Any:
    """A tensor with the shape and dtype of the whole weight, without its numbers where `stored` is partitioned."""
    size = getattr(stored, "ds_shape", None)
    if stored is None or size is None:
        return stored
    return torch.zeros((), dtype=stored.dtype, device=stored.device).expand(tuple(size))


def shards_of(stored: Sequence[Tensor], take: Take, shape: Sequence[int], *, computed: bool) -> Shards | None:
    """How a matrix lies on the ranks; `None` where all of it is here.

    Args:
        stored: The tensors that the weight is made of.
        take: The whole weight → the matrix.
        shape: Of the whole weight.
        computed: Whether the weight is more than one stored tensor as it is, so that only the whole can be read.
    """
    for tensor in stored:
        if hasattr(tensor, "ds_id"):
            return _of_zero(tensor)
        if _is(tensor, _DTENSOR):
            return _of_dtensor(tensor, take, shape, computed=computed)
    return None


# --- for a plan

Layout = Callable[..., Shards | None]
"""A function like `shards_of`: how stored tensors lie on ranks, or would lie on some that are not there."""


@dataclass(frozen=True)
class EvenShards(Shards):
    """How a matrix would lie on any number of ranks if FSDP2 cut its tensor evenly along the first dimension.

    Attributes:
        axis: The axis of the matrix along which the first dimension of the tensor runs.
        places: For each place along that axis the index in that dimension.
        size: Of that dimension.
    """

    axis: int = 1
    places: Index = ()
    size: int = 1

    def parts(self, shape: Sequence[int], world: int) -> dict[int, tuple[Index, Index, Index]]:
        """Rank → its part of a matrix of that shape; empty parts are left out.

        >>> EvenShards((), axis=1, places=range(5), size=5).parts((1, 5, 3), 4)[2]
        (range(0, 1), range(4, 5), range(0, 3))
        """
        found = {}
        for rank, index in _cut_evenly(self.places, -(-self.size // world)):
            slices, rows, columns = (index if axis == self.axis else range(shape[axis]) for axis in range(3))
            found[rank] = slices, rows, columns
        return found


@lru_cache(maxsize=4096)  # a model repeats few shapes, a plan asks for each of its layers
def _cut_evenly(places: Index, chunk: int) -> list[tuple[int, Index]]:
    """Each rank that has some of the places, with where they stand among them; `torch.chunk`'s cut."""
    ranks = np.asarray(places) // chunk
    return [(int(rank), _compact(np.flatnonzero(ranks == rank))) for rank in np.unique(ranks)]


def even_shards(stored: Sequence[Tensor], take: Take, shape: Sequence[int], *, computed: bool) -> Shards:
    """`shards_of` for a plan; the arguments are its. What is computed from the stored tensors has no parts."""
    if computed:
        return Shards(())
    axis, places = _line(take, shape, 0)
    return EvenShards((), axis=axis, places=_compact(places), size=shape[0])


def read_whole(stored: Sequence[Tensor], read: Callable[[], Tensor]) -> Tensor:
    """What `read` gives while partitioned parameters are gathered (DeepSpeed ZeRO-3), a copy then."""
    partitioned = [tensor for tensor in stored if hasattr(tensor, "ds_id")]
    if not partitioned:
        return read()
    with sys.modules["deepspeed"].zero.GatheredParameters(partitioned, modifier_rank=None):
        return read().detach().clone()


def _of_zero(parameter: Any) -> Shards | None:
    group = getattr(parameter, "ds_process_group", None)
    return _together(tuple(torch.distributed.get_process_group_ranks(group)))


def _together(ranks: tuple[int, ...]) -> Shards | None:
    return Shards(ranks) if len(ranks) > 1 else None


# --- DTensor


def _of_dtensor(tensor: Any, take: Take, shape: Sequence[int], *, computed: bool) -> Shards | None:
    shards = _together(tuple(sorted(tensor.device_mesh.mesh.flatten().tolist())))
    if computed or shards is None or any(placement.is_partial() for placement in tensor.placements):
        return shards
    return replace(shards, piece=_piece(tensor, take, shape))


def _piece(tensor: Any, take: Take, shape: Sequence[int]) -> Piece | None:
    """The part of a matrix that the local shard holds; `None` where the shard is more than one box."""
    with torch.device("cpu"):  # torch counts offsets in tensors of the default device, which may have no numbers
        chunks = tensor.__create_chunk_list__()  # of torch's checkpoints; nothing public tells it
    if len(chunks) != 1:
        return None
    lines = [_line(take, shape, dim) for dim in range(len(shape))]
    here = [np.ones(size, dtype=bool) for size in take(_places(shape, 0)).shape]
    for (axis, places), offset, size in zip(lines, chunks[0].offsets, chunks[0].sizes, strict=True):
        here[axis] &= (places >= offset) & (places < offset + size)
    local = [
        (axis, _compact(places[here[axis]] - offset))
        for (axis, places), offset in zip(lines, chunks[0].offsets, strict=True)
    ]
    slices, rows, columns = (_compact(np.flatnonzero(mask)) for mask in here)
    sharded = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
    read = partial(_read_piece, tensor, local)
    return Piece((slices, rows, columns), read, tensor.dtype, tensor.device_mesh, sharded)


def _places(shape: Sequence[int], dim: int) -> Tensor:
    """A tensor with the place along `dim` as each entry, that takes memory for that dimension only."""
    places = torch.arange(shape[dim], dtype=torch.int32, device="cpu")
    return places.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(tuple(shape))


def _line(take: Take, shape: Sequence[int], dim: int) -> tuple[int, np.ndarray]:
    """The axis of the matrix along which a dimension of the tensor runs, and the place in that at each index."""
    places = take(_places(shape, dim))
    lines = [line.numpy() for line in (places[:, 0, 0], places[0, :, 0], places[0, 0, :])]
    axis = next((axis for axis, line in enumerate(lines) if line[0] != line[-1]), 0)  # of one place: any
    return axis, lines[axis]


def _compact(places: np.ndarray) -> Index:
    """As a range where it is one."""
    steps = np.unique(np.diff(places))
    if not len(places) or len(steps) > 1 or 0 in steps:
        return tuple(places.tolist())
    first, step = int(places[0]), int(steps[0]) if len(steps) else 1
    return range(first, first + step * len(places), step)


@torch.no_grad()
def _read_piece(tensor: Any, local: Sequence[tuple[int, Index]]) -> Tensor:
    """`[slices, rows, columns]` of the local shard, a view where it is a block as stored."""
    shard: Tensor = tensor.detach().to_local()
    shard = shard.to(tensor.device_mesh.device_type)  # where it is offloaded; the mesh's collectives run there
    blocks = [places for _, places in local if isinstance(places, range) and places.step == 1]
    if [axis for axis, _ in local] == [1, 2] and len(blocks) == 2:
        return shard[tuple(slice(places.start, places.stop) for places in blocks)][None]
    return shard[tuple(_along(axis, places, shard.device) for axis, places in local)]


def _along(axis: int, places: Index, device: torch.device) -> Tensor:
    """An index that runs along one of three axes."""
    return torch.tensor(list(places), dtype=torch.long, device=device).view([-1 if a == axis else 1 for a in range(3)])


# --- FSDP1


def units(model: nn.Module) -> dict[int, nn.Module]:
    """The innermost FSDP1 unit around each module, by the identity of the module."""
    around: dict[int, nn.Module] = {}
    for module in model.modules():  # a unit comes before what is in it
        if _is(module, _FSDP):
            around.update((id(inner), module) for inner in module.modules())
    return around


def by_unit(
    modules: Iterator[tuple[str, nn.Module]], around: dict[int, nn.Module], items: Callable[..., list[Matrix | Skipped]]
) -> Iterator[Matrix | Skipped]:
    """`items(path, module)` of every module, those of one unit together while it is gathered, which is a collective."""
    if not around:
        for path, module in modules:
            yield from items(path, module)
        return
    for _, group in groupby(modules, key=lambda member: id(around.get(id(member[1])))):
        members = list(group)
        unit = around.get(id(members[0][1]))
        with _gathered(unit):
            found = [item for path, module in members for item in items(path, module)]
        yield from (item if unit is None else _in_unit(unit, item) for item in found)


def _gathered(unit: nn.Module | None) -> AbstractContextManager[None]:
    if unit is None:
        return nullcontext()
    return sys.modules[_FSDP[0]].FullyShardedDataParallel.summon_full_params(  # type: ignore[no-any-return]
        unit, recurse=False, writeback=False, rank0_only=False
    )


def _in_unit(unit: Any, item: Matrix | Skipped) -> Matrix | Skipped:
    if isinstance(item, Skipped):
        return item
    ranks = tuple(torch.distributed.get_process_group_ranks(unit.process_group))
    frozen = item.frozen and not any(parameter.requires_grad for parameter in unit.parameters())
    return replace(item, load=partial(_load_in, unit, item.load), shards=_together(ranks), frozen=frozen)


@torch.no_grad()
def _load_in(unit: nn.Module, load: Callable[[], Tensor]) -> Tensor:
    with _gathered(unit):
        return load().clone()  # the unit frees what it has gathered

"""A tensor that is not read yet: what is known of it without its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ww_monitor.matrix import Shards
from ww_monitor.walk.reading import identity, offers_dequantize
from ww_monitor.walk.sharded import Take, is_sharded, shards_of


@dataclass(frozen=True)
class Unread:
    """A tensor that is not read yet: what is known of it, and how it is read.

    Attributes:
        shape: Shape in which the weight is stored.
        dtype: Its dtype, or `None` for one that is not read.
        read: Returns the tensor.
        identity: What it has in common with a tied tensor, or `None` where that is not known.
        reason: Why it is not read, or `""`.
        sharded: The tensor that `read` gives or computes from, where it lies in shards.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]
    identity: object = None
    reason: str = ""
    sharded: Tensor | None = None


def unread(tensor: Tensor, read: Callable[[], Tensor]) -> Unread:
    """The description of a tensor that `read` reads; a class that dequantises itself is described by its weight."""
    if tensor.is_nested:  # has no shape, or one that is not known
        return Unread((0,) * tensor.dim(), None, read, reason="nested weights, whose rows differ in length")
    shape, dtype, reason = tuple(tensor.shape), tensor.dtype, ""
    if offers_dequantize(tensor):
        return Unread(shape, torch.float32, lambda: read().dequantize(), identity(tensor))
    if tensor.layout is not torch.strided:
        reason = f"sparse weights (layout {tensor.layout})"
    elif (
        not tensor.is_meta
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.nbytes > tensor.untyped_storage().nbytes()
    ):
        reason = "a view that repeats fewer numbers than its shape says"
    return Unread(shape, dtype, read, identity(tensor), reason, tensor if is_sharded(tensor) else None)


def layout(made_of: Sequence[Unread], take: Take, shape: Sequence[int], *, computed: bool = False) -> Shards | None:
    """How a part of a weight lies on the ranks, as `shards_of` says it; `None` where all of it is here."""
    stored = [one.sharded for one in made_of if one.sharded is not None]
    computed = computed or any(one.sharded is not None and one.sharded.dtype != one.dtype for one in made_of)
    return shards_of(stored, take, shape, computed=computed)

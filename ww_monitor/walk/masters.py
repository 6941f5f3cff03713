"""The float32 masters that an optimizer keeps of weights in half precision: what a step really changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ww_monitor.errors import WWMonitorError
from ww_monitor.matrix import Matrix

_PROBE = 64
"""Elements that are compared before all are: the wrong master of the right size is found out by them."""


def load_in_full(matrix: Matrix, optimizers: Sequence[Any]) -> torch.Tensor:
    """The weights of a matrix in at least float32: its own, or a view of the master that an optimizer keeps of them.

    A master is a float32 tensor that rounds to the weights: among the parameters of an optimizer (masters in a loop of
    one's own, Megatron), in its `param_groups_master` (Apex), or in the state of a parameter under a name with
    "master" or "fp32" (Transformer Engine). Masters in shards or with the rest of a rounding apart are not found.

    Args:
        matrix: One whose load is its stored weight, or a part of it.
        optimizers: Those that train it, also in the wrappers of a trainer (`.optimizer`).

    Raises:
        WWMonitorError: if the weights are of less precision and no master, or no one master, rounds to them.
    """
    weights = matrix.load().detach()
    if weights.element_size() >= torch.float32.itemsize:
        return weights
    found = [view for full in _masters(optimizers) if (view := _as(weights, full)) is not None]
    if not found or not all(torch.equal(found[0], other.to(found[0].device)) for other in found[1:]):
        raise WWMonitorError(f"{matrix.name}: expected one float32 master of {weights.dtype}, got {len(found)}")
    return found[0]


def _masters(optimizers: Sequence[Any]) -> Iterator[torch.Tensor]:
    for outermost in optimizers:
        optimizer, seen = outermost, set[int]()
        while optimizer is not None and id(optimizer) not in seen:
            seen.add(id(optimizer))
            for groups in ("param_groups", "param_groups_master"):
                yield from (one for group in getattr(optimizer, groups, None) or () for one in group["params"])
            for state in dict(getattr(optimizer, "state", None) or {}).values():
                items = state.items() if isinstance(state, dict) else ()
                yield from (value for key, value in items if "master" in str(key) or "fp32" in str(key))
            optimizer = getattr(optimizer, "optimizer", None)


def _as(weights: torch.Tensor, full: Any) -> torch.Tensor | None:
    """The part of a master that stands for `weights`, a view of a stored tensor; `None` if it rounds to others."""
    if not isinstance(full, torch.Tensor) or full.dtype != torch.float32 or not full.is_contiguous():
        return None
    # Weights may be a part of a fused tensor: a master is one of the whole storage, and has them in the same place.
    if full.numel() * weights.element_size() != weights.untyped_storage().nbytes():
        return None
    at = full.storage_offset() + weights.storage_offset()
    view = full.detach().as_strided(weights.size(), weights.stride(), at)
    for pick in (slice(_PROBE), slice(None)):
        if not torch.equal(view[0, 0, pick].to(weights), weights[0, 0, pick]):
            return None
    return view if torch.equal(view.to(weights), weights) else None

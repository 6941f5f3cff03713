"""Where the matrices of a model are stored, so that new weights can be written there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Stored:
    """The tensors that are written to, found by where the weights of a layer lie in memory.

    Args:
        live: The model's tensors by key.
        inplace: Whether they themselves are written to; otherwise copies, tied ones copied once.
    """

    def __init__(self, live: Mapping[str, Any], *, inplace: bool) -> None:
        self._places: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.tensors: dict[str, Any] = {}
        for key, value in live.items():
            self.tensors[key] = value if inplace else self._copy(value)
            if _has_address(value):
                self._places.setdefault(_place(value), (value.detach(), self.tensors[key].detach()))

    def _copy(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if _has_address(value) and _place(value) in self._places:
            return self._places[_place(value)][1]
        copy = value.detach().clone()
        if _has_address(value) and copy.stride() != value.stride():
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            copy.copy_(value.detach())
        return copy

    def views(self, weights: torch.Tensor) -> list[torch.Tensor]:
        """Where `weights`, a view of live tensors, lies in each tensor that is written to; empty if it is no view."""
        if not _has_address(weights):
            return []
        views = []
        for source, target in self._places.values():
            offset = weights.storage_offset() - source.storage_offset()
            same = (
                source.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
                and source.dtype == weights.dtype
            )
            if same and offset >= 0 and offset + _extent(weights) <= _extent(source):
                start = target.storage_offset() + offset
                views.append(target.as_strided(weights.shape, weights.stride(), start))
        return views


def _has_address(value: Any) -> bool:
    plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return plain and value.layout is torch.strided and not value.is_meta and value.numel() > 0


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two names of one tensor have in common."""
    storage = tensor.untyped_storage().data_ptr()
    return tensor.device, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _extent(tensor: torch.Tensor) -> int:
    """Elements between the first and the last of a tensor in memory, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))

"""A model → parameter groups for its optimizer, one for each weight that is analysed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix
from ww_monitor.walk.torch import walk

NAMES = "ww_matrices"
"""The key of a group under which the names of its matrices stand; checkpoints of the optimizer keep it."""


def param_groups(
    model: nn.Module,
    groups: Iterable[Mapping[str, Any] | nn.Parameter | tuple[str, nn.Parameter]] | None = None,
    **walk_options: Any,
) -> list[dict[str, Any]]:
    """One group for each weight matrix, then the rest; every trainable parameter once.

    A fused weight (`c_attn`) is one group of several matrices, which then share the mean of their factors. The rest are
    biases, norms and what is stored otherwise than it is used: parametrized, quantized, sharded weights, adapters.

    Args:
        model: The module whose matrices are analysed, the same that the callback sees, so that names are equal; in
            Lightning the LightningModule itself.
        groups: Parameters, or groups of them with options of their own, as for an optimizer: each is cut into matrices
            and a rest that keep its options, such as its `weight_decay`. `None` for all parameters that train. Names
            beside the parameters are left out.
        **walk_options: `split`, `experts` and `lora`, where the monitor has them too.

    Returns:
        Groups for any optimizer of torch; each of a matrix has the names of its layers as `ww_matrices`.

    Raises:
        InvalidArgument: if a parameter is in two groups.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    >>> [(group.get("ww_matrices"), len(group["params"])) for group in param_groups(net)]
    [(['0'], 1), (['2'], 1), (None, 4)]
    """
    given: list[Any] = [p for p in model.parameters() if p.requires_grad] if groups is None else list(groups)
    plain: list[Any] = [one for one in given if not isinstance(one, Mapping)]
    cut = [{"params": plain}] * bool(plain) + [dict(one) for one in given if isinstance(one, Mapping)]
    for group in cut:
        params = group["params"]
        unnamed = (one[1] if isinstance(one, tuple) else one for one in ([params] if _is_one(params) else params))
        group["params"] = [p for p in unnamed if p.requires_grad]
    every = [p for group in cut for p in group["params"]]
    if len({id(p) for p in every}) < len(every):
        raise InvalidArgument("param_groups: groups must have every parameter once; got one that is there twice")
    names = _matrices_of(model, every, walk_options)
    made = []
    for group in cut:
        of_matrices = [p for p in group["params"] if id(p) in names]
        made += [{**group, "params": [p], NAMES: names[id(p)]} for p in of_matrices]
        if rest := [p for p in group["params"] if id(p) not in names]:
            made.append({**group, "params": rest})
    return made


def _is_one(params: Any) -> bool:
    """Whether a group's parameters are a single one, or one with its name."""
    return isinstance(params, torch.Tensor) or (isinstance(params, tuple) and isinstance(params[0], str))


def _matrices_of(
    model: nn.Module, parameters: Iterable[torch.Tensor], walk_options: Mapping[str, Any]
) -> dict[int, list[str]]:
    """The id of a parameter → the matrices that are views of it."""
    places = [(start, start + p.nbytes, id(p)) for p in parameters if (start := _address(p))]
    found: dict[int, list[str]] = {}
    for item in walk(model, **walk_options):
        if not isinstance(item, Matrix) or item.frozen or item.shards is not None:
            continue
        with suppress(Exception):  # what cannot be read has no group of its own
            at = _address(item.load())
            owner = next((one for start, end, one in places if start <= at < end), None)
            if owner is not None:
                found.setdefault(owner, []).append(item.name)
    return found


def _address(tensor: torch.Tensor) -> int:
    """Where its first element lies; 0 where it has no memory of its own that could be told apart."""
    if tensor.is_meta or type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.numel():
        return 0
    return tensor.data_ptr()

"""Whatever holds weights → its weight matrices: the walker for each kind of source."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.sharded import Layout

Source = nn.Module | Mapping[str, Tensor] | str | Path


def walk_source(
    source: Source,
    *,
    split: Mapping[str, int | Sequence[int]] | None = None,
    experts: Literal["separate", "pooled"] = "separate",
    lora: Sequence[str] = ("base", "delta"),
    layout: Layout | None = None,
    part: str = "",
) -> Iterator[Matrix | Skipped]:
    """The weight matrices of a torch module, a Keras model, a mapping from names to tensors, or a checkpoint on disk.

    Args:
        source: What has the weights: a module, a mapping or a path.
        split: Glob → number or sizes of the parts that a fused weight is cut into along its output axis.
        experts: One matrix an expert, or one of all experts' slices; torch modules only.
        lora: Which of `"base"`, `"delta"` and `"merged"` to give for a layer with adapters; torch modules only
            (a Keras layer gives its merged weight).
        layout: For a plan; see `ww_monitor.walk.torch.walk`. Torch modules only.
        part: Which of several state dicts to read; mappings and checkpoints only.

    Raises:
        InvalidArgument: if `source` or an option is none of these.
    """
    if part and not isinstance(source, (Mapping, str, Path)):
        raise InvalidArgument(f"ww_monitor: part is for mappings and files; got {part!r} with {type(source).__name__}")
    keras = sys.modules.get("keras")  # whoever has a Keras model has imported it
    if keras is not None and isinstance(source, keras.layers.Layer):  # on its torch backend also an nn.Module
        from ww_monitor.walk.keras import walk_keras

        return walk_keras(source, split=split)
    if isinstance(source, nn.Module):
        from ww_monitor.walk.torch import walk

        return walk(source, split=split, experts=experts, lora=lora, layout=layout)
    if isinstance(source, Mapping):
        from ww_monitor.walk.state_dict import walk_state_dict

        return walk_state_dict(source, split=split, part=part)
    if isinstance(source, (str, Path)):
        from ww_monitor.walk.files import walk_files

        return walk_files(source, split=split, part=part)
    raise InvalidArgument(
        "ww_monitor: model must be a torch.nn.Module, a Keras model, a mapping from names to tensors, or a path; "
        f"got {type(source).__name__}"
    )

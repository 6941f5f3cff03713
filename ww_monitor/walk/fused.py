"""Projections that models store fused: which names they have, and where they may be cut.

The layouts are read off the `forward` of the models in transformers 5.23 and timm 1.0. A weight is cut only where its
sizes are certain; `split` of the walkers cuts, or with 1 keeps whole, whatever this file does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import Tensor, nn

from ww_monitor.walk.parts import KERNEL, WHOLE, Part, blocks, each_expert, halves, interleaved_heads

_GATES = (((nn.LSTM, nn.LSTMCell), "ifgo"), ((nn.GRU, nn.GRUCell), "rzn"))
_QKV = ("q", "k", "v")
_OF_CLASS = {  # attentions that put their rows in another order than the others with a projection of that name
    ("qkv_proj", "MiniMaxLightningAttention"): "interleaved",
    ("in_proj", "DisentangledSelfAttention"): "interleaved",
    ("qkv_proj", "CodeGenAttention"): "unknown",
    ("gate_up_proj", "Phi4MultimodalAudioMLP"): "unknown",
}
_ORDER = {
    **dict.fromkeys(("c_attn", "qkv", "qkv_proj", "Wqkv", "in_proj"), "blocks"),
    "query_key_value": "interleaved",
    "gate_up_proj": "halves",
}
_WITHOUT_OWNER = ("c_attn", "qkv", "Wqkv", "gate_up_proj")  # names with one meaning in every family with such a layer


def hint(owner: object, attribute: str) -> object:
    """What an object has under a name, or `None`: a property of the user's own that fails tells nothing."""
    try:
        return getattr(owner, attribute, None)
    except Exception:  # noqa: BLE001 - the weight can be read all the same
        return None


def recurrent_parts(module: nn.RNNBase | nn.RNNCellBase) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """weight_ih and weight_hh of every layer and direction, cut into gates, and the projection weight_hr, whole."""
    gates = next((gates for known, gates in _GATES if isinstance(module, known)), "")
    cut = blocks(gates, (module.hidden_size,) * len(gates)) if gates else WHOLE
    ends = [""]
    if isinstance(module, nn.RNNBase):
        directions = ("", "_reverse")[: 1 + module.bidirectional]
        ends = [f"_l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]
    for end in ends:
        for stem in ("weight_ih", "weight_hh", "weight_hr"):
            yield stem + end, WHOLE if stem == "weight_hr" else cut


def fused_parts(name: str, shape: Sequence[int], axis: int, owner: nn.Module | None) -> tuple[Part, ...]:
    """The named parts of a fused projection; nothing if the weight is none or its layout is not certain.

    Args:
        name: Dotted name of the weight.
        shape: Its two dimensions.
        axis: The output axis: 0, or 1 for the transposed linear layer of GPT-2.
        owner: The module that holds the layer, or `None` where there are tensors only.

    >>> [part.end for part in fused_parts("blocks.0.attn.qkv", (96, 32), 0, None)]
    ['q', 'k', 'v']
    """
    last = name.rpartition(".")[2]
    order = _OF_CLASS.get((last, type(owner).__name__), _ORDER.get(last, "unknown"))
    if order == "unknown" or (owner is None and last not in _WITHOUT_OWNER):
        return ()
    outputs, inputs = shape[axis], shape[1 - axis]
    if order == "halves":
        return halves(outputs, axis, alternate=False) if outputs % 2 == 0 else ()
    if last == "c_attn" and axis == 1 and outputs == 2 * inputs:
        return blocks(("k", "v"), (inputs, inputs), axis)  # the cross-attention of GPT-2: the queries have their own
    if last == "in_proj" and outputs != 3 * inputs and order == "blocks":
        return ()  # the input projection of Mamba and LFM2 is no attention
    # LFM2's convolution has an in_proj of three parts and a configuration with heads, but no heads itself.
    heads = None if owner is None else _heads(owner, outputs, config=last != "in_proj")
    # GPTBigCode without shared keys has a head's query, key and value behind each other in its c_attn.
    if order == "interleaved" or hint(owner, "multi_query") is False:
        return interleaved_heads(*heads) if heads and heads[2] else ()
    if heads is None:
        return blocks(_QKV, (inputs,) * 3, axis) if outputs == 3 * inputs and last != "in_proj" else ()
    queries, keys, width = heads
    return blocks(_QKV, (queries * width, keys * width, keys * width), axis) if width else ()


def _heads(owner: nn.Module, outputs: int, *, config: bool) -> tuple[int, int, int] | None:
    """How many heads of queries, and of keys and values, an attention or its configuration says it has, or `None`.

    The third number is the rows of a head in a fused weight with `outputs` rows, 0 where they do not fit.
    """
    sources = (owner, hint(owner, "config")) if config else (owner,)
    queries = _first(sources, ("num_attention_heads", "num_heads", "n_heads"))
    if not queries:
        return None
    keys = _first(sources, ("num_key_value_heads", "num_kv_heads", "kv_heads")) or queries
    count = queries + 2 * keys
    width = _first(sources, ("head_dim", "head_size")) or outputs // count
    return queries, keys, width if count * width == outputs and queries % keys == 0 else 0


def _first(sources: Sequence[object], attributes: Sequence[str]) -> int:
    """The first of the attributes that is a positive integer, or 0."""
    values = (hint(source, attribute) for source in sources for attribute in attributes)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


# --- experts


def stacked_kernels(owner: object, attribute: str, shape: Sequence[int]) -> tuple[Part, ...]:
    """A kernel a row of `[E, n]`, where the module says the shape of a row under `<attribute>_shape`; else nothing.

    So are the experts of a conditionally parametrised convolution stored (Yang et al. 2019, arXiv:1904.04971).
    """
    declared = hint(owner, f"{attribute}_shape")
    sizes = declared if isinstance(declared, (tuple, list)) and all(type(size) is int for size in declared) else ()
    if len(shape) != 2 or len(sizes) < 3 or prod(sizes) != shape[1]:
        return ()
    return tuple(Part(str(row), partial(_kernel_of_row, row=row, sizes=tuple(sizes))) for row in range(shape[0]))


def _kernel_of_row(tensor: Tensor, row: int, sizes: tuple[int, ...]) -> Tensor:
    return KERNEL[0].take(tensor[row].view(sizes))


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of a layer store gate and up projection in one tensor: along which axis, and if alternating."""

    axis: int
    alternate: bool = False


def declared_layout(owner: nn.Module) -> ExpertLayout | None:
    """The layout that an experts module of transformers declares, or `None`."""
    transposed, concatenated = hint(owner, "is_transposed"), hint(owner, "is_concatenated")
    if not isinstance(transposed, bool) or not isinstance(concatenated, bool):
        return None
    return ExpertLayout(2 if transposed else 1, alternate=not concatenated)


def layout_beside(fused: Sequence[int], down: Sequence[int] | None) -> ExpertLayout | None:
    """The layout that follows from the down projection: `[E, 2I, H]` beside `[E, H, I]`, or both transposed."""
    if down is None or len(down) != 3:
        return None
    if (fused[1], fused[2]) == (2 * down[2], down[1]):
        return ExpertLayout(1)
    return ExpertLayout(2) if (fused[1], fused[2]) == (down[2], 2 * down[1]) else None


def layout_of(owner: nn.Module, shape: Sequence[int]) -> ExpertLayout | None:
    """The layout of a stack of experts of that shape, which its module declares or the stack beside it tells."""
    return declared_layout(owner) or layout_beside(shape, getattr(hint(owner, "down_proj"), "shape", None))


def holds_inputs_first(owner: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a stack of experts, or the one beside it, has its outputs last."""
    like = hint(owner, "gate_up_proj")
    if len(shape) != 3 or like is None:
        return False
    layout = layout_of(owner, tuple(getattr(like, "shape", shape)))
    return layout is not None and layout.axis == 2


def expert_parts(
    attribute: str, shape: Sequence[int], layout: ExpertLayout | None, *, separate: bool
) -> tuple[Part, ...]:
    """The matrices of a stack of experts `[E, a, b]`: gate and up apart where the layout is known."""
    parts: tuple[Part, ...] = WHOLE
    if attribute == "gate_up_proj" and layout is not None and shape[layout.axis] % 2 == 0:
        parts = halves(shape[layout.axis], layout.axis, alternate=layout.alternate)
    return tuple(each_expert(parts, shape[0])) if separate else parts

"""A PyTorch model → its weight matrices, read in place and without a trace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ww_monitor.errors import InvalidArgument, check_choice
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import factors, fused, names, parts, reading
from ww_monitor.walk import lora as adapters
from ww_monitor.walk.modules import class_name, modules, names_in, unwrap
from ww_monitor.walk.parts import KERNEL, WHOLE, Part, Split
from ww_monitor.walk.quantized import FLOAT8, UNSCALED
from ww_monitor.walk.roles import infer_role
from ww_monitor.walk.sharded import Layout, by_unit, like_whole, shards_of, units
from ww_monitor.walk.state_dict import meaning
from ww_monitor.walk.unread import Unread, unread

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS: Mapping[Kind, tuple[type[nn.Module], ...]] = {
    Kind.DENSE: (nn.Linear, nn.Bilinear),
    Kind.EMBEDDING: (nn.Embedding, nn.EmbeddingBag),
    Kind.CONV: _CONVOLUTIONS,
}
_QUANTIZED = (
    ("torch.ao.nn.quantized.modules.utils", "WeightedQuantizedModule"),
    ("torch.ao.nn.quantized.modules.embedding_ops", "Embedding"),
    ("torch.ao.nn.quantized.dynamic.modules.rnn", "RNNBase"),
    ("torch.ao.nn.quantized.dynamic.modules.rnn", "RNNCellBase"),
)
_ROUTER = re.compile("[Rr]outer|Gate(?!d)|(?<![a-z])gate")  # class names of what sends tokens to experts
_PACKED = ("weight", "qweight", "W_q")  # where quantised modules keep their integers


def walk(
    model: nn.Module,
    *,
    split: Split | None = None,
    experts: Literal["separate", "pooled"] = "separate",
    lora: Sequence[str] = ("base", "delta"),
    layout: Layout | None = None,
) -> Iterator[Matrix | Skipped]:
    """The weight matrices of `model` in module order, and what was left out with the reason.

    A kernel `[a, b, *k]` gives prod(k) slices a × b, a bilinear weight one slice an output; the stacked projections
    of an attention, the stacked gates of a recurrent layer, known fused projections (`c_attn.q`, `gate_up_proj.up`)
    and stacked experts (`experts.down_proj.3`) are cut apart. Frozen weights are included, tied ones appear once
    under their first name, quantised ones are dequantised by `load` where their class offers it. Nothing is read
    before `Matrix.load` is called, and reading leaves the model, its buffers, its training flags and the random
    generators as they were.

    Args:
        model: Any module; wrappers (`torch.compile`, data parallel, FSDP, activation checkpointing) leave no mark on
            the names, nor does the `base_layer` of a LoRA adapter.
        split: Globs on the names of dense weights, each with the number of equal parts or the sizes of the parts that
            its outputs are cut into, named `.0`, `.1`, …; the first match counts, and 1 keeps a fused weight whole.
        experts: `"separate"` for one matrix an expert, `"pooled"` for one matrix with a slice an expert.
        lora: What is listed of a weight with LoRA adapters: `"base"` under its own name, `"delta"` (s·B·A of every
            adapter, as `<name>.lora[<adapter>]`) and `"merged"` (base plus active adapters, as `<name>.merged`).
        layout: For a plan, which reads nothing: how stored tensors lie on ranks, in place of `sharded.shards_of`;
            weights on the meta device are listed then too.

    Returns:
        A `Matrix` for every weight, a `Skipped` for every parameter of two or more dimensions that is none or cannot
        be read. The tensors behind a parametrization are part of the weight they make and are not listed. While it is
        consumed, it raises `InvalidArgument` if the sizes of a `split` do not add up.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Conv2d(4, 6, kernel_size=3))
    >>> [(matrix.name, matrix.kind, matrix.shape) for matrix in walk(net)]
    [('0', 'dense', (1, 4, 8)), ('2', 'conv', (9, 6, 4))]
    """
    parts.check_split("walk", split)
    check_choice("walk", "experts", experts, ("separate", "pooled"))
    adapters.check_lora("walk", lora)
    root = unwrap(model)
    inside, found = units(model), adapters.find_adapters(root)
    own = {} if inside else factors.of_modules(modules(root, "", set()))
    split = parts.resolved(split, list(names_in(root))) if split else None
    scaled = any(reading.is_scaled(module) for module in root.modules())
    return _walk(root, _Walk(split, experts == "separate", tuple(lora), layout, found, inside, scaled, own))


@dataclass(frozen=True)
class _Walk:
    """What one walk was asked for, and what it has met."""

    split: Split | None
    separate: bool
    lora: tuple[str, ...]
    layout: Layout | None
    adapters: adapters.Adapters
    units: dict[int, nn.Module]  # FSDP1's, by the modules in them
    scaled: bool  # whether eight-bit floats have scales
    factors: Mapping[str, Unread]  # of low-rank adapters of a user's own, and their alphas
    owners: dict[str, nn.Module] = field(default_factory=dict)  # by cleaned path
    seen: dict[object, str] = field(default_factory=dict)  # the first name of a stored tensor, by its identity
    owned: dict[object, str] = field(default_factory=dict)  # the same, of known layers, from the start

    def identity(self, module: nn.Module, stored: torch.Tensor | None) -> object:
        """What tied weights have in common: of a unit that is gathered again and again, the place in its storage."""
        unit = self.units.get(id(module))
        if unit is None or stored is None:
            return reading.identity(stored)
        return id(unit), stored.storage_offset(), stored.shape, stored.stride()


def _walk(root: nn.Module, this: _Walk) -> Iterator[Matrix | Skipped]:
    # FSDP1's weights have no storage that tells them until their unit is gathered.
    for path, module in modules(root, "", set()) if not this.units else ():
        if isinstance(module, tuple(chain(*_KINDS.values()))) and (own := reading.own_parameters(module)):
            this.owned.setdefault(this.identity(module, own.get("weight")), path or class_name(root))
    this.owned.pop(None, None)  # weights that are computed, which are tied to nothing
    found = by_unit(modules(root, "", set()), this.units, partial(_items_of, this))
    return parts.unique(item if item.name else replace(item, name=class_name(root)) for item in found)


def _items_of(this: _Walk, path: str, module: nn.Module) -> list[Matrix | Skipped]:
    """The items of one module, which know whether it trains."""
    this.owners.setdefault(path, module)  # a module comes before its children, which ask for their owner
    frozen = not any(parameter.requires_grad for _, parameter in reading.all_parameters(module))
    adapted = bool(this.factors) or adapters.trains(this.adapters, module)
    items = _items(module, path, this)  # consumed here: a unit of FSDP is gathered for this call only
    still = ((item, frozen and not (adapted and adapters.is_adapted(item.name))) for item in items)
    return [replace(item, frozen=True) if frozen and isinstance(item, Matrix) else item for item, frozen in still]


# --- which attributes of a module are weights


def _join(path: str, attribute: str) -> str:
    """The dotted name of a parameter, without the plain `weight`."""
    return parts.joined(path, "" if attribute == "weight" else attribute)


@dataclass(frozen=True)
class _Weight:
    """A weight of a module.

    Attributes:
        attribute: Where the module has it.
        kind: The kind of its matrices.
        parts: What it is cut into by the definition of its class, or `None` where its name and owner decide.
        stem: What the names of the parts start with after the path, `None` for the attribute.
        axis: The output axis.
        role: The role of its matrices, or `None` where their name tells.
    """

    attribute: str
    kind: Kind
    parts: tuple[Part, ...] | None = WHOLE
    stem: str | None = None
    axis: int = 0
    role: str | None = None


def _weights(module: nn.Module, path: str) -> Iterator[_Weight]:
    """The weights that a module has by its class, absent ones included, and the stacks of experts it holds itself."""
    if isinstance(module, nn.MultiheadAttention):
        embed_dim = module.embed_dim
        yield _Weight("in_proj_weight", Kind.ATTENTION, parts.blocks("qkv", (embed_dim,) * 3), "")
        for part in "qkv":  # instead of the one above where keys or values have another width
            yield _Weight(f"{part}_proj_weight", Kind.ATTENTION, parts.blocks(part, (embed_dim,)), "")
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        yield from (_Weight(name, Kind.RECURRENT, cut) for name, cut in fused.recurrent_parts(module))
    elif isinstance(module, adapters.loaded("transformers.pytorch_utils", "Conv1D")):
        yield _Weight("weight", Kind.DENSE, None, axis=1)
    elif kind := next((kind for kind, known in _KINDS.items() if isinstance(module, known)), None):
        fixed = None if isinstance(module, nn.Linear) else KERNEL if kind is Kind.CONV else WHOLE
        yield _Weight("weight", kind, fixed, axis=int(kind is Kind.CONV and bool(module.transposed)))
    else:
        yield from _bare_weights(module, path)


def _bare_weights(module: nn.Module, path: str) -> Iterator[_Weight]:
    """The weights among the parameters of a module of an unknown class: a router, quantised ones, stacked experts."""
    tensors, parameters = reading.own_tensors(module), reading.own_parameters(module)
    own_class = class_name(module)
    for attribute, tensor in tensors.items():
        if is_lazy(tensor):
            continue
        size = reading.shape(like_whole(tensor))
        if attribute in _PACKED and reading.is_coded(module, attribute, tensor):
            yield _Weight(attribute, Kind.DENSE, None, stem="")
        elif attribute in parameters and tensor.is_floating_point():
            routes = attribute == "weight" and len(size) == 2 and _ROUTER.search(own_class)
            if routes or parts.is_expert_stack(f"{path}.{own_class}", size):
                yield _Weight(attribute, Kind.DENSE, None)


# --- from attributes to items


def _items(module: nn.Module, path: str, this: _Walk) -> Iterator[Matrix | Skipped]:
    """The matrices of one module, then its parameters of two or more dimensions that are no known weight."""
    left_out = reading.holds_no_weights(module)
    if left_out or any(isinstance(module, adapters.loaded(home, name)) for home, name in _QUANTIZED):
        yield Skipped(path, Kind.OTHER, (), left_out or "a quantized module: no floating-point weight")
        return
    if adapters.is_adapter(module):
        yield from adapters.factors(module, path)
        return
    yield from adapters.originals(module, path)
    weights = [_stored(module, weight) for weight in _weights(module, path)]
    for weight in weights:
        if parts.joined(path, weight.attribute) not in this.factors:
            yield from _cut_weight(module, path, weight, this)
    for attribute in reading.own_parameters(module):
        yield from factors.live_delta(parts.joined(path, attribute), this.factors, this.owners, this.lora)
    yield from _leftovers(module, path, weights, this)


def _stored(module: nn.Module, weight: _Weight) -> _Weight:
    """The weight, read from the parameter that it is made of where a hook of an unknown kind makes it."""
    attribute = reading.made_of(module, weight.attribute)
    stem = "" if weight.attribute == "weight" else weight.attribute
    return weight if attribute == weight.attribute else replace(weight, attribute=attribute, stem=weight.stem or stem)


@torch.no_grad()
def _cut_weight(module: nn.Module, path: str, weight: _Weight, this: _Walk) -> list[Matrix | Skipped]:
    """The matrices of one weight, or the reason why there are none; nothing for an optional weight that is absent."""
    attribute, name = weight.attribute, _join(path, weight.attribute)
    size: tuple[int, ...] = ()
    try:
        like = reading.stand_in(module, attribute)
        if like is None:
            absent = Skipped(name, weight.kind, (), "no weight tensor in the module: packed or sharded elsewhere")
            return [absent] if attribute == "weight" else []
        dense = reading.dequantized_shape(module, attribute, like)
        size = dense or reading.shape(like)
        key = this.identity(module, reading.own_tensors(module).get(attribute))
        refused = "" if dense else reading.refusal(module, attribute, like)
        reason = "" if dense else refused or reading.defect(like, weight.kind, planned=this.layout is not None)
        if this.scaled and like.dtype in FLOAT8 and not dense:
            reason = reason or UNSCALED
        layer = this.adapters.get((id(module), attribute))
        if (reason and layer is None) or key in this.seen:
            return [Skipped(name, weight.kind, size, reason or reading.tied_to(this.seen.get(key)))]
        size = adapters.weight_shape(layer) if reason else size
        items: list[Matrix | Skipped] = []
        load = partial(reading.read_dense, module, attribute)
        for item, part in _parts(module, path, weight, size, this):
            items += [item] if layer is None else adapters.adapted(item, part, layer, load, this.lora, reason)
    except InvalidArgument:  # the caller's `split` does not fit: that is to be told, not listed
        raise
    except Exception as error:  # noqa: BLE001 - the user's code runs here, and one broken layer must not end the walk
        return [Skipped.unread(name, weight.kind, size, error)]
    if key is not None:  # only what could be read: a tied weight that fails here may be readable elsewhere
        this.seen[key] = name
    return items


def _parts(
    module: nn.Module, path: str, weight: _Weight, size: tuple[int, ...], this: _Walk
) -> Iterator[tuple[Matrix, Part]]:
    """The matrices of a weight of shape `size`, each with the part of the weight that it is."""
    name = _join(path, weight.attribute if weight.stem is None else weight.stem)
    load = partial(reading.read_dense, module, weight.attribute)
    role = infer_role(name, weight.kind) if weight.role is None else weight.role
    stored, computed = reading.sources(module, weight.attribute)
    for part in weight.parts or _cut(module, name, weight, size, this):
        shards = (this.layout or shards_of)(stored, part.stack, size, computed=computed)
        item = parts.matrix(name, weight.kind, part, size, load, role, shards)
        inputs_first = weight.axis == 1 or fused.holds_inputs_first(module, size)
        rows = int(getattr(module, "groups", 1)) if weight.kind is Kind.CONV else 1
        yield replace(item, inputs_first=inputs_first, groups=(rows, 1)), part


def _cut(module: nn.Module, name: str, weight: _Weight, size: tuple[int, ...], this: _Walk) -> tuple[Part, ...]:
    """The parts of a dense weight that its name, its owner and the caller decide."""
    if len(size) == 3:
        return fused.expert_parts(weight.attribute, size, fused.layout_of(module, size), separate=this.separate)
    owner = this.owners.get(name.rpartition(".")[0])
    wished = parts.split_parts(this.split, name, size, weight.axis)
    return wished or fused.fused_parts(name, size, weight.axis, owner) or WHOLE


def _leftovers(module: nn.Module, path: str, weights: list[_Weight], this: _Walk) -> Iterator[Matrix | Skipped]:
    """The module's own tensors of two or more dimensions that none of `weights` stands for: parameters and the rest."""
    # pruning, spectral and weight norm register their tensors under these ends
    ends = ("", "_orig", "_g", "_v", "_u", "_mask")
    listed = {weight.attribute + end for weight in weights for end in ends}
    tensors, parameters = reading.own_tensors(module), reading.own_parameters(module)
    for name, (stored, _) in reading.made_by_hooks(module).items():
        listed |= {name + end for end in ends[1:]}
        if name not in listed and stored in parameters:
            tensors[name] = parameters[name] = parameters[stored]
    if parametrize.is_parametrized(module):
        computed = module.get_submodule("parametrizations").named_children()
        found = {attribute: reading.originals(functions)[-1] for attribute, functions in computed}
        tensors, parameters = tensors | found, parameters | found
    # where a parameter is partitioned its shape is that of the whole
    tensors = {name: like_whole(tensor) for name, tensor in tensors.items() if not is_lazy(tensor)}
    beside = {name: unread(tensor, tensor.detach) for name, tensor in tensors.items()}
    scales = reading.scales_in(module, tensors)
    for attribute, tensor in tensors.items():
        if attribute in listed or tensor.ndim < 2:
            continue
        if attribute in parameters and attribute not in scales:
            if parts.joined(path, attribute) not in this.factors:
                yield from _by_name(module, path, attribute, beside, this)
            continue
        kept = "integer weights" * (attribute == "weight")
        kept = names.BUFFER if tensor.is_floating_point() else reading.refusal(module, attribute, tensor) or kept
        reason = f"scales of {scales[attribute]}" if attribute in scales else kept
        if reason:
            yield Skipped(_join(path, attribute), Kind.OTHER, reading.shape(tensor), reason)


def _by_name(
    module: nn.Module, path: str, attribute: str, beside: Mapping[str, Unread], this: _Walk
) -> Iterator[Matrix | Skipped]:
    """What a state dict's rules make of a parameter that no known layer owns."""
    siblings = {parts.joined(path, name): value for name, value in beside.items()}
    key = parts.joined(path, attribute)
    kind, cuts, reason = meaning(key, siblings[key], siblings, this.split)
    if kernels := fused.stacked_kernels(module, attribute, siblings[key].shape):
        kind, cuts = Kind.CONV, kernels
    reason = factors.other_adapter(key) or reason
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):  # with as many dimensions as what they normalise
        reason = f"parameters of {class_name(module)} are not a known weight"
    own = this.identity(module, reading.own_tensors(module).get(attribute))
    reason = reading.tied_to(this.seen.get(own, this.owned.get(own))) or reason
    if reason:
        yield Skipped(_join(path, attribute), Kind.OTHER, siblings[key].shape, reason)
        return
    stem = "" if kind is Kind.ATTENTION else None
    role = infer_role(path if kind is Kind.ATTENTION else _join(path, attribute), kind)
    yield from _cut_weight(module, path, _Weight(attribute, Kind.PARAMETER, cuts, stem, role=role), this)

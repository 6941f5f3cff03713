"""Named tensors without their modules → weight matrices, by what names and shapes alone can tell."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from torch import Tensor

from ww_monitor.errors import InvalidArgument, SpectralWarning
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import factors, fused, names, parts
from ww_monitor.walk.containers import AVERAGE, choose, of_others
from ww_monitor.walk.factors import Scaling
from ww_monitor.walk.lora import ORIGINAL
from ww_monitor.walk.packed import readable
from ww_monitor.walk.parts import WHOLE, WRAPPERS, Part, Split
from ww_monitor.walk.reading import tied_to
from ww_monitor.walk.roles import infer_role
from ww_monitor.walk.unread import Unread, layout, unread

_EMBEDDING = re.compile(r"(.*_)?(embed(ding)?s?|emb|wte|wpe)(_(?!out).*)?|[a-z]*embed", re.IGNORECASE)
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
_COMPUTED = "stored before pruning or a parametrization, which needs the model"


def walk_state_dict(
    tensors: Mapping[str, Tensor], *, split: Split | None = None, part: str = ""
) -> Iterator[Matrix | Skipped]:
    """The weight matrices among named tensors, in their order, and what was left out with the reason.

    Without module classes, names and shapes must tell: `*.weight` of two dimensions is dense, or an embedding if its
    module is called so; of three to five dimensions a kernel; `in_proj_weight` is the q, k and v of an attention;
    `weight_ih_*` and `weight_hh_*` are recurrent and stay whole; a stack `[experts, rows, columns]` under a name with
    "expert" or "moe" gives one matrix an expert; the two factors of a low-rank adapter give their delta B·A. Of the
    fused projections those are cut whose layout needs no module (`c_attn`, `qkv`, `Wqkv`, `gate_up_proj`). Whatever
    else has two sides is a parameter, unless its name says that it is a table of positions, a mask, a bias or a buffer.

    Args:
        tensors: A state dict; the prefixes of data parallel and of `torch.compile` leave no mark on the names.
        split: Globs on the names of dense weights, each with the number of equal parts or the sizes of the parts that
            its first axis is cut into, named `.0`, `.1`, …; the first match counts, and 1 keeps a fused weight whole.
        part: Which of several state dicts one in another to read, by its path (`"generator"`, `"model.ema"`). Without
            it all are read, their names with that path in front, but for a moving average of another; a
            `SpectralWarning` says so.

    Returns:
        A `Matrix` for every weight, a `Skipped` for every other tensor of two or more dimensions and for what is none.

    Raises:
        InvalidArgument: if `tensors` is no mapping, has no tensors of two or more dimensions beside what is no tensor,
            has no such `part`, or `split` is malformed.

    >>> import torch
    >>> tensors = {"fc.weight": torch.zeros(4, 8), "fc.bias": torch.zeros(4), "conv.weight": torch.zeros(6, 4, 3, 3)}
    >>> [(matrix.name, matrix.kind, matrix.shape) for matrix in walk_state_dict(tensors)]
    [('fc', 'dense', (1, 4, 8)), ('conv', 'conv', (9, 6, 4))]
    """
    parts.check_split("walk_state_dict", split)
    if not isinstance(tensors, Mapping):
        raise InvalidArgument(f"walk_state_dict: tensors must be a mapping; got {type(tensors).__name__}")
    if not tensors and not part:
        return iter(())
    chosen = choose(tensors, part, "walk_state_dict")
    if chosen.said:
        warnings.warn(chosen.said, SpectralWarning, stacklevel=2)
    found = {
        parts.joined(prefix, name): unread(tensor, tensor.detach)
        for prefix, one in chosen.state_dicts.items()
        for name, tensor in one.tensors.items()
    }
    return chain(walk_unread(found, split), of_others(chosen))


def walk_unread(
    tensors: Mapping[str, Unread], split: Split | None = None, scaling: Scaling | None = None
) -> Iterator[Matrix | Skipped]:
    """`walk_state_dict` of tensors that are not read yet, with the scaling of LoRA deltas (1 if it is not known)."""
    return parts.unique(_walk(tensors, split, scaling))


def _walk(tensors: Mapping[str, Unread], split: Split | None, scaling: Scaling | None) -> Iterator[Matrix | Skipped]:
    tensors = readable(_cleaned(tensors))
    split = parts.resolved(split, [_name(key) for key in tensors])
    seen: dict[object, str] = {}
    copies = _undotted_copies(tensors)
    for key, value in tensors.items():
        if len(value.shape) < 2:
            continue
        if key in copies:
            yield Skipped(key, Kind.OTHER, value.shape, f"a copy of {copies[key]}, averaged")
            continue
        own = value.identity is None or factors.factor_of(key)  # a factor may serve several layers: each has its delta
        if not own and value.identity in seen:
            yield Skipped(_name(key), Kind.OTHER, value.shape, tied_to(seen[value.identity]))
            continue
        items = list(_items(key, value, tensors, split, scaling))
        if not own and any(isinstance(item, Matrix) for item in items):
            seen[value.identity] = _name(key)
        yield from items


def _undotted_copies(tensors: Mapping[str, Unread]) -> dict[str, str]:
    """Buffers of an average that are called as a parameter without its dots → that parameter; so LitEma keeps them."""
    names = ((key, name) for key in tensors for name in (key, key.partition(".")[2]) if "." in name)
    plain = {name.replace(".", ""): key for key, name in names}
    found = {key: plain.get(key.rpartition(".")[2]) for key in tensors if AVERAGE.search(key.rpartition(".")[0])}
    return {key: other for key, other in found.items() if other and tensors[key].shape == tensors[other].shape}


def _cleaned(tensors: Mapping[str, Unread]) -> dict[str, Unread]:
    """The tensors by their names without wrappers; `module.` goes where every name starts with it."""
    dropped = (*WRAPPERS, "base_layer") if any(factors.factor_of(key) for key in tensors) else WRAPPERS
    plain = {key: ".".join(part for part in _saved(key, tensors).split(".") if part not in dropped) for key in tensors}
    counts = Counter(plain.values())  # names that would be one keep their wrappers
    found = {name if counts[name] == 1 else key: tensors[key] for key, name in plain.items()}
    while found and all(key.startswith("module.") for key in found):  # else it is an attribute of that name
        found = {key.removeprefix("module."): value for key, value in found.items()}
    return factors.of_parameters_left_out(found)


def _saved(key: str, tensors: Mapping[str, Unread]) -> str:
    """The name without PEFT's mark of a copy of a module that trains, which is in the place of the original."""
    module, mark, rest = key.partition(".modules_to_save.")
    return (
        f"{module}.{rest.partition('.')[2]}"
        if mark and f"{module}.original_module.{rest.partition('.')[2]}" in tensors
        else key
    )


def _name(key: str) -> str:
    """The name of the module where the tensor is its plain weight, else the key."""
    return key.removesuffix(".weight")


def _items(
    key: str, value: Unread, tensors: Mapping[str, Unread], split: Split | None, scaling: Scaling | None
) -> Iterator[Matrix | Skipped]:
    """The matrices of one tensor of two or more dimensions, or the reason why there are none."""
    if factor := factors.factor_of(key):
        yield from factors.delta(key, factor, tensors, scaling)
        return
    kind, cuts, reason = meaning(key, value, tensors, split, stored=True)
    if ".original_module." in key and key.replace(".original_module.", ".") in tensors:
        reason = ORIGINAL
    if other := factors.other_adapter(key):
        kind, reason = Kind.OTHER, other
    unknown = "a storage type that is not read"
    reason = value.reason or reason or (unknown if value.dtype is None else parts.unfit(value.dtype, value.shape, kind))
    if reason:
        yield Skipped(_name(key), kind, value.shape, reason)
        return
    name = key.rpartition(".")[0] if kind is Kind.ATTENTION else _name(key)
    for part in cuts:
        shards = layout([value], part.stack, value.shape)
        item = parts.matrix(name, kind, part, value.shape, value.read, infer_role(name, kind), shards)
        yield replace(item, inputs_first=_inputs_first(name, value.shape))


def _inputs_first(path: str, shape: Sequence[int]) -> bool:
    """Whether a weight of GPT-2's names is stored [in, out]: it has more outputs than inputs, or in `c_proj` fewer."""
    last, rows, columns = path.rpartition(".")[2], shape[0], shape[1]
    more = (last in ("c_attn", "c_fc") and columns > rows) or (last == "c_proj" and rows > columns)
    return len(shape) == 2 and more


def meaning(
    key: str, value: Unread, tensors: Mapping[str, Unread], split: Split | None, *, stored: bool = False
) -> tuple[Kind, tuple[Part, ...], str]:
    """The kind of a tensor, its parts, and why it is no weight if it is none.

    Args:
        key: Its dotted name.
        value: What is known of it.
        tensors: Those beside it, by their names.
        split: The caller's own cuts.
        stored: Whether it may be a buffer; else it is known to be a parameter.
    """
    path, _, attribute = key.rpartition(".")
    rows, ndim = value.shape[0], len(value.shape)
    if stored and _is_computed(key, tensors):
        return Kind.OTHER, (), _COMPUTED
    if _RECURRENT.fullmatch(attribute):
        return Kind.RECURRENT, WHOLE, ""
    if attribute == "in_proj_weight" and ndim == 2 and rows % 3 == 0:
        return Kind.ATTENTION, parts.blocks("qkv", (rows // 3,) * 3), ""
    if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight") and ndim == 2:
        return Kind.ATTENTION, parts.blocks(attribute[0], (rows,)), ""
    if attribute != "weight" and parts.is_expert_stack(path, value.shape):
        beside = tensors.get(f"{path}.down_proj")
        layout = fused.layout_beside(value.shape, beside.shape if beside else None)
        declared = None if f"{key}_bias" in tensors else layout  # with a bias the two may alternate, as in GPT-OSS
        return Kind.DENSE, fused.expert_parts(attribute, value.shape, declared, separate=True), ""
    if attribute != "weight" or ndim > 2:
        return _by_shape(key, value, called_weight=attribute == "weight", stored=stored)
    if _EMBEDDING.fullmatch(path.rpartition(".")[2]):
        return Kind.EMBEDDING, WHOLE, ""
    transposed = path.endswith("c_attn") and value.shape[1] in (2 * rows, 3 * rows)  # GPT-2 stores [in, out]
    wished = parts.split_parts(split, path, value.shape, int(transposed))
    return Kind.DENSE, wished or fused.fused_parts(path, value.shape, int(transposed), None) or WHOLE, ""


def _is_computed(key: str, tensors: Mapping[str, Unread]) -> bool:
    """Whether a weight is made of a tensor: by torch's parametrizations, or by pruning and norms of the older kind."""
    stem, _, end = key.rpartition("_")
    shape = {name: tensors[f"{stem}_{name}"].shape for name in "guv" if f"{stem}_{name}" in tensors}
    if end in ("v", "g") and "v" in shape and "g" in shape:  # lengths, of the slices along one dimension or of all
        lengths = [(size, whole) for size, whole in zip(shape["g"], shape["v"], strict=False) if size > 1]
        fits = len(shape["g"]) in (0, len(shape["v"])) and len(lengths) < 2
        return fits and all(size == whole for size, whole in lengths)
    mask = tensors.get(f"{stem}_mask")
    pruned = mask is not None and mask.shape == tensors[key].shape
    return "parametrizations" in key.split(".") or (end == "orig" and (pruned or len(shape.get("u", ())) == 1))


def _by_shape(key: str, value: Unread, *, called_weight: bool, stored: bool) -> tuple[Kind, tuple[Part, ...], str]:
    """What the shape tells of a tensor whose name does not say which layer owns it."""
    found = names.read_shape(value.shape, called_weight=called_weight)
    floating = value.dtype is None or value.dtype.is_floating_point  # what is not says so itself
    reason = (names.no_weight(key, stored=stored) or found.reason) if floating else ""
    return (Kind.OTHER, (), reason) if reason else (Kind.CONV if found.kernel else Kind.PARAMETER, found.parts, "")

"""A PyTorch model → its weight matrices, read in place and without a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ww_monitor.matrices import Matrix, Skipped
from ww_monitor.walk.roles import infer_role

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "dense"),
    (nn.Bilinear, "dense"),
    (nn.Embedding, "embedding"),
    (nn.EmbeddingBag, "embedding"),
    (nn.Conv1d, "conv"),
    (nn.Conv2d, "conv"),
    (nn.Conv3d, "conv"),
    (nn.ConvTranspose1d, "conv"),
    (nn.ConvTranspose2d, "conv"),
    (nn.ConvTranspose3d, "conv"),
)
_GATES = (((nn.LSTM, nn.LSTMCell), "ifgo"), ((nn.GRU, nn.GRUCell), "rzn"))
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_QUANTIZED = (
    ("torch.ao.nn.quantized.modules.utils", "WeightedQuantizedModule"),
    ("torch.ao.nn.quantized.modules.embedding_ops", "Embedding"),
    ("torch.ao.nn.quantized.dynamic.modules.rnn", "RNNBase"),
    ("torch.ao.nn.quantized.dynamic.modules.rnn", "RNNCellBase"),
)
_OTHER = "other"  # the kind of a `Skipped` that no known module owns


def walk(model: nn.Module) -> Iterator[Matrix | Skipped]:
    """The weight matrices of `model` in module order, and what was left out with the reason.

    A kernel `[a, b, *k]` gives prod(k) slices a × b, a bilinear weight one slice an output; the stacked projections
    of an attention and the stacked gates of a recurrent layer are cut apart. Frozen weights are included, tied ones
    appear once under their first name. Nothing is read before `Matrix.load` is called, and reading leaves the model,
    its buffers, its training flags and the random generators as they were.

    Args:
        model: Any module; wrappers (`torch.compile`, data parallel, FSDP, activation checkpointing) leave no mark on
            the names.

    Yields:
        A `Matrix` for every weight, a `Skipped` for every parameter of two or more dimensions that is none or cannot
        be read. The tensors behind a parametrization are part of the weight they make and are not listed.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Conv2d(4, 6, kernel_size=3))
    >>> [(matrix.name, matrix.kind, matrix.shape) for matrix in walk(net)]
    [('0', 'dense', (1, 4, 8)), ('2', 'conv', (9, 6, 4))]
    """
    seen: dict[object, str] = {}
    taken: set[str] = set()
    root = _unwrap(model)
    for path, module in _modules(root):
        for item in _items(module, path, seen):
            yield replace(item, name=_unique(item.name or _class_name(root), taken))


# --- modules and names


def _unwrap(model: nn.Module) -> nn.Module:
    """The user's own root module, without the wrappers around it."""
    while True:
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        wrapper = "module" if parallel else next((w for w in _WRAPPERS if w in dict(model.named_children())), "")
        if not wrapper:
            return model
        model = model.get_submodule(wrapper)


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once with its cleaned path, except those that compute a parametrization."""
    inside: set[int] = set()
    for path, module in root.named_modules():
        if parametrize.is_parametrized(module):
            inside.update(map(id, module.get_submodule("parametrizations").modules()))
        if id(module) not in inside:
            yield ".".join(part for part in path.split(".") if part not in _WRAPPERS), module


def _join(path: str, attribute: str) -> str:
    """The dotted name of a parameter, without the plain `weight`."""
    return ".".join(part for part in (path, "" if attribute == "weight" else attribute) if part)


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or `name#2`, `name#3`, … where it is already taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}#{number}"
    taken.add(candidate)
    return candidate


def _class_name(module: nn.Module) -> str:
    """The name of the class the user wrote, also if a parametrization replaced it."""
    return parametrize.type_before_parametrizations(module).__name__


def _loaded(home: str, name: str) -> type | tuple[()]:
    """The class `home.name` if somebody imported it, else an empty tuple (which no object is an instance of)."""
    return getattr(sys.modules.get(home), name, ())


# --- which attributes of a module are weights


@dataclass(frozen=True)
class _Weight:
    """A weight of a module: its attribute and the parts it is cut into along dimension 0, by the name they get."""

    attribute: str
    kind: str
    parts: tuple[str, ...]


def _weights(module: nn.Module) -> Iterator[_Weight]:
    """The weights that a module of a known class has by its definition, absent ones included."""
    if isinstance(module, nn.MultiheadAttention):
        yield _Weight("in_proj_weight", "attention", ("q", "k", "v"))
        yield from (_Weight(f"{part}_proj_weight", "attention", (part,)) for part in "qkv")
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        yield from _recurrent_weights(module)
    elif isinstance(module, _loaded("transformers.pytorch_utils", "Conv1D")):
        yield _Weight("weight", "dense", ("",))
    else:
        yield from (_Weight("weight", kind, ("",)) for known, kind in _KINDS if isinstance(module, known))


def _recurrent_weights(module: nn.RNNBase | nn.RNNCellBase) -> Iterator[_Weight]:
    """weight_ih and weight_hh of every layer and direction, cut into gates, and the projection weight_hr, whole."""
    gates = next((tuple(gates) for known, gates in _GATES if isinstance(module, known)), ("",))
    ends = [""]
    if isinstance(module, nn.RNNBase):
        directions = ("", "_reverse")[: 1 + module.bidirectional]
        ends = [f"_l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]
    for end in ends:
        for stem in ("weight_ih", "weight_hh", "weight_hr"):
            parts = ("",) if stem == "weight_hr" else gates
            yield _Weight(stem + end, "recurrent", tuple(_join(stem + end, part) for part in parts))


# --- from attributes to items


def _items(module: nn.Module, path: str, seen: dict[object, str]) -> Iterator[Matrix | Skipped]:
    """The matrices of one module, then its parameters of two or more dimensions that are no known weight."""
    if any(isinstance(module, _loaded(home, name)) for home, name in _QUANTIZED):
        yield Skipped(path, _OTHER, (), "a quantized module: no floating-point weight")
        return
    weights = list(_weights(module))
    for weight in weights:
        yield from _cut_weight(module, path, weight, seen)
    yield from _leftovers(module, path, weights, seen)


@torch.no_grad()
def _cut_weight(module: nn.Module, path: str, weight: _Weight, seen: dict[object, str]) -> list[Matrix | Skipped]:
    """The matrices of one weight, or the reason why there are none; nothing for an optional weight that is absent."""
    name = _join(path, weight.attribute)
    shape: tuple[int, ...] = ()
    try:
        like = _stand_in(module, weight.attribute)
        if like is None:
            absent = Skipped(name, weight.kind, (), "no weight tensor in the module: packed or sharded elsewhere")
            return [absent] if weight.attribute == "weight" else []
        shape = _shape(like)
        key = _identity(_own_tensors(module).get(weight.attribute))
        reason = _defect(like, weight.kind) or _tied_to(seen.get(key))
        if reason:
            return [Skipped(name, weight.kind, shape, reason)]
        shapes = [_slices(like, weight, index).shape for index in range(len(weight.parts))]
    except Exception as error:  # noqa: BLE001 - the user's code runs here, and one broken layer must not end the walk
        return [Skipped(name, weight.kind, shape, f"could not be read: {type(error).__name__}: {error}")]
    if key is not None:
        seen[key] = name
    names, kind, load = [_join(path, part) for part in weight.parts], weight.kind, partial(_load, module, weight)
    return [
        Matrix(name, kind, (slices, rows, columns), partial(load, index), infer_role(name, kind))
        for index, (name, (slices, rows, columns)) in enumerate(zip(names, shapes, strict=True))
    ]


def _leftovers(module: nn.Module, path: str, weights: list[_Weight], seen: dict[object, str]) -> Iterator[Skipped]:
    """The module's own parameters and packed weights of two or more dimensions that none of `weights` stands for."""
    listed = {weight.attribute + end for weight in weights for end in ("", "_orig", "_g", "_v")}
    owner = f"{'other ' if weights else ''}parameters of {_class_name(module)}"
    tensors = _own_tensors(module)
    if parametrize.is_parametrized(module):
        computed = module.get_submodule("parametrizations").named_children()
        tensors |= {attribute: _originals(functions)[-1] for attribute, functions in computed}
    for attribute, tensor in tensors.items():
        if attribute in listed or is_lazy(tensor) or tensor.ndim < 2:
            continue
        reason = ""
        if isinstance(tensor, Parameter):
            reason = _tied_to(seen.get(_identity(tensor))) or f"{owner} are not a known weight"
        elif attribute in ("weight", "qweight") and not tensor.is_floating_point():
            reason = "integer weights"
        if reason:
            yield Skipped(_join(path, attribute), _OTHER, _shape(tensor), reason)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that `module` itself registers, by attribute."""
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return {**own, **dict(module.named_buffers(recurse=False, remove_duplicate=False))}


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape, `()` before a lazy module has one."""
    return () if is_lazy(tensor) else tuple(tensor.shape)


def _defect(weight: Tensor, kind: str) -> str:
    """Why `weight` has no spectrum, or `""`."""
    if is_lazy(weight):
        return "not initialised: a lazy module before its first forward pass"
    least, most = (3, 5) if kind == "conv" else (2, 3)
    defects = (
        (weight.is_meta, "on the meta device: no data"),
        (weight.layout is not torch.strided, f"sparse weights (layout {weight.layout})"),
        (weight.is_complex(), "complex weights"),
        (not weight.is_complex() and not weight.is_floating_point(), "integer weights"),
        (not least <= weight.ndim <= most, f"{weight.ndim}-dimensional where a {kind} weight has {least} to {most}"),
        (0 in weight.shape, f"empty: a zero in the shape {tuple(weight.shape)}"),
    )
    return next((reason for found, reason in defects if found), "")


def _identity(stored: Tensor | None) -> object:
    """What two tied weights have in common: their storage, or the object where that has no address.

    A weight that is computed (`stored` is None) has numbers of its own, also where it is made of a tied parameter.
    """
    if stored is None:
        return None
    if type(stored) in (Tensor, Parameter) and stored.layout is torch.strided and stored.data_ptr():
        return stored.device, stored.data_ptr(), stored.shape, stored.stride()
    return id(stored)


def _tied_to(first: str | None) -> str:
    """The reason to leave out a weight that was met before as `first`."""
    return "" if first is None else f"tied to {first}"


# --- reading


@torch.no_grad()
def _load(module: nn.Module, weight: _Weight, index: int) -> Tensor:
    """One part of the weight the module computes with now, `[slices, rows, columns]`."""
    return _slices(_read(module, weight.attribute).detach(), weight, index)


def _slices(tensor: Tensor, weight: _Weight, index: int) -> Tensor:
    """Part `index` of the weight, as a view: `[a, b, *k]` → `[prod(k), a, b]`, `[a, b]` → `[1, a, b]`."""
    part = tensor.chunk(len(weight.parts))[index]
    if weight.kind == "conv":
        return part.flatten(2).permute(2, 0, 1)
    return part if part.ndim == 3 else part.unsqueeze(0)


def _read(module: nn.Module, attribute: str) -> Tensor:
    """The weight the module computes with: the tensor itself, or computed from what is stored now."""
    if parametrize.is_parametrized(module, attribute):
        return _evaluate(module.get_submodule(f"parametrizations.{attribute}"))
    _, compute = _hook(module, attribute)
    tensor: Tensor = compute()
    return tensor


def _stand_in(module: nn.Module, attribute: str) -> Tensor | None:
    """A tensor with the shape, dtype, layout and device of the weight, computed only where they cannot be known."""
    if not parametrize.is_parametrized(module, attribute):
        stored, _ = _hook(module, attribute)
        return getattr(module, stored, None)
    functions = module.get_submodule(f"parametrizations.{attribute}")
    of_torch = all(type(function).__module__ == parametrizations.__name__ for function in functions.children())
    checked = not functions.unsafe and not any(hasattr(function, "right_inverse") for function in functions.children())
    return _originals(functions)[-1] if of_torch or checked else _evaluate(functions)


def _hook(module: nn.Module, attribute: str) -> tuple[str, Callable[[], Tensor]]:
    """The attribute that stores the weight and a function that computes it: pruning and norms of the older kind."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == attribute:
            return f"{attribute}_orig", partial(hook.apply_mask, module)
        if isinstance(hook, SpectralNorm) and hook.name == attribute:
            return f"{attribute}_orig", partial(hook.compute_weight, module, do_power_iteration=False)
        if isinstance(hook, WeightNorm) and hook.name == attribute:
            return f"{attribute}_v", partial(hook.compute_weight, module)
    return attribute, partial(getattr, module, attribute)


def _originals(functions: nn.Module) -> list[Tensor]:
    """The tensors a parametrization starts from; the last one of torch's own has the shape of the weight."""
    return list(_own_tensors(functions).values())


def _evaluate(functions: nn.Module) -> Tensor:
    """f(originals) in evaluation mode on copies of the buffers; flags, buffers and random generators stay as they were.

    `parametrize.cached()` is by-passed: a value without gradient in that cache would stop the training of the weight.
    """
    flags = [(module, module.training) for module in functions.modules()]
    copies = {name: buffer.clone() for name, buffer in functions.named_buffers()}
    device = _originals(functions)[-1].device
    generators = [device] if device.type in ("cuda", "xpu") else []
    try:
        for module, _ in flags:
            module.training = False  # not .eval(): a class may override it to do more
        with torch.random.fork_rng(generators, device_type=device.type):
            tensor: Tensor = functional_call(functions, copies, ())
            return tensor
    finally:
        for module, training in flags:
            module.training = training

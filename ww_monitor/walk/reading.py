"""Reading a weight of a module: what it computes with now, without a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ww_monitor.kind import Kind
from ww_monitor.walk.parts import unfit
from ww_monitor.walk.quantized import FLOAT8, Codes, codes_in, numbers_of, read_codes
from ww_monitor.walk.sharded import like_whole, read_whole


def read_dense(module: nn.Module, attribute: str) -> Tensor:
    """The weight the module computes with, gathered if partitioned, dequantised where tensor or module offers it."""
    stored, compute, _ = _source(module, attribute)
    return read_whole(stored, partial(_read_dense, module, attribute, compute))


def _read_dense(module: nn.Module, attribute: str, compute: Callable[[], Tensor]) -> Tensor:
    tensor = compute()
    if is_packed(module, tensor):
        return _dequantized(module, tensor)
    codes = codes_in(module, attribute, tensor)
    return read_codes(module, attribute, tensor, codes) if isinstance(codes, Codes) else tensor


def _dequantized(module: nn.Module, packed: Tensor) -> Tensor:
    dense: Tensor = (packed if offers_dequantize(packed) else module).dequantize()  # type: ignore[operator]
    return dense


def is_packed(module: nn.Module, stored: Tensor) -> bool:
    """Whether a tensor is quantised and it or its module offers to dequantise it."""
    if is_lazy(stored):
        return False
    return offers_dequantize(stored) or (not stored.is_floating_point() and offers_dequantize(module))


def is_coded(module: nn.Module, attribute: str, stored: Tensor) -> bool:
    """Whether a weight is quantised, and is read: by its class, or by a layout of scales that is known."""
    return is_packed(module, stored) or (not is_lazy(stored) and isinstance(codes_in(module, attribute, stored), Codes))


def refusal(module: nn.Module, attribute: str, stored: Tensor) -> str:
    """Why the codes of a quantised weight are not read, or `""`."""
    codes = "" if is_lazy(stored) else codes_in(module, attribute, stored)
    return codes if isinstance(codes, str) else ""


def holds_no_weights(module: nn.Module) -> str:
    """Why a module of TorchScript that was frozen has no weight, or `""`: they are constants of its code."""
    if not isinstance(module, torch.jit.ScriptModule) or own_tensors(module):
        return ""
    graph: Any = module.graph if hasattr(module, "graph") else None
    nodes = graph.findAllNodes("prim::Constant", recurse=True) if graph else ()
    held = (node.t("value") for node in nodes if node.hasAttribute("value") and node.kindOf("value") == "t")
    return "a frozen script: its weights are constants" if any(tensor.ndim > 1 for tensor in held) else ""


def is_scaled(module: nn.Module) -> bool:
    """Whether a module has a weight of eight-bit floats with a scale in a layout that is known."""
    own = own_parameters(module).items()
    return any(tensor.dtype in FLOAT8 and isinstance(codes_in(module, name, tensor), Codes) for name, tensor in own)


def scales_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of scales and zero points → the codes they belong to."""
    coded = {name: tensor for name, tensor in tensors.items() if not is_lazy(tensor) and codes_in(module, name, tensor)}
    return {scale: name for name in coded for scale in numbers_of(name, coded[name], tensors) if scale != name}


def dequantized_shape(module: nn.Module, attribute: str, stored: Tensor) -> tuple[int, ...] | None:
    """The shape of the weight behind a quantised tensor; `None` if it is none, or nobody knows to dequantise it."""
    if not is_packed(module, stored):
        return tuple(stored.shape) if is_coded(module, attribute, stored) else None
    if stored.is_floating_point():  # a tensor class that behaves like the weight it stands for
        return tuple(stored.shape)
    features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if all(isinstance(size, int) for size in features):
        return features  # type: ignore[return-value]
    return tuple(_dequantized(module, stored).shape)


def offers_dequantize(owner: Tensor | nn.Module) -> bool:
    """Whether a class of its own brings `dequantize`; plain tensors have a method of that name which is none."""
    if isinstance(owner, Tensor):
        return owner.is_quantized or getattr(type(owner), "dequantize", None) is not Tensor.dequantize
    return callable(getattr(type(owner), "dequantize", None))


def stand_in(module: nn.Module, attribute: str) -> Tensor | None:
    """A tensor with the shape, dtype, layout and device of the weight, computed only where they cannot be known."""
    if not parametrize.is_parametrized(module, attribute):
        return like_whole(next(iter(_source(module, attribute)[0]), None))  # type: ignore[no-any-return]
    functions = module.get_submodule(f"parametrizations.{attribute}")
    of_torch = all(type(function).__module__ == parametrizations.__name__ for function in functions.children())
    # Registration has checked that the shape stays, but for `unsafe` ones; a right inverse stores other shapes.
    checked = not functions.unsafe and not any(hasattr(function, "right_inverse") for function in functions.children())
    return originals(functions)[-1] if of_torch or checked else _evaluate(functions)


def sources(module: nn.Module, attribute: str) -> tuple[list[Tensor], bool]:
    """The tensors that a weight is made of, and whether it is more than the one of them as it is."""
    stored, _, computed = _source(module, attribute)
    return stored, computed or any(is_coded(module, attribute, tensor) for tensor in stored)


def _source(module: nn.Module, attribute: str) -> tuple[list[Tensor], Callable[[], Tensor], bool]:
    """What a weight is made of, a function that computes it from that as it is now, and whether that does more."""
    if parametrize.is_parametrized(module, attribute):
        functions = module.get_submodule(f"parametrizations.{attribute}")
        return originals(functions), partial(_evaluate, functions), True
    stored, compute = made_by_hooks(module).get(attribute, (attribute, partial(getattr, module, attribute)))
    if hasattr(type(module), stored) and stored not in own_tensors(module):  # a property: the user's code
        compute = partial(_evaluate, _Attribute(module, stored))
        tensor: Any = compute()
    else:
        tensor = getattr(module, stored, None)
    return [tensor] if isinstance(tensor, Tensor) else [], compute, stored != attribute


def made_by_hooks(module: nn.Module) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """Weights that pruning and norms of the older kind make → the parameter that they are made of, and how.

    Their hook writes the attribute in the next forward pass only, and nothing public tells which hooks a module has,
    nor what they write.
    """
    found: dict[str, tuple[str, Callable[[], Tensor]]] = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = f"{hook._tensor_name}_orig", partial(hook.apply_mask, module)
        elif isinstance(hook, SpectralNorm):
            make = partial(hook.compute_weight, module, do_power_iteration=False)
            found[hook.name] = f"{hook.name}_orig", make
        elif isinstance(hook, WeightNorm):
            found[hook.name] = f"{hook.name}_v", partial(hook.compute_weight, module)
    return found


def originals(functions: nn.Module) -> list[Tensor]:
    """The tensors a parametrization starts from; the last one of torch's own has the shape of the weight."""
    return list(own_tensors(functions).values())


def _evaluate(functions: nn.Module) -> Tensor:
    """f(originals) in evaluation mode on copies of the buffers; flags, buffers and random generators stay as they were.

    `parametrize.cached()` is by-passed: a value without gradient in that cache would stop the training of the weight.
    """
    # in training mode a spectral norm would take a power step first
    flags = [(module, module.training) for module in functions.modules()]
    copies = {name: buffer.clone() for name, buffer in functions.named_buffers()}
    device = next((tensor.device for _, tensor in all_parameters(functions)), torch.device("cpu"))
    generators = [device] if device.type in ("cuda", "xpu") else []  # `fork_rng` keeps that of the host anyway
    try:
        for module, _ in flags:
            module.training = False  # not .eval(): a class may override it to do more
        with torch.random.fork_rng(generators, device_type=device.type):
            tensor: Tensor = functional_call(functions, copies, ())
            return tensor
    finally:
        for module, training in flags:
            module.training = training


class _Attribute(nn.Module):
    """What a module gives for an attribute, which may be a property."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        super().__init__()
        self.owner, self.attribute = owner, attribute

    def forward(self) -> Any:
        return getattr(self.owner, self.attribute, None)


def all_parameters(
    module: nn.Module, *, recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters` of torch's class: a model may have a method of that name that does something else."""
    return nn.Module.named_parameters(module, recurse=recurse, remove_duplicate=remove_duplicate)


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that `module` itself registers, by attribute; of a script module they are tensors of no class."""
    return dict(all_parameters(module, recurse=False, remove_duplicate=False))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that `module` itself registers, by attribute."""
    return {**own_parameters(module), **dict(nn.Module.named_buffers(module, recurse=False, remove_duplicate=False))}


def made_of(module: nn.Module, attribute: str) -> str:
    """The parameter of which a hook of an unknown kind makes a weight before every forward pass, else `attribute`.

    The weight itself would be that of the last pass, and absent before the first (an equalised learning rate; a
    spectral norm that keeps `weight_bar`).
    """
    own = own_parameters(module)
    beside = [name for name in own if name.startswith(f"{attribute}_") and len(shape(own[name])) > 1]
    known = attribute in own_tensors(module) or parametrize.is_parametrized(module, attribute)
    if known or len(beside) != 1 or attribute in made_by_hooks(module):
        return attribute
    found = vars(module).get(attribute)
    return beside[0] if found is None or found.shape == own[beside[0]].shape else attribute


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape, `()` before a lazy module has one."""
    return () if is_lazy(tensor) else tuple(tensor.shape)


def defect(weight: Tensor, kind: Kind, *, planned: bool = False) -> str:
    """Why `weight` has no spectrum, or `""`; for a plan it may be on the meta device."""
    if is_lazy(weight):
        return "not initialised: a lazy module before its first forward pass"
    if weight.is_meta and not planned:
        return "on the meta device: no data"
    if weight.layout is not torch.strided:
        return f"sparse weights (layout {weight.layout})"
    return unfit(weight.dtype, weight.shape, kind)


def identity(stored: Tensor | None) -> object:
    """What two tied weights have in common: their storage, or the object where that has no address.

    A weight that is computed (`stored` is None) has numbers of its own, also where it is made of a tied parameter.
    """
    if stored is None:
        return None
    if type(stored) in (Tensor, Parameter) and stored.layout is torch.strided and stored.data_ptr():
        return stored.device, stored.data_ptr(), stored.shape, stored.stride()
    return id(stored)


def tied_to(first: str | None) -> str:
    """The reason to leave out a weight that was met before as `first`."""
    return "" if first is None else f"tied to {first}"

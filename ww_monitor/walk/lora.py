"""Adapters of PEFT: the base weight, every adapter's delta, and both together.

A LoRA layer computes with W + Σ s·B·A, the sum over its active adapters (Hu et al. 2021, eq. 3; s = alpha / r), and so
do other kinds with deltas of their own. PEFT is never imported here: only a model that somebody made with it holds such
layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ww_monitor.errors import InvalidArgument
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.parts import Part, variant

CHOICES = ("base", "delta", "merged")
ORIGINAL = "the original of a module that trains as a copy (modules_to_save)"
_HOME = "peft.tuners.lora.layer"
_ADDED = (
    "lora", "adalora", "loha", "lokr", "vera", "fourierft", "randlora", "adamss", "c3a", "delora", "frod", "gralora",
    "osf", "psoft", "pvera", "supertuning", "tinylora", "unilora", "vblora", "waveft",
)  # fmt: skip
"""Kinds of adapters whose `get_delta_weight` gives what is added to the weight; that of others is a rotation, a whole
weight, another one once it is merged, or not there, and some of them write on their layer as they compute it."""


Adapters = Mapping["tuple[int, str]", Any]
"""The adapter layer around a weight, by the identity of the module that holds the weight and its attribute."""


def loaded(home: str, name: str) -> type | tuple[()]:
    """The class `home.name` if somebody imported it, else an empty tuple (which no object is an instance of)."""
    return getattr(sys.modules.get(home), name, ())


def check_lora(where: str, lora: Sequence[str]) -> None:
    """Raise `InvalidArgument` unless `lora` lists some of `"base"`, `"delta"`, `"merged"`."""
    if isinstance(lora, str) or not lora or any(choice not in CHOICES for choice in lora):
        listed = ", ".join(map(repr, CHOICES))
        raise InvalidArgument(f"{where}: lora must be a sequence of some of {listed}; got {lora!r}")


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` is an adapter layer of PEFT, which holds the adapted module as `base_layer`."""
    tuner = isinstance(module, loaded("peft.tuners.tuners_utils", "BaseTunerLayer"))
    return tuner and "base_layer" in dict(module.named_children())


def copied(module: Any) -> nn.Module | None:
    """The copy that computes in a wrapper of PEFT's `modules_to_save`."""
    wrapper = isinstance(module, loaded("peft.utils.other", "ModulesToSaveWrapper"))
    active = module.active_adapters if wrapper and not module.disable_adapters else ()
    return next((module.modules_to_save[name] for name in active if name in module.modules_to_save), None)


def originals(module: Any, path: str) -> Iterator[Skipped]:
    """The weights of the module in whose place a copy computes."""
    held = module.original_module.named_parameters() if copied(module) is not None else ()
    for name, parameter in held:
        if parameter.ndim > 1:
            yield Skipped(f"{path}.original_module.{name}", Kind.OTHER, tuple(parameter.shape), ORIGINAL)


def inside(layer: nn.Module) -> list[str]:
    """Names of the modules in an adapter layer that belong to the adapters, not to the adapted module."""
    return [name for name, _ in layer.named_children() if name != "base_layer"]


def find_adapters(root: nn.Module) -> Adapters:
    """The adapter layers of a model by the weight they adapt."""
    layers: list[Any] = [module for module in root.modules() if is_adapter(module)]
    # by id: a layer knows its module, the module knows no layer, and nothing may be written on either
    return {(id(layer.get_base_layer()), _attribute(layer)): layer for layer in layers}


def trains(found: Adapters, module: nn.Module) -> bool:
    """Whether an adapter of a weight of the module learns, which the module does not know."""
    layers = (found[id(module), name] for name in ("weight", "in_proj_weight") if (id(module), name) in found)
    return any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def is_adapted(name: str) -> bool:
    """Whether a name is that of a delta, or of a weight with its adapters."""
    return name.endswith(("]", ".merged"))


def _attribute(layer: Any) -> str:
    if _is(layer, "ParamWrapper"):
        return str(layer.parameter_name)
    return "in_proj_weight" if _is(layer, "MultiheadAttention") else "weight"


def _is(layer: object, *names: str) -> bool:
    return any(isinstance(layer, loaded(_HOME, name)) for name in names)


def _method(layer: object) -> str:
    """The kind of an adapter layer, as PEFT calls it: the folder of its class, or that of the class it extends."""
    homes = [kind.__module__.split(".") for kind in type(layer).__mro__]
    return next((home[2] for home in homes if home[:2] == ["peft", "tuners"] and len(home) > 3), "adapter")


def _label(layer: object, adapter: str) -> str:
    return f"{'lora' if _is(layer, 'LoraLayer') else _method(layer)}[{adapter}]"


def factors(layer: nn.Module, path: str) -> Iterator[Skipped]:
    """The factors of an adapter layer, which have no spectrum of interest of their own."""
    children = dict(layer.named_children())
    for name in dict.fromkeys(getattr(layer, "adapter_layer_names", ())):
        # some stand in a ParameterDict by adapter, the others in modules with a `weight`
        for inner, parameter in children[name].named_parameters() if name in children else ():
            if parameter.ndim > 1:
                inner = inner.removesuffix(".weight")
                reason = f"factor of {_label(layer, inner)}"
                yield Skipped(f"{path}.{name}.{inner}", Kind.OTHER, tuple(parameter.shape), reason)


def weight_shape(layer: Any) -> tuple[int, ...]:
    """The shape of the weight that a LoRA layer adapts, from the layer: a quantised base may not tell."""
    shape = (int(layer.out_features), int(layer.in_features))
    return shape[::-1] if getattr(layer, "fan_in_fan_out", False) else shape


def adapted(
    item: Matrix, part: Part, layer: Any, read: Callable[[], Tensor], lora: Sequence[str], defect: str = ""
) -> Iterator[Matrix | Skipped]:
    """What `lora` chooses of one matrix of an adapted weight.

    Args:
        item: The matrix without adapter.
        part: The part of the weight that it is.
        layer: The adapter layer.
        read: Reads the weight as it is stored.
        lora: Some of `"base"`, `"delta"` and `"merged"`.
        defect: Why the stored weight cannot be read; the deltas can.
    """
    # DoRA and its like scale the sum, so neither base nor merged weight follows from the stored one by adding
    added = _method(layer) in _ADDED
    variants = [a for a in _adapters(layer) if not added or a in getattr(layer, "lora_variant", {})]
    inside = [adapter for adapter in layer.merged_adapters if adapter in variants]
    computed = [adapter for adapter in _active(layer) if adapter in variants]
    if "base" in lora:
        base = variant(item, "", partial(_combined, layer, read, base=True), part)
        reason = f"merged with {_label(layer, inside[0])}, which is more than a sum" if inside else ""
        yield _unless(defect or reason, base)
    else:
        yield _unless("base weight of an adapter: not in lora", item)
    if "delta" in lora:
        for adapter in _adapters(layer):
            reason = "" if added else f"PEFT gives no delta that {_method(layer)} adds to the weight"
            yield _unless(reason, variant(item, _label(layer, adapter), partial(_delta, layer, adapter), part))
    if "merged" in lora:
        merged = variant(item, "merged", partial(_combined, layer, read, base=False), part)
        yield _unless(
            defect or (f"{_label(layer, computed[0])} is more than a sum of base and delta" if computed else ""), merged
        )


def _unless(reason: str, item: Matrix) -> Matrix | Skipped:
    return Skipped(item.name, item.kind, item.shape, reason) if reason else item


def _adapters(layer: Any) -> list[str]:
    held: list[Any] = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return list(dict.fromkeys(adapter for factors in held if factors is not None for adapter in factors))


def _active(layer: Any) -> list[str]:
    """The adapters that the layer adds as it computes: none where they were merged into what is stored."""
    return [] if layer.merged else [adapter for adapter in layer.active_adapters if adapter in _adapters(layer)]


def _combined(layer: Any, read: Callable[[], Tensor], *, base: bool) -> Tensor:
    """W without the adapters that were merged into it (`base`), or W + Σ s·B·A over the active adapters."""
    weight = read()
    for adapter in layer.merged_adapters if base else _active(layer):
        delta = _delta(layer, adapter)
        precision = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        weight = torch.add(weight.to(precision), delta.to(precision), alpha=-1 if base else 1)
    return weight


def _delta(layer: Any, adapter: str) -> Tensor:
    """s·B·A in the shape of the weight, at least in float32: rounded to half precision its rank would not be r."""
    if _method(layer) != "lora":
        return layer.get_delta_weight(adapter)  # type: ignore[no-any-return]
    if adapter in layer.lora_embedding_A:
        left, right, transposed = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter], True
    elif _is(layer, "ParamWrapper", "_ConvNd"):
        delta: Tensor = layer.get_delta_weight(adapter)  # kernels and expert stacks fold their factors in own ways
        return delta
    else:
        left, right = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
    product = low_rank(left, right, layer.scaling[adapter])
    return product.T if transposed else product


def low_rank(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """s·B·A, at least in float32."""
    precision = torch.promote_types(left.dtype, torch.float32)
    return (left.to(precision) @ right.to(precision)) * scaling

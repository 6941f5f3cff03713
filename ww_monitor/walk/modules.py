"""The modules of a model with their paths, as their user knows them: without wrappers and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.utils import parametrize

from ww_monitor.walk import lora as adapters
from ww_monitor.walk import parts
from ww_monitor.walk.parts import WRAPPERS
from ww_monitor.walk.reading import all_parameters, own_parameters

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own root module, without the wrappers around it."""
    while True:
        # `module` is a name that anybody may use: only these two classes mean it as a wrapper
        parallel = isinstance(model, _PARALLEL)
        wrapper = "module" if parallel else next((w for w in WRAPPERS if w in dict(model.named_children())), "")
        if not wrapper:
            return model
        model = model.get_submodule(wrapper)


def modules(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Every module once with its path, which wrappers and the `base_layer` of adapters leave no mark on.

    What computes a parametrization or a LoRA delta is part of the weight it makes, and left out.
    """
    seen.add(id(module))  # modules may define ==, and one that is used twice is listed once
    yield path, module
    adapted = adapters.is_adapter(module)
    inside: Sequence[str] = ("parametrizations",) if parametrize.is_parametrized(module) else ()
    inside = adapters.inside(module) if adapted else inside
    if (copy := adapters.copied(module)) is not None:
        inside = ("original_module", *inside)
        yield from modules(copy, path, seen)
    for name, child in module.named_children():
        if id(child) not in seen and name not in inside:
            plain = name in WRAPPERS or (adapted and name == "base_layer")
            plain = plain or (name == "module" and isinstance(module, _PARALLEL))
            yield from modules(child, path if plain else parts.joined(path, name), seen)


def class_name(module: nn.Module) -> str:
    """The name of the class the user wrote, also if a parametrization replaced it."""
    return parametrize.type_before_parametrizations(module).__name__


def names_in(root: nn.Module) -> Iterator[str]:
    """What weights in a model may be called: the path of a module that has some, or of one of its parameters."""
    for path, module in modules(root, "", set()):
        if next(all_parameters(module), None) is not None:
            yield path
        yield from (parts.joined(path, attribute) for attribute in own_parameters(module))

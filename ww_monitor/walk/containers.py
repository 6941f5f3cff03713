"""A checkpoint → the state dicts in it, told by what they hold and not by what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ww_monitor.errors import InvalidArgument
from ww_monitor.kind import Kind
from ww_monitor.matrix import Skipped
from ww_monitor.walk.parts import joined

_DEEPEST = 100  # mappings one in another (our choice)
_MOST_NAMED = 8  # in a message
# A name with a dot is that of a module's parameter; one without must say that it is a weight.
_WEIGHT = re.compile(r".*\..*|(.*[_.])?(weights?|kernel|embeddings?)([_.].*)?", re.DOTALL)
_OPTIMIZER = re.compile(r"(.*_)?optim(izer)?s?(_states?)?(_dicts?)?", re.IGNORECASE)
# Keys in the states of torch's optimizers, which tell one by any name.
_OF_OPTIMIZER = {"param_groups", "exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg"}
AVERAGE = re.compile(r"(^|[._\W])(g_)?(ema|swa|avg|averaged?|shadow|teacher|target|polyak)(?![a-z])", re.IGNORECASE)
"""Part of a name that says of what is below it that it is averaged over steps."""


@dataclass(frozen=True)
class StateDict:
    """A mapping, or a list, that holds weights, inside a checkpoint.

    Attributes:
        path: The keys that lead to it.
        tensors: What of it are tensors, by name.
        others: The names of the rest.
    """

    path: tuple[Any, ...]
    tensors: Mapping[str, Tensor]
    others: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its path, dotted."""
        return ".".join(map(str, self.path))

    def __str__(self) -> str:
        return f"{self.name or 'the top'!r} ({len(self.tensors)} tensors)"


@dataclass(frozen=True)
class Chosen:
    """Which state dicts of a checkpoint are read, by what their names begin with; and what is said of it."""

    state_dicts: Mapping[str, StateDict]
    said: str


def choose(content: object, part: str, where: str) -> Chosen:
    """The state dicts inside a checkpoint: the only one, else all, each name with the path to its own in front.

    A state dict has tensors of two or more dimensions; the state of an optimizer is none. Beside one whose tensors have
    names of weights, others do not count unless `part` asks for them: a stray table is no model. A moving average of
    another one, by its name and its shapes, is read if `part` asks for it.

    Args:
        content: Mappings, lists and tensors, one in another; it may hold itself.
        part: Path of the one to read, or a name in it; `""` for all.
        where: The function to name in errors.

    Raises:
        InvalidArgument: if there is no such part; if there is none at all, with what there is; or if containers are
            nested more than 100 deep.
    """
    # A state dict by itself, also one of biases only: there is nothing to analyse in it, which is no mistake.
    if isinstance(content, Mapping) and content and not part and all(isinstance(v, Tensor) for v in content.values()):
        return Chosen({"": StateDict((), {str(key): value for key, value in content.items()}, {})}, "")
    found = list(_state_dicts(content, where))
    if not part:
        found = [one for one in found if any(_is_weight(*item) for item in one.tensors.items())] or found
    more = [f"and {len(found) - _MOST_NAMED} more"] * (len(found) > _MOST_NAMED)
    listed = ", ".join([*map(str, found[:_MOST_NAMED]), *more])
    if part:
        return Chosen(_prefixed(_of_part(found, part, where, listed)), "")
    if not found:
        raise InvalidArgument(f"{where}: expected tensors of two or more dimensions in a mapping; got {held(content)}")
    averages = _averages(found)
    chosen = [one for one in found if one not in averages]
    if len(found) == 1:
        return Chosen(_prefixed(found), "")
    read = f"read {', '.join(repr(one.name) for one in chosen[:_MOST_NAMED])}"
    left = f", left out {', '.join(repr(one.name) for one in averages)}, the same model averaged" if averages else ""
    alone = (averages or found)[-1].name
    return Chosen(_prefixed(chosen), f"{where}: found {listed}; {read}{left}; part={alone!r} reads that alone")


def of_others(chosen: Chosen) -> list[Skipped]:
    """The entries of state dicts that are no tensors; extra state of modules may be anything."""
    return [
        Skipped(joined(prefix, name), Kind.OTHER, (), f"no tensor: {kind}")
        for prefix, one in chosen.state_dicts.items()
        for name, kind in one.others.items()
        if not name.endswith("_extra_state")
    ]


def held(content: object) -> str:
    """What a checkpoint holds, in a line."""
    if isinstance(content, Mapping):
        items = [f"{repr(key)[:60]}: {_kind(value)}" for key, value in list(content.items())[:_MOST_NAMED]]
        return "{" + ", ".join(items + ["…"] * (len(content) > len(items))) + "}"
    if isinstance(content, (list, tuple)):
        return "[" + ", ".join([*map(_kind, content[:_MOST_NAMED]), *["…"] * (len(content) > _MOST_NAMED)]) + "]"
    return _kind(content)


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _is_weight(name: str, tensor: Tensor) -> bool:
    return tensor.ndim > 1 and _WEIGHT.fullmatch(name) is not None


def _state_dicts(content: object, where: str) -> Iterator[StateDict]:
    """Every mapping or list with a tensor of two or more dimensions, outermost first; each once, however often held."""
    # No recursion: a file may nest its containers deeper than Python recurses, and hold itself.
    stack: list[tuple[tuple[Any, ...], object]] = [((), content)]
    seen: set[int] = set()
    while stack:
        path, inner = stack.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        if len(path) > _DEEPEST:
            raise InvalidArgument(f"{where}: expected a checkpoint, got containers nested more than {_DEEPEST} deep")
        children = entries(inner)
        if _OF_OPTIMIZER & {key for key, _ in children if isinstance(key, str)}:
            continue
        tensors = {str(key): value for key, value in children if isinstance(value, Tensor)}
        if any(tensor.ndim > 1 for tensor in tensors.values()):
            others = {str(key): type(value).__name__ for key, value in children if str(key) not in tensors}
            yield StateDict(path, tensors, others)
        inside = [(key, value) for key, value in children if isinstance(value, (Mapping, list, tuple))]
        stack += [((*path, key), value) for key, value in reversed(inside) if not _OPTIMIZER.fullmatch(str(key))]


def entries(container: object) -> list[tuple[Any, Any]]:
    """What a mapping, a list or a tuple holds, by key or place; nothing of anything else."""
    if isinstance(container, Mapping):
        return list(container.items())
    return list(enumerate(container)) if isinstance(container, (list, tuple)) else []


def _of_part(found: list[StateDict], part: str, where: str, listed: str) -> list[StateDict]:
    """Those of that path, else those below it, else those with a key of that name on their way."""
    tests = (
        lambda name: name == part,
        lambda name: name.startswith(f"{part}."),
        lambda name: f".{part}." in f".{name}.",
    )
    chosen = next((hit for test in tests if (hit := [one for one in found if test(one.name)])), [])
    if not chosen:
        raise InvalidArgument(f"{where}: part must be one of those in it; got {part!r}; use one of {listed or 'none'}")
    return chosen


def _averages(found: list[StateDict]) -> list[StateDict]:
    """Those named as a moving average of another with the same tensors."""
    shapes = {id(one): _shapes(one) for one in found}
    plain = [shapes[id(one)] for one in found if not AVERAGE.search(one.name)]
    return [one for one in found if AVERAGE.search(one.name) and shapes[id(one)] in plain]


def _shapes(one: StateDict) -> dict[str, tuple[int, ...]]:
    # `AveragedModel` of torch puts it before the names of its copy.
    return {name.removeprefix("module."): tuple(t.shape) for name, t in one.tensors.items() if t.ndim > 1}


def _prefixed(chosen: list[StateDict]) -> dict[str, StateDict]:
    return {"" if len(chosen) == 1 else one.name: one for one in chosen}

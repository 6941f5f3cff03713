"""How one stored tensor is cut into matrices: blocks, heads, gates, kernel slices and experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, count
from operator import itemgetter

import torch
from torch import Tensor

from ww_monitor.errors import InvalidArgument, SpectralWarning, as_python
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Shards, Skipped
from ww_monitor.settings import matching
from ww_monitor.walk.sharded import whole

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Names that `torch.compile`, FSDP, activation checkpointing and Lightning's Fabric put into a path."""

LEAST_EXPERT_SIDE = 8
"""Both sides of an expert's matrix have at least this many entries: below lie tables of scales and biases, and 8 is
the least number of eigenvalues that is analysed."""


@dataclass(frozen=True)
class Part:
    """One matrix of a tensor.

    Attributes:
        end: What is appended to the name of the tensor, or `""`.
        take: The whole tensor → the slices `[rows, columns]` or `[slices, rows, columns]`, a view where it can be.
        role: The role that the cut gives the matrix, or `None` where its name must tell.
    """

    end: str
    take: Callable[[Tensor], Tensor]
    role: str | None = None

    def stack(self, tensor: Tensor) -> Tensor:
        """The part as `[slices, rows, columns]`."""
        part = self.take(tensor)
        return part if part.ndim == 3 else part.unsqueeze(0)

    def shape(self, whole: Sequence[int]) -> tuple[int, int, int]:
        """The shape of the part of a tensor of shape `whole`; nothing is read."""
        # on the meta device, so that a cut says its shape by itself
        slices, rows, columns = self.stack(torch.empty(tuple(whole), dtype=torch.float32, device="meta")).shape
        return slices, rows, columns


Split = Mapping[str, "int | Sequence[int]"]


def _kernel(tensor: Tensor) -> Tensor:
    """`[a, b, *k]` → `[prod(k), a, b]`."""
    return tensor.flatten(2).permute(2, 0, 1)


def flat(tensor: Tensor, axes: int) -> Tensor:
    """The first `axes` axes × the others."""
    return tensor.flatten(axes).flatten(0, axes - 1)


def _of_groups(tensor: Tensor, groups: int, rows: int, start: int, size: int) -> Tensor:
    """Rows start … start + size - 1 of every one of `groups` groups of `rows` rows, one group below the other."""
    return tensor.view(groups, rows, -1)[:, start : start + size].reshape(groups * size, -1)


def _expert(tensor: Tensor, take: Callable[[Tensor], Tensor], index: int) -> Tensor:
    return take(tensor)[index]


WHOLE = (Part("", torch.detach),)
KERNEL = (Part("", _kernel),)


def blocks(ends: Sequence[str], sizes: Sequence[int], axis: int = 0) -> tuple[Part, ...]:
    """Neighbouring blocks of the given sizes along one axis.

    >>> [part.shape((12, 5)) for part in blocks(("q", "k", "v"), (8, 2, 2))]
    [(1, 8, 5), (1, 2, 5), (1, 2, 5)]
    """
    named = ("q", "k", "v", "gate", "up")  # ends that are roles
    return tuple(
        Part(end, partial(torch.narrow, dim=axis, start=start, length=size), end if end in named else "")
        for end, start, size in zip(ends, accumulate(sizes, initial=0), sizes, strict=False)  # one start more
    )


def interleaved_heads(queries: int, keys: int, head_dim: int) -> tuple[Part, ...]:
    """q, k and v out of rows ordered `[keys, queries / keys + 2, head_dim]`: a group of queries, its key, its value.

    The layout of GPT-NeoX and BLOOM (queries = keys) and of Falcon (keys = 1, or grouped), as their `forward` reshapes.
    """
    group = queries // keys
    cut = partial(_of_groups, groups=keys, rows=(group + 2) * head_dim)
    return tuple(
        Part(end, partial(cut, start=start * head_dim, size=count * head_dim), end)
        for end, start, count in (("q", 0, group), ("k", group, 1), ("v", group + 1, 1))
    )


def halves(size: int, axis: int, *, alternate: bool) -> tuple[Part, ...]:
    """Gate and up projection out of one tensor: the first and the second half, or every second row."""
    if not alternate:
        return blocks(("gate", "up"), (size // 2, size // 2), axis)
    before = (slice(None),) * axis
    return tuple(Part(end, itemgetter((*before, slice(at, None, 2))), end) for at, end in enumerate(("gate", "up")))


def each_expert(parts: Sequence[Part], experts: int) -> Iterator[Part]:
    """One matrix an expert out of parts `[experts, rows, columns]`; the number of the expert ends the name."""
    for part in parts:
        for index in range(experts):
            yield Part(joined(part.end, str(index)), partial(_expert, take=part.take, index=index), part.role)


def is_expert_stack(owner: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a module (`owner`: its path and class name) holds the matrices of several experts."""
    named = any(word in owner.lower() for word in ("expert", "moe"))
    return named and len(shape) == 3 and shape[0] > 1 and min(shape[1:]) >= LEAST_EXPERT_SIDE


def joined(*names: str) -> str:
    """The dotted name of what is not empty."""
    return ".".join(filter(None, names))


def unique(items: Iterable[Matrix | Skipped]) -> Iterator[Matrix | Skipped]:
    """The items with `#2`, `#3`, … behind a name that came before."""
    taken: set[str] = set()
    for item in items:
        names = chain([item.name], (f"{item.name}#{number}" for number in count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield item if name == item.name else replace(item, name=name)


def matrix(
    name: str,
    kind: Kind,
    part: Part,
    shape: Sequence[int],
    read: Callable[[], Tensor],
    role: str,
    shards: Shards | None = None,
) -> Matrix:
    """The matrix that a part of a tensor makes; `role` counts where the cut gives none."""
    own_role = role if part.role is None else part.role
    return Matrix(joined(name, part.end), kind, part.shape(shape), partial(_load, read, part), own_role, shards=shards)


@torch.no_grad()
def _load(read: Callable[[], Tensor], part: Part) -> Tensor:
    return part.stack(whole(read().detach()))


def variant(item: Matrix, label: str, read: Callable[[], Tensor], part: Part) -> Matrix:
    """The same part of another tensor, with `label` (if any) at the end of its name."""
    shards = None if item.shards is None else Shards(item.shards.ranks)  # what is computed has no pieces
    return replace(item, name=joined(item.name, label), load=partial(_load, read, part), shards=shards)


def unfit(dtype: torch.dtype, shape: Sequence[int], kind: Kind) -> str:
    """Why a tensor has no spectrum, or `""`."""
    least, most = kind.about.ndim
    if dtype.is_complex or not dtype.is_floating_point:
        return "complex weights" if dtype.is_complex else "integer weights"
    if not least <= len(shape) <= most:
        return f"{len(shape)}-dimensional where {kind.about.label} have {least} to {most}"
    return f"empty: a zero in the shape {tuple(shape)}" if 0 in shape else ""


# --- the caller's own cuts


def check_split(where: str, split: Split | None) -> None:
    """Raise `InvalidArgument` unless `split` maps globs to a number of parts or to their sizes."""
    if split is None:
        return
    if not isinstance(split, Mapping):
        raise InvalidArgument(f"{where}: split must be a mapping from globs; got {type(split).__name__}")
    for pattern, sizes in split.items():
        if not isinstance(pattern, str):
            raise InvalidArgument(f"{where}: split must map globs, which are strings; got {pattern!r}")
        listed = [as_python(sizes)] if isinstance(as_python(sizes), int) else sizes
        numbers = isinstance(listed, Sequence) and all(
            type(size) is int and size >= 1 for size in map(as_python, listed)
        )
        if not (numbers and listed):
            raise InvalidArgument(
                f"{where}: split[{pattern!r}] must be a number of parts or a sequence of their sizes, all >= 1; "
                f"got {sizes!r}"
            )


def resolved(split: Split | None, names: Collection[str]) -> Split | None:
    """Name of a weight → the caller's cut of it, by the first pattern that selects it; one that selects none warns."""
    found: dict[str, int | Sequence[int]] = {}
    for pattern, sizes in (split or {}).items():
        selected = matching(pattern, names)
        found |= {name: as_python(sizes) for name in selected if name not in found}
        if any(names) and not selected:
            said = f"walk: split={pattern!r} matches no layer; the first are {', '.join(map(repr, list(names)[:3]))}"
            warnings.warn(said, SpectralWarning, stacklevel=3)
    return found or None


def split_parts(split: Split | None, name: str, shape: Sequence[int], axis: int) -> tuple[Part, ...]:
    """The parts `0`, `1`, … of a weight that `resolved` cuts; nothing for another.

    Raises:
        InvalidArgument: if the sizes do not add up to the output axis.
    """
    sizes = (split or {}).get(name)
    if sizes is None:
        return ()
    listed = [shape[axis] // sizes] * sizes if isinstance(sizes, int) else list(sizes)
    if sum(listed) != shape[axis]:
        raise InvalidArgument(
            f"walk: the sizes in split must add up to the {shape[axis]} outputs of {name!r}; got {sizes!r}"
        )
    return WHOLE if len(listed) == 1 else blocks([str(i) for i in range(len(listed))], listed, axis)

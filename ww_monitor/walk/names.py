"""What a name and a shape tell of a parameter that no known layer owns: which matrix it is, or why it is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ww_monitor.walk.parts import KERNEL, WHOLE, Part, flat

BUFFER = "a buffer, which training does not change"

LARGEST_KERNEL = 16
"""Sides up to which the last dimensions of a tensor are those of a convolution kernel: patches have up to 16 × 16."""

LEAST_HEAD = 8
"""Least size of an attention head; kernels of one dimension are shorter, but for few."""

POSITIONS = "a table of positions"
_NO_WEIGHT = (
    (r"(rel|abs)?pos(ition(s|al)?)?(_?(emb|enc)\w*)?|pe|wpe|rpe|rope|rotary\w*|alibi\w*", POSITIONS),
    (r"mask(s|ed)?(?!_?(token|emb))", "a mask"),
    (r"bias(es)?", "a bias"),
    (r"weight_(scales?(_inv)?|zero(s|_points?)?)|qzeros|\w*absmax|quant_(map|state)", "numbers of a quantisation"),
)
# What ends so acts on positions or on a mask; but `pos_emb_weight` is the table itself.
_ACTS = re.compile(r"(proj(ections?)?|kernels?|(?<!emb)(?<!enc)(?<!embed)(?<!ding)(?<!dings)_(w|weights?))_?\d*$")
_BUFFERS = r"running|cos|sin|\w*cached?|inv_freq|freqs|window|\w*filter_?banks?|mel_\w+"


def no_weight(key: str, *, stored: bool = False) -> str:
    """Why a parameter is no weight, as its name says, or `""`.

    Args:
        key: Its dotted name; numbers at the end, as of a list, say nothing.
        stored: Whether it may as well be a buffer, as in a state dict.

    >>> [no_weight(f"block.{name}") for name in ("pos_embed", "attn_mask", "experts.up_bias", "kernel", "mask_token")]
    ['a table of positions', 'a mask', 'a bias', '', '']
    """
    last = next((part for part in reversed(key.split(".")) if not part.isdigit()), "")
    if _ACTS.search(last.lower()):
        return ""  # what acts on positions or on a mask is none itself
    rules = (*_NO_WEIGHT, (_BUFFERS, BUFFER)) if stored else _NO_WEIGHT
    found = (reason for words, reason in rules if re.search(f"(?<![a-z])({words})(?![a-z])", last, re.IGNORECASE))
    return next(found, "")


@dataclass(frozen=True)
class Reading:
    """How a tensor is read: its matrices, whether they are a kernel's slices, and why there are none."""

    parts: tuple[Part, ...] = ()
    kernel: bool = False
    reason: str = ""


def read_shape(shape: Sequence[int], *, called_weight: bool = False) -> Reading:
    """The matrices of a parameter that no known layer owns, or why it has none.

    Sides of 1 in front are left out. `[a, b, c]` is one matrix where its sides are a = b·c or a·b = c, as of the heads
    of an attention; a stack of `a` matrices where a is the smallest side; a kernel as torch stores it where the last
    sides are short.

    Args:
        shape: Of two dimensions or more.
        called_weight: Whether its name is `weight`: then three to five dimensions are a kernel, but for a stack and for
            the batch dimension of a modulated convolution.

    >>> shapes = (64, 4, 16), (4, 16, 64), (3, 64, 32), (1, 8, 6, 3, 3)
    >>> [read_shape(shape).parts[0].shape(shape) for shape in shapes]
    [(1, 64, 64), (1, 64, 64), (3, 64, 32), (9, 8, 6)]
    """
    sizes = tuple(shape)
    if 0 in sizes and not called_weight:
        return Reading(reason=f"empty: a zero in the shape {sizes}")
    if sum(size > 1 for size in sizes) < 2 and not called_weight:
        return Reading(reason="a vector")
    front = next((at for at, size in enumerate(sizes) if size > 1), 0)
    if called_weight:  # a kernel with one output keeps its first side
        front = int(len(sizes) == 5 and sizes[0] == 1 and sizes[2] > sizes[3] == sizes[4])
    inner = sizes[front:]
    take = _take(inner, called_weight=called_weight)
    if take is None:
        return Reading(reason=f"{len(sizes)}-dimensional: which sides make its matrix is not known")
    part = Part("", partial(_without_front, front=front, take=take.take)) if front else take
    return Reading((part,), take is KERNEL[0])


def _take(sizes: tuple[int, ...], *, called_weight: bool) -> Part | None:
    """What makes the matrices of a tensor without sides of 1 in front."""
    if len(sizes) == 2:
        return WHOLE[0]
    short = max(sizes[2:]) <= LARGEST_KERNEL
    if len(sizes) > 3:
        return KERNEL[0] if short or called_weight else None
    a, b, c = sizes
    if not called_weight and c >= LEAST_HEAD and c in (a / b, a * b):
        return Part("", partial(flat, axes=2 if c == a * b else 1))
    if a < min(b, c) and not short:
        return WHOLE[0]
    return KERNEL[0] if short or called_weight else Part("", partial(flat, axes=1))


def _without_front(tensor: Tensor, front: int, take: Callable[[Tensor], Tensor]) -> Tensor:
    return take(tensor.flatten(0, front))

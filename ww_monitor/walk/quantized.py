"""Weights stored as codes with scales → the numbers they stand for, or the reason why these are not known.

What is stored is told by names and shapes alone, the same for a state dict and for the attributes of a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ww_monitor.walk.sharded import whole

BLOCK = 128
"""Side of the blocks that share a scale (DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2)."""

# By name: older versions of torch lack some.
FLOAT8 = {dtype for name, dtype in vars(torch).items() if name.startswith("float8_") and isinstance(dtype, torch.dtype)}
UNSCALED = "codes of eight bits whose scale is not there, as others' are"
_FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)  # which older versions of torch lack
_OF_VALUES = re.compile(r"input|output|act(ivation)?s?(?![a-z])|(^|_)[qkv](v?_cache)?_scale")  # not of the weights
_COMPANION = re.compile(
    r"scales?(?![a-z])|zero|offset|a(bs)?max|quant_|SCB|(^|[._])(g_idx|shift)$|(^|_)weight_(shape|format)$"
    r"|codebook|centroid|(^|_)(tables?|lut)\d*$"
)
_BOOK = re.compile("codebook|centroid|table|lut")
_PLACES = ("codes", "indices")
_ONLY = ("weight", "qweight", "weight_packed", "W_q", "_data", *_PLACES)  # the only weight of its module
_OTHER = re.compile(r"bias|lora|input|output|act(ivation)?s?(?![a-z])")  # beside eight-bit floats, no scale of theirs
_PACKED = {"qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors", "W_q": "HQQ", "_data": "quanto"}


class _Stored(Protocol):
    """What a tensor and a description of one have in common."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype | None: ...


@dataclass(frozen=True)
class Codes:
    """How codes become weights: (code − zero) · scale · factor.

    Attributes:
        scale: Name of the scale beside the codes.
        zero: Name of the zero point, or `""`.
        factor: What a product is multiplied by.
    """

    scale: str
    zero: str = ""
    factor: float = 1.0


def codes_of(attribute: str, stored: _Stored, beside: Mapping[str, _Stored]) -> Codes | str:
    """How the codes in an attribute become weights; why that is not known; or `""` for what is no code with scales.

    Args:
        attribute: Name of the tensor in its module.
        stored: The tensor.
        beside: What else the module has, by name.

    >>> fp8 = torch.zeros(256, 384, dtype=torch.float8_e4m3fn)
    >>> codes_of("weight", fp8, {"weight_scale_inv": torch.ones(2, 3)})
    Codes(scale='weight_scale_inv', zero='', factor=1.0)
    >>> codes_of("weight", fp8, {"weight_scale_inv": torch.ones(5, 7)})
    'codes with weight_scale_inv of shape (5, 7), a layout that is not known'
    """
    floats = stored.dtype is not None and stored.dtype.is_floating_point and stored.dtype not in FLOAT8
    if (attribute in _PACKED and not floats) or (stored.dtype is not None and stored.dtype is _FLOAT4):
        return f"packed codes ({_PACKED.get(attribute, 'four bits')}), which are not read"
    if not _may_be_codes(stored.dtype) or len(stored.shape) < 2 or _COMPANION.search(attribute):
        return ""
    found = companions(attribute, beside)
    if attribute in _PLACES and not any(_BOOK.search(name) for name in found):
        return ""  # places in something else
    scales = [name for name in found if "scale" in name or not re.search("zero|format|shape", name)]
    if not scales:
        found = numbers_of(attribute, stored, beside)
        return f"codes of {stored.dtype} with {', '.join(found)}, a layout that is not known" if found else ""
    known = {f"{attribute}_scale_inv": 1.0, f"{attribute}_scale": 1.0, f"scale_{attribute}": 1.0}
    if stored.dtype == torch.int8:
        known["SCB"] = 1 / 127  # the largest code stands for the largest magnitude of the row
    name, zeros = scales[0], [name for name in found if "zero" in name]
    unknown = len(scales) > 1 or name not in known or any(zero != f"{attribute}_zero_point" for zero in zeros)
    if unknown or stored.dtype not in (*FLOAT8, torch.int8):  # another integer may hold two codes, or four
        return f"codes of {stored.dtype} with {', '.join(found)}, a layout that is not known"
    for one in (name, *zeros):
        dtype, shape = beside[one].dtype, beside[one].shape
        fits = dtype is not None and (one != name or dtype.is_floating_point)
        if not fits or repeats(stored.shape, shape) is None:
            return f"codes with {one} of shape {tuple(shape)}, a layout that is not known"
    return Codes(name, zeros[0] if zeros else "", known[name])


def _may_be_codes(dtype: torch.dtype | None) -> bool:
    if dtype is None or dtype in FLOAT8:
        return dtype is not None
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def companions(attribute: str, beside: Iterable[str]) -> list[str]:
    """What belongs to the codes of an attribute: all scales of a `weight`, those with its name of another."""
    attribute = attribute.removesuffix("_blocks")
    named = [name for name in beside if _COMPANION.search(name) and not _OF_VALUES.search(name)]
    return [name for name in named if attribute in _ONLY or attribute in name]


def numbers_of(attribute: str, stored: _Stored, beside: Mapping[str, _Stored]) -> list[str]:
    """What of a module says how codes become weights, as far as names tell.

    Beside eight-bit floats without a scale of a known name that is all but a bias and what is about activations, where
    the weight is the module's only one (also bytes in which a library keeps its state); else what has the weight's
    name in its own, or is called a scale.
    """
    found = companions(attribute, beside)
    if found or stored.dtype not in FLOAT8:
        return found
    only = attribute in _ONLY
    named = (n for n in beside if only or attribute in n or (_COMPANION.search(n) and not _OF_VALUES.search(n)))
    return [name for name in named if not _OTHER.search(name) and beside[name].dtype not in FLOAT8]


def repeats(shape: Sequence[int], scale: Sequence[int]) -> tuple[int, ...] | None:
    """How many neighbours along each axis share an entry of a scale, which may lack axes; `None` if that is not known.

    One scale a tensor, a row, a column, an entry of the first axis, a block of both last axes, or a group of a row.

    >>> repeats((300, 256), (3, 2)), repeats((300, 256), (300,)), repeats((300, 256), (300, 8)), repeats((4, 6), (3, 2))
    ((128, 128), (1, 256), (1, 32), None)
    """
    scale = _aligned(shape, scale)
    if len(scale) != len(shape):
        return None
    found = []
    for axis, (size, entries) in enumerate(zip(shape, scale, strict=True)):
        last = axis == len(shape) - 1
        block = axis >= len(shape) - 2 and entries == -(-size // BLOCK)
        group = last and entries > 0 and size % entries == 0 and scale[axis - 1] == shape[axis - 1]
        if entries in (1, size):
            found.append(size // max(entries, 1))
        # 300 columns with 3 scales a row may be blocks, the last one short, or groups of 100: that is not known.
        elif block and not (group and size != entries * BLOCK):
            found.append(BLOCK)
        elif group and not block:
            found.append(size // entries)
        else:
            return None
    return tuple(found)


def _aligned(shape: Sequence[int], scale: Sequence[int]) -> tuple[int, ...]:
    """The shape of a scale with an axis for each of the weight's, where it is one number or a list along one axis."""
    ones = (1,) * (len(shape) - 1)
    count = prod(scale)
    if count == 1:
        return (1, *ones)
    if len(scale) < len(shape) and count in scale:
        # A list beside a square weight is one of its rows.
        columns = count == shape[-1] != shape[0] and len(shape) == 2
        return (*ones, count) if columns else (count, *ones)
    return tuple(scale)


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """(code − zero) · scale · factor, at least in float32.

    Args:
        codes: `[..., rows, columns]`.
        scale: In a layout that `repeats` knows.
        zero: Likewise.
        factor: A constant.
    """
    precision = torch.float64 if scale.dtype == torch.float64 else torch.float32
    weights = codes.to(precision)
    if zero is not None:
        weights = weights - _spread(zero.to(precision), codes.shape)
    return weights * (_spread(scale.to(precision), codes.shape) * factor)


def _spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """The scale of every element, where it is the same for all along an axis once."""
    times = repeats(shape, scale.shape)
    if times is None:
        raise ValueError(f"expected a scale for codes of shape {tuple(shape)}, got {tuple(scale.shape)}")
    scale = scale.reshape(_aligned(shape, scale.shape))
    for axis, (size, time) in enumerate(zip(shape, times, strict=True)):
        if scale.shape[axis] > 1 and time > 1:
            scale = scale.repeat_interleave(time, axis).narrow(axis, 0, size)  # the last block may be short
    return scale


# --- a module


def beside(module: torch.nn.Module, attribute: str, weight: Tensor) -> dict[str, Tensor]:
    """What a module has beside a weight: parameters, buffers, plain tensors and numbers, the statistics of LLM.int8."""
    own: dict[str, Any] = {**vars(module), **module._buffers, **module._parameters}
    for holder in (weight, own.get("state")):  # bitsandbytes keeps them at the weight, and later in a state
        if isinstance(getattr(holder, "SCB", None), Tensor):
            own.setdefault("SCB", holder.SCB)  # type: ignore[union-attr]
    numbers = {
        name: torch.tensor(value, dtype=torch.float32, device="cpu")
        for name, value in own.items()
        if (type(value) is float and _COMPANION.search(name)) or (type(value) is int and "scale" in name)
    }
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    return {name: value for name, value in {**numbers, **tensors}.items() if name != attribute}


def codes_in(module: torch.nn.Module, attribute: str, weight: Tensor) -> Codes | str:
    """`codes_of` of a weight of a module."""
    if not _may_be_codes(weight.dtype) and weight.dtype is not _FLOAT4:
        return ""  # before its module is looked through
    return codes_of(attribute, weight, beside(module, attribute, weight))


def read_codes(module: torch.nn.Module, attribute: str, weight: Tensor, codes: Codes) -> Tensor:
    """The weight that a module's codes stand for."""
    own = beside(module, attribute, weight)
    zero = whole(own[codes.zero]).to(weight.device) if codes.zero else None
    return dequantized(weight, whole(own[codes.scale]).to(weight.device), zero, codes.factor)

"""The quantised weights of a state dict → descriptions of what they stand for."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ww_monitor.walk.quantized import FLOAT8, UNSCALED, Codes, codes_of, dequantized, numbers_of
from ww_monitor.walk.unread import Unread

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives: OCP Microscaling Formats v1.0, section 5.3.3
_STATE = "quant_state.bitsandbytes__"
_MOST_STATE = 1 << 16  # bytes of its text, which is some hundred


def readable(tensors: Mapping[str, Unread]) -> dict[str, Unread]:
    """The tensors with every quantised weight described as the weight it stands for, or with the reason why not.

    Scales have a reason, for they are no weights. What eight-bit floats without a scale hold are taken for weights
    where no other tensor among them has one.
    """
    of: dict[str, dict[str, Unread]] = defaultdict(dict)  # by the module, or the weight whose name starts the key
    for key, value in tensors.items():
        owner = key.partition(f".{_STATE}")[0] if _STATE in key else key.rpartition(".")[0]
        of[owner][key.removeprefix(f"{owner}.")] = value
    found = dict(tensors)
    renamed: dict[str, str] = {}
    alone, scaled = [], False
    for key, value in tensors.items():
        path, _, attribute = key.rpartition(".")
        beside = {name: other for name, other in of[path].items() if name != attribute}
        beside |= {f"{attribute}.{name}": other for name, other in of.get(key, {}).items()}
        if len(value.shape) < 2 or not (weight := _weight(attribute, value, beside)):
            if value.dtype in FLOAT8 and len(value.shape) > 1:
                alone.append(key)
            continue
        scaled = scaled or value.dtype in FLOAT8
        if weight.dtype is torch.float32 and attribute.endswith("_blocks"):
            renamed[key] = key.removesuffix("_blocks")
        for name in numbers_of(attribute, value, beside):
            other = f"{path}.{name}".lstrip(".")
            found[other] = replace(found[other], reason=f"scales of {key}")
        found[key] = weight
    for key in alone if scaled else ():
        if not found[key].reason:
            found[key] = replace(found[key], reason=UNSCALED)
    return {renamed.get(key, key): value for key, value in found.items()}


def _weight(attribute: str, value: Unread, beside: Mapping[str, Unread]) -> Unread | None:
    """The weight behind one tensor, with the reason where it is not read; `None` if it is none that is quantised."""
    if state := next((name for name in beside if _STATE in name), ""):
        return _four_bits(value, beside, state) if attribute == "weight" else None
    if attribute.endswith("_blocks") and f"{attribute.removesuffix('_blocks')}_scales" in beside:
        return _microscaled(value, beside[f"{attribute.removesuffix('_blocks')}_scales"])
    codes = codes_of(attribute, value, beside)
    if not codes:
        return None
    if isinstance(codes, Codes) and "weight_format" in beside and beside["weight_format"].read().any():
        codes = "codes of eight bits in an order of a device's own"
    if isinstance(codes, str):
        return replace(value, reason=codes)
    scale, zero = beside[codes.scale], beside[codes.zero] if codes.zero else None
    return replace(value, dtype=torch.float32, read=partial(_scaled, value, scale, zero, codes.factor))


def _scaled(codes: Unread, scale: Unread, zero: Unread | None, factor: float) -> Tensor:
    return dequantized(codes.read(), scale.read(), zero.read() if zero else None, factor)


# --- MXFP4


def _microscaled(blocks: Unread, scales: Unread) -> Unread:
    """`[experts, columns, groups, 16]` bytes, `[experts, columns, groups]` exponents → `[experts, rows, columns]`."""
    shape = blocks.shape
    if {blocks.dtype, scales.dtype} != {torch.uint8} or len(shape) != 4 or shape[3] != 16 or scales.shape != shape[:3]:
        return replace(
            blocks, reason=f"blocks of codes with scales of shape {scales.shape}, a layout that is not known"
        )
    whole = (shape[0], shape[2] * 32, shape[1])
    return replace(blocks, shape=whole, dtype=torch.float32, read=partial(_read_microscaled, blocks, scales))


def _read_microscaled(blocks: Unread, scales: Unread) -> Tensor:
    """Two codes a byte, the low half first; a group of 32 shares an exponent with bias 127."""
    codes = blocks.read()
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32, device=codes.device)
    values = table[torch.stack([codes & 15, codes >> 4], dim=-1).long()].flatten(-2)
    exponents = scales.read().to(torch.int32) - 127
    return torch.ldexp(values, exponents[..., None]).flatten(-2).transpose(1, 2)


# --- bitsandbytes, four bits


def _four_bits(codes: Unread, beside: Mapping[str, Unread], state: str) -> Unread:
    """The weight in blocks that share a magnitude; its shape is in the text of its state."""
    try:
        text = beside[state].read() if prod(beside[state].shape) <= _MOST_STATE else None
        about: dict[str, Any] = json.loads(bytes([] if text is None else text.tolist()))
        shape = tuple(int(size) for size in about["shape"])
        if prod(shape) != 2 * prod(codes.shape) or codes.dtype != torch.uint8 or min(shape) < 1:  # two codes a byte
            raise ValueError(f"{codes.dtype} of shape {codes.shape} for {shape}")
        own = {name.removeprefix("weight."): other for name, other in beside.items()}
        read = partial(_read_four_bits, codes, own, shape, about)
    except Exception as error:  # noqa: BLE001 - whatever the text holds, it costs this weight only
        return replace(codes, reason=f"packed codes of four bits whose state is not known: {error}")
    return replace(codes, shape=shape, dtype=torch.float32, read=read)


def _read_four_bits(
    codes: Unread, own: Mapping[str, Unread], shape: tuple[int, ...], about: Mapping[str, Any]
) -> Tensor:
    """q(code) · absmax of the block, the high half of a byte first (Dettmers et al. 2023, arXiv:2305.14314).

    The magnitudes may themselves be codes of eight bits: m = q(code) · absmax of their block + offset.
    """
    packed = codes.read().flatten()
    largest = own["absmax"].read()
    if "nested_absmax" in own:
        nested = own["nested_quant_map"].read()[largest.long()]
        largest = (
            _by_block(nested, own["nested_absmax"].read(), int(about["nested_blocksize"])) + about["nested_offset"]
        )
    values = own["quant_map"].read()[torch.stack([packed >> 4, packed & 15], dim=-1).long().flatten()]
    return _by_block(values.float(), largest.float(), int(about["blocksize"])).view(shape)


def _by_block(values: Tensor, largest: Tensor, size: int) -> Tensor:
    """Every `size` neighbours times their own magnitude."""
    return values * largest.repeat_interleave(size)[: len(values)]

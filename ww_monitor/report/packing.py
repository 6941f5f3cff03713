"""Numbers → short text: quantised, differences along time, deflated, base64; the page's script undoes it."""

from __future__ import annotations

import base64
import json
import math
import zlib
from typing import Any

import numpy as np

COARSE_FROM = 262_144
"""Numbers from which a block has 12 bits each, not 16."""


def deflated(data: bytes, *, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> str:
    """zlib, then base64."""
    packer = zlib.compressobj(6, strategy=strategy)
    return base64.b64encode(packer.compress(data) + packer.flush()).decode("ascii")


def deflated_numbers(data: bytes) -> str:
    """`deflated` for noise, where only runs are looked for: five times as fast, and larger by a hundredth."""
    return deflated(data, strategy=zlib.Z_RLE)


def packed_json(data: Any) -> str:
    """Plain data as JSON in ASCII, deflated: nothing in it can be read as part of a page."""
    return deflated(json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii"))


def planes(codes: np.ndarray) -> bytes:
    """All low bytes, then all high bytes: what varies little deflates well by itself."""
    return (codes & 255).astype(np.uint8).tobytes() + (codes >> 8).astype(np.uint8).tobytes()


def packed(values: np.ndarray) -> tuple[dict[str, Any], str]:
    """A table `[layers, snapshots]` with NaN for what is not known → how it was quantised, and its block.

    Codes are 0 for NaN, then equal steps of y; y is the value, or asinh(value/scale) where the values span decades.
    Whole numbers of a small range are exact. Differences along the snapshots, modulo 2¹⁶, are what is deflated.

    >>> how, block = packed(np.array([[1.0, 2.0, np.nan]]))
    >>> how["bits"], how["low"], how["step"], how["scale"]
    (16, 1.0, 1.0, 0.0)
    """
    known, values = np.isfinite(values), np.clip(values, -1e300, 1e300)  # twice the largest float is infinite
    found = values[known]
    bits = 12 if values.size > COARSE_FROM else 16
    most = 2**bits - 2  # steps: 0 is NaN
    whole = bool(found.size) and bool((found == np.rint(found)).all()) and np.ptp(found) <= most
    scale = 0.0 if whole else _scale(found)
    with np.errstate(invalid="ignore"):
        y = np.arcsinh(values / scale) if scale else values
    low, high = (float(y[known].min()), float(y[known].max())) if found.size else (0.0, 0.0)
    step = 1.0 if whole else (high - low) / most or 1.0
    codes = np.zeros(values.shape, np.uint16)
    codes[known] = np.rint((y[known] - low) / step) + 1
    how = {"bits": bits, "low": low, "step": step, "scale": scale, "shape": values.shape}
    return how, deflated_numbers(planes(np.diff(codes, axis=1, prepend=np.uint16(0))))


def _scale(found: np.ndarray) -> float:
    """0 for values of one magnitude; else the size from which relative precision counts."""
    sizes = np.abs(found[found != 0])
    if not sizes.size:
        return 0.0
    low, middle = np.quantile(sizes, [0.01, 0.5])
    spread = float(sizes.max() / max(middle, 1e-300))
    return float(max(low, sizes.max() * 1e-30)) if spread > 50 or middle > 50 * low else 0.0  # 50: our choice


def short(value: float) -> float | None:
    """Five digits of a number, `None` where it is not known."""
    return float(f"{value:.5g}") if math.isfinite(value) else None

"""weightwatcher 0.7.7 on 28 models: the models, built anew from numpy's frozen streams, and the values that it gave.

The values are those of `analyze(randomize=True, mp_fit=True, detX=True)` after `numpy.random.seed(12345)`, and of a few
of its functions. NaN and infinities are strings there. A case without rows is one on which the tool raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from torch import nn

SEED = 12345
"""Of numpy's global stream, from which the tool drew its shuffles."""


@cache
def published() -> dict[str, Any]:
    """What the tool gave: `cases` by name, and the functions `distances`, `smoothing`, `sharpening` and `vectors`."""
    return json.loads(Path(__file__).with_name("weightwatcher-0.7.7.json").read_text(encoding="utf-8"))


def rows_of(case: str) -> list[dict[str, Any]]:
    """The tool's rows of a case, none where it raised."""
    return published()["cases"][case]["rows"]


def number(value: Any) -> float:
    """A column of the file: NaN and infinities are strings there, an unset xmax is null."""
    return math.nan if value is None else float(value)


def linear(weights: Any, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """One linear layer that holds the weights, by way of float32."""
    stored = torch.as_tensor(np.asarray(weights), dtype=torch.float32, device="cpu").to(dtype)
    return nn.Sequential(_holding(nn.Linear(stored.shape[1], stored.shape[0], bias=False), stored))


def conv(kernel: Any) -> nn.Sequential:
    """One convolution that holds the kernel `[out, in, height, width]`."""
    stored = torch.as_tensor(np.asarray(kernel), dtype=torch.float32, device="cpu")
    return nn.Sequential(_holding(nn.Conv2d(stored.shape[1], stored.shape[0], stored.shape[2:], bias=False), stored))


def _holding(layer: nn.Module, weights: torch.Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weights)
    return layer


def normal(*shape: int, seed: int) -> np.ndarray:
    return RandomState(seed).standard_normal(shape)


def student(freedom: float, *shape: int, seed: int) -> np.ndarray:
    return RandomState(seed).standard_t(freedom, shape)


def planted(eigenvalues: np.ndarray, long_side: int, seed: int) -> np.ndarray:
    """N × M with these squared singular values, up to the rounding to float32."""
    stream, short_side = RandomState(seed), len(eigenvalues)
    left, _ = np.linalg.qr(stream.standard_normal((long_side, short_side)))
    right, _ = np.linalg.qr(stream.standard_normal((short_side, short_side)))
    return (left * np.sqrt(eigenvalues)) @ right.T


def power_law(alpha: float, count: int) -> np.ndarray:
    """The mid-point quantiles of a density ~ x^-alpha on x >= 1."""
    return (1.0 - (np.arange(count) + 0.5) / count) ** (-1.0 / (alpha - 1.0))


def trapped(rows: int, columns: int, seed: int) -> np.ndarray:
    """Noise with three entries far above the size that makes an outlier of the shuffled matrix."""
    weights = normal(rows, columns, seed=seed)
    weights[3, 7], weights[rows // 3, columns // 3], weights[rows - 5, columns - 9] = 60.0, -50.0, 45.0
    return weights


def spiked(rows: int, columns: int, strengths: list[float], seed: int) -> np.ndarray:
    """Noise of variance 1/N plus planted singular values."""
    stream = RandomState(seed)
    noise = stream.standard_normal((rows, columns)) / np.sqrt(rows)
    left, _ = np.linalg.qr(stream.standard_normal((rows, len(strengths))))
    right, _ = np.linalg.qr(stream.standard_normal((columns, len(strengths))))
    return noise + (left * np.asarray(strengths, float)) @ right.T


def with_zero_columns() -> np.ndarray:
    weights = normal(100, 60, seed=19)
    weights[:, 45:] = 0.0
    return weights


def with_one_nan() -> np.ndarray:
    weights = normal(120, 60, seed=20)
    weights[3, 4] = np.nan
    return weights


class Mixed(nn.Module):
    """Most kinds of layer in one model, one tied weight, and things that the tool must ignore."""

    def __init__(self) -> None:
        super().__init__()
        stream = RandomState(900)

        def holding(layer: nn.Module) -> nn.Module:
            drawn = stream.standard_normal(tuple(layer.weight.shape)) * 0.05
            return _holding(layer, torch.as_tensor(drawn, dtype=torch.float32, device="cpu"))

        self.emb = holding(nn.Embedding(300, 32))
        self.conv1 = holding(nn.Conv2d(3, 24, 5))
        self.conv2 = holding(nn.Conv2d(24, 16, 3))
        self.depthwise = holding(nn.Conv2d(24, 24, 3, groups=24))
        self.up = nn.ConvTranspose2d(16, 24, 3)
        self.norm = nn.LayerNorm(32)
        self.lstm = nn.LSTM(32, 32)
        self.attn = nn.MultiheadAttention(32, 4)
        self.attn.out_proj = holding(self.attn.out_proj)
        self.wide = holding(nn.Linear(200, 64))
        self.square = holding(nn.Linear(96, 96))
        self.too_small = nn.Linear(5, 100)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.emb.weight


CASES: dict[str, Callable[[], nn.Module]] = {
    "gauss_300x100": lambda: linear(normal(300, 100, seed=1)),
    "gauss_square_128": lambda: linear(normal(128, 128, seed=2) / np.sqrt(128)),
    "student_t3_400x200": lambda: linear(student(3.0, 400, 200, seed=3) / 20.0),
    "student_t1.5_300x150": lambda: linear(student(1.5, 300, 150, seed=4) / 17.0),
    "planted_alpha_1.5": lambda: linear(planted(power_law(1.5, 200), 400, 5)),
    "planted_alpha_2": lambda: linear(planted(power_law(2.0, 200), 400, 6)),
    "planted_alpha_3": lambda: linear(planted(power_law(3.0, 200), 400, 7)),
    "planted_alpha_5": lambda: linear(planted(power_law(5.0, 200), 400, 8)),
    "lowrank_noise_500x200": lambda: linear(spiked(500, 200, [8, 6, 4, 3, 2.5], 9)),
    "square_spikes_200": lambda: linear(spiked(200, 200, [100, 6, 5, 4], 10)),
    "trap_400x120": lambda: linear(trapped(400, 120, 11)),
    "trap_200x60": lambda: linear(trapped(200, 60, 12)),
    "conv3x3_64_128": lambda: conv(normal(128, 64, 3, 3, seed=13) * np.sqrt(2.0 / 576)),
    "conv2x2_64_32": lambda: conv(normal(32, 64, 2, 2, seed=14) * 0.1),
    "tiny_8x8": lambda: linear(normal(8, 8, seed=15)),
    "tiny_60x12": lambda: linear(normal(60, 12, seed=16)),
    "tall_1000x8": lambda: linear(normal(1000, 8, seed=17)),
    "rank30_120x80": lambda: linear(normal(120, 30, seed=18) @ normal(30, 80, seed=118)),
    "zero_columns_100x60": lambda: linear(with_zero_columns()),
    "one_nan_120x60": lambda: linear(with_one_nan()),
    "bfloat16_256x128": lambda: linear(student(4.0, 256, 128, seed=21) / 16.0, torch.bfloat16),
    "float16_256x128": lambda: linear(student(4.0, 256, 128, seed=21) / 16.0, torch.float16),
    "scaled_1e-3_t3": lambda: linear(student(3.0, 400, 200, seed=3) / 20.0 * 1e-3),
    "scaled_1e-5_t3": lambda: linear(student(3.0, 400, 200, seed=3) / 20.0 * 1e-5),
    "zeros_60x40": lambda: linear(np.zeros((60, 40))),
    "identity_60": lambda: linear(np.eye(60)),
    "fingers_120x60": lambda: linear(planted(np.sort(RandomState(10).exponential(1.0, 60)) + 1.0, 120, 77)),
    "mixed_model": Mixed,
}
"""The 28 models by name. Some are there for one known fault of the tool: see `EXCLUDED` in the tests of parity."""

"""PL_Alpha_Hill of TempBalance, and FARMS' alpha, written down from the papers, beside ours on given weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import ww_monitor

METRICS = ["alpha", "alpha_hill"]


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Entries with a heavy tail, and a few directions above them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=0.05).sqrt()
    directions = torch.randn(shape[0], 6, generator=generator) @ torch.randn(
        6, math.prod(shape[1:]), generator=generator
    )
    return noise + directions.reshape(shape) / 4


def slices(weight: np.ndarray) -> list[np.ndarray]:
    """A dense weight, or the [out, in] matrices of a kernel."""
    flat = weight.reshape(*weight.shape[:2], -1)
    return [flat[:, :, k] for k in range(flat.shape[2])]


def hill(eigenvalues: list[float]) -> float:
    """Zhou et al. 2023 (arXiv 2312.00359), eq. 2: 1 + k/Σ ln(λ_{n−i+1}/λ_{n−k}), xmin the median, at index n // 2."""
    x = sorted(eigenvalues)
    tail = x[len(x) // 2 :]
    return 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)


def tempbalance(weight: np.ndarray) -> float:
    """Of the pooled squared singular values of all slices."""
    return hill([s * s for one in slices(weight) for s in np.linalg.svd(one.astype(np.float64), compute_uv=False)])


def farms(weight: np.ndarray) -> float:
    """Hu et al. 2025 (arXiv 2506.06280) at ratio 1: of square windows along the long side, evenly apart."""
    pooled = []
    for one in slices(weight):
        tall = one if one.shape[0] >= one.shape[1] else one.T
        n, m = tall.shape
        count = math.ceil(n / m)
        for start in [round(k * (n - m) / max(1, count - 1)) for k in range(count)]:
            square = tall[start : start + m].astype(np.float64)
            pooled += list(np.linalg.eigvalsh(square.T @ square))
    return hill(pooled)


WEIGHTS = {
    "square": (96, 96),
    "tall": (300, 64),
    "wide, disjoint windows": (64, 256),  # with a stride of one side, as the paper's figure has them
    "kernel": (48, 24, 3, 3),
    "odd": (101, 75),
}


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
def test_alpha_hill_is_that_of_tempbalance_and_by_windows_that_of_farms(shape):
    weight = heavy(*shape)
    layer = nn.Conv2d(shape[1], shape[0], 3) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
    layer.weight = nn.Parameter(weight)
    array = weight.numpy()
    for given in ({}, {"fit": "hill"}):
        (row,) = ww_monitor.analyze(layer, metrics=METRICS, **given).layers
        assert row.value("alpha_hill") == pytest.approx(tempbalance(array), rel=1e-5)
        assert (row.value("alpha") == row.value("alpha_hill")) == bool(given)
    (row,) = ww_monitor.analyze(layer, metrics=METRICS, aspect_ratio=1.0).layers
    assert row.value("alpha_hill") == pytest.approx(farms(array), rel=1e-5)


def test_windows_undo_what_the_shape_alone_does_to_the_hill_alpha():
    """The papers' point: of random matrices of one law, the square one has a smaller alpha than the tall one."""
    square, tall = (torch.randn(n, 100, generator=torch.Generator().manual_seed(0)).numpy() for n in (100, 800))
    assert tempbalance(tall) > 2 * tempbalance(square)
    assert farms(tall) == pytest.approx(farms(square), rel=0.05)


def test_the_preset_of_weightwatcher_has_the_same():
    layer = nn.Linear(96, 96)
    (row,) = ww_monitor.analyze(layer, metrics=["alpha_hill"], preset="weightwatcher").layers
    assert row.value("alpha_hill") == pytest.approx(tempbalance(layer.weight.detach().numpy()), rel=1e-5)

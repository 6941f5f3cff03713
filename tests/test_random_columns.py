"""weightwatcher's columns of the shuffled spectrum: equal on the same shuffles, alike on our own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import ww_monitor
from tests.reference.cases import CASES, SEED, published, rows_of
from ww_monitor.metric import Batch, choose
from ww_monitor.settings import AnalysisOptions
from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.weightwatcher import Randomized

COLUMNS = [
    "max_rand_eval", "rand_distance", "ww_softrank", "ww_maxdist", "num_traps", "rand_num_spikes", "rand_sigma_mp",
    "rand_mp_softrank", "rand_bulk_min", "rand_bulk_max", "rand_W_scale",
]  # fmt: skip
DRAWN = [
    "gauss_300x100",
    "student_t3_400x200",
    "lowrank_noise_500x200",
    "trap_400x120",
    "trap_200x60",
    "conv3x3_64_128",
]


def weights_of(layer: torch.nn.Module) -> torch.Tensor:
    """Its slices `[slices, rows, columns]`."""
    weights = layer.weight.detach()
    return weights.flatten(2).permute(2, 0, 1) if weights.ndim == 4 else weights[None]


def legacy_shuffles(slices: torch.Tensor, factor: float) -> Randomized:
    """The tool's own draws, from numpy's legacy stream in its order: replica outer, slice inner, then one more."""
    stream = np.random.RandomState(SEED)
    scale = np.float64(math.sqrt(factor))

    def draw() -> np.ndarray:
        spectra = []
        for w in slices.numpy():
            flat = (w * scale if factor != 1 else w).flatten()
            stream.shuffle(flat)
            spectra.append(eigenvalues(torch.from_numpy(flat.reshape(w.shape))[None]).values[0].numpy())
        return np.concatenate(spectra)

    replicas = 5 if slices.shape[0] * min(slices.shape[1:]) < 100 else 1
    pooled = np.sort(np.concatenate([draw() for _ in range(replicas)]))
    return Randomized(pooled, np.sort(draw()))


@pytest.mark.parametrize("case", DRAWN)
def test_columns_equal_the_tools_on_its_own_shuffles(case):
    slices = weights_of(CASES[case]()[0])
    factor = 0.5 if case.startswith("conv") else 1.0
    batch = Batch(
        slice_eigenvalues=eigenvalues(slices).values[None] * factor,
        status=torch.zeros(1, dtype=torch.int64),
        long_side=torch.tensor([float(max(slices.shape[1:]))], dtype=torch.float64),
        eps=torch.tensor([torch.finfo(torch.float32).eps], dtype=torch.float64),
        definitions=AnalysisOptions(preset="weightwatcher"),
        measured={"randomized": [legacy_shuffles(slices, factor)]},
    )
    row = rows_of(case)[0]
    for metric in choose(COLUMNS, "weightwatcher"):
        assert metric.function(batch).item() == pytest.approx(float(row[metric.name]), rel=1e-9), metric.name


@pytest.mark.parametrize("case", DRAWN)
def test_columns_on_our_own_shuffles_lie_where_the_tools_seeds_do(case):
    """Within the mean ± 5 spreads of the tool's six published draws."""
    ours = ww_monitor.analyze(CASES[case](), preset="weightwatcher", metrics=COLUMNS).layers[0].metrics
    draws, first = published()["cases"][case]["more_seeds"], rows_of(case)[0]
    for column in ("max_rand_eval", "rand_sigma_mp", "rand_bulk_max", "rand_mp_softrank", "ww_softrank"):
        seen = np.array([*draws[column], first[column]])
        assert abs(ours[column] - seen.mean()) <= 5 * seen.std() + 0.02 * abs(seen.mean()), column

"""The columns of the singular vectors are weightwatcher's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.reference.cases import published
from ww_monitor import analyze
from ww_monitor.metric import TABLE
from ww_monitor.spectra.vectors import VECTOR_METRICS, vector_metrics

COLUMNS = [name for name, metric in TABLE["weightwatcher"].items() if metric.needs == "vectors"]

VECTORS = """
def answer(weightwatcher, weights):
    import torch
    layer = torch.nn.Linear(len(weights[0]), len(weights), bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor(weights))
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer))
    details = watcher.analyze(vectors=True, plot=False, savefig=False)
    return {name: float(details[name].iloc[0]) for name in details if "_vec_" in name or "_ratio" in name}
"""


def test_there_are_twelve_columns():
    assert len(COLUMNS) == 12


@pytest.mark.parametrize("shape", [(80, 50), (30, 60)])
def test_columns_equal_weightwatchers(run_weightwatcher, shape):
    """The eigenvector at xmin itself falls on either side there, by rounding; here it belongs to the tail."""
    rng = np.random.RandomState(shape[0])
    weights = torch.tensor(rng.standard_t(3.0, shape), dtype=torch.float32)
    theirs = run_weightwatcher(VECTORS, weights.tolist())
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight = nn.Parameter(weights)
    row = analyze(layer, preset="weightwatcher", metrics=[*COLUMNS, "num_pl_spikes"]).layers[0]
    assert set(theirs) == set(COLUMNS)
    values, tail = vector_metrics(weights[None])[:, 0], int(row.value("num_pl_spikes"))
    for index, kind in enumerate(VECTOR_METRICS):
        for name, moment in (("mean", np.mean), ("var", np.var)):
            sides = [(values[index][:-size], values[index][-size:]) for size in (tail, tail - 1)]
            for part, where in (("bulk", 0), ("tail", 1)):
                column = f"{part}_{name}_{kind}"
                with_xmin, without = (float(moment(side[where])) for side in sides)
                assert row.value(column) == pytest.approx(with_xmin, rel=1e-9)
                assert theirs[column] in (pytest.approx(with_xmin, rel=1e-6), pytest.approx(without, rel=1e-6)), column


def test_one_vector_has_the_published_values():
    """The vector is the leading one of a rank-one matrix; its entropy is that of the histogram of its entries."""
    expected = published()["vectors"]
    v = np.random.RandomState(0).standard_normal(500)
    w = torch.from_numpy(np.outer(np.ones(600), v))[None]
    entropy, localization, participation = vector_metrics(w)[:, 0, -1]
    assert localization == pytest.approx(expected["localization_ratio"], rel=1e-9)
    assert participation == pytest.approx(expected["participation_ratio"], rel=1e-9)
    assert entropy == pytest.approx(expected["discrete_entropy"], rel=1e-6)

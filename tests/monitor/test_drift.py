"""The drift of spectra from one snapshot to the next: by hand, after a resume, in the file, where a layer is new."""

import json
import math

import numpy as np
import pytest
import torch

from tests.matrices import broken, matrix, normal
from ww_monitor import History, Monitor, Options
from ww_monitor.metric.drift import SKETCH_SIZE, distance, sketch
from ww_monitor.monitor import checkpoint
from ww_monitor.sinks.jsonl import JsonLines


def with_singular(*values, rows=12):
    weight = torch.zeros(rows, len(values), dtype=torch.float64)
    weight[: len(values)] = torch.diag(torch.tensor(values, dtype=torch.float64))
    return weight


FIRST = with_singular(6, 3, 1, 1, 1, 1, 1, 1, 1)  # of 16
SECOND = with_singular(12, 3, 1, 1, 1, 1, 1, 2, 2)  # of 24
BY_HAND = 0.5 * (1 / 8 + 1 / 16 + 2 * (1 / 12 - 1 / 16) + 5 * (1 / 16 - 1 / 24))
"""σ/Σσ goes from 6, 3, 1 × 7 of 16 to 12, 3, 2, 2, 1 × 5 of 24."""


def drifts(monitor, *weights, start=0):
    seen = [monitor.observe([matrix("fc", one)], step=start + at) for at, one in enumerate(weights)]
    return [snapshot["fc"].value("spectral_drift") for snapshot in seen]


def test_the_drift_is_that_of_the_trace_normalised_singular_values():
    monitor = Monitor(every_n_steps=1)
    first, second, third, again = drifts(monitor, FIRST, SECOND, 5 * SECOND, FIRST)
    assert math.isnan(first)
    assert second == pytest.approx(BY_HAND, rel=1e-6)
    assert third == pytest.approx(0, abs=1e-7)  # a scale is no drift
    assert again == pytest.approx(BY_HAND, rel=1e-6)


def test_it_is_not_known_at_the_first_snapshot_and_published_from_the_second_on():
    monitor = Monitor(every_n_steps=1)
    seen = [monitor.observe([matrix("fc", one)], step=at) for at, one in enumerate((FIRST, SECOND))]
    assert ["ww/spectral_drift" in snapshot.scalars() for snapshot in seen] == [False, True]
    assert seen[1].summary["spectral_drift"] == seen[1]["fc"].value("spectral_drift")
    assert all(row.sketch is None for snapshot in monitor.history for row in snapshot.layers)


def test_a_run_that_a_checkpoint_resumes_knows_the_spectra_before_it():
    monitor = Monitor(every_n_steps=1)
    weights = [normal(60, 50, seed=seed) for seed in range(3)]
    whole = drifts(monitor, *weights)
    before = Monitor(every_n_steps=1)
    drifts(before, *weights[:2])
    after = Monitor(every_n_steps=1)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert drifts(after, weights[2], start=2) == whole[2:]


def test_a_checkpoint_without_spectra_is_resumed_too():
    monitor = Monitor(every_n_steps=1)
    drifts(monitor, FIRST)
    state = monitor.state_dict()
    state["packed"] = checkpoint.compress({**checkpoint.expand(state["packed"]), "spectra": {}})
    monitor.load_state_dict(state)
    assert math.isnan(drifts(monitor, SECOND, start=1)[0])


def test_the_file_has_the_drift_of_the_run_and_no_sketch(tmp_path):
    monitor = Monitor(every_n_steps=1, sinks=[JsonLines(tmp_path / "h.jsonl")])
    live = drifts(monitor, FIRST, SECOND)
    monitor.close()
    read = History.read(tmp_path / "h.jsonl").series("spectral_drift", layer="fc")[1]
    assert read == pytest.approx(live, nan_ok=True)
    assert "sketch" not in (tmp_path / "h.jsonl").read_text(encoding="utf-8")


def test_a_layer_that_was_broken_or_away_is_compared_with_when_it_was_last_known():
    monitor = Monitor(every_n_steps=1)
    monitor.observe([matrix("fc", FIRST)], step=0)
    monitor.observe([matrix("fc", FIRST * math.nan), matrix("new", SECOND)], step=1)
    snapshot = monitor.observe([matrix("fc", SECOND), matrix("new", SECOND), broken("bad", OSError("gone"))], step=2)
    found = {row.name: row.value("spectral_drift") for row in snapshot.layers}
    assert found["fc"] == pytest.approx(BY_HAND, rel=1e-6)
    assert found["new"] == 0
    assert math.isnan(found["bad"])


def test_a_new_run_and_metrics_without_it_know_none():
    monitor = Monitor(every_n_steps=1)
    drifts(monitor, FIRST, SECOND)
    monitor.restart()
    assert math.isnan(drifts(monitor, SECOND)[0])
    plain = Monitor(every_n_steps=1, options=Options(metrics=["alpha"]))
    assert [math.isnan(value) for value in drifts(plain, FIRST, SECOND)] == [True, True]
    assert "spectral_drift" not in plain.history.last.summary


def test_the_background_gives_the_same():
    monitor = Monitor(every_n_steps=1, mode="async")
    for step, weight in enumerate((FIRST, SECOND)):
        monitor.observe([matrix("fc", weight)], step=step)
        monitor.finish()
    assert monitor.history.series("spectral_drift", layer="fc")[1][1] == pytest.approx(BY_HAND, rel=1e-6)


@pytest.mark.parametrize("n", [1, 8, SKETCH_SIZE, SKETCH_SIZE + 1, 100, 1000])
def test_a_sketch_keeps_the_trace_and_the_largest_value_and_never_overstates(n):
    spectra = torch.as_tensor(np.random.default_rng(n).exponential(size=(2, n))).sort(1).values
    sigma = spectra.sqrt().flip(1)
    share = sigma / sigma.sum(1, keepdim=True)
    found = sketch(spectra)
    assert found.shape == (2, min(n, SKETCH_SIZE))
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 0], share[:, 0], rtol=1e-6, atol=0)
    exact = float((share[0] - share[1]).abs().sum() / 2)
    drift = distance(found[0].tolist(), found[1].tolist())
    assert drift <= exact + 1e-6
    assert n > SKETCH_SIZE or drift == pytest.approx(exact, abs=1e-6)

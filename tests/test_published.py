"""The theory's published claim on real trained weights: alpha-hat orders a family of models by test error."""

from __future__ import annotations

import pytest

from ww_monitor import analyze

TEST_ERROR = {"resnet20-12fca82f.th": 8.27, "resnet32-d509ac18.th": 7.37}
"""Percent, CIFAR-10, as their authors state it."""

MEAN_ALPHA_HAT = """
def answer(weightwatcher, path):
    import torch
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    watcher = weightwatcher.WeightWatcher(model=state)
    return watcher.get_summary(watcher.analyze(plot=False, savefig=False))["alpha_weighted"]
"""


@pytest.mark.parametrize("file", TEST_ERROR)
def test_the_mean_alpha_hat_of_a_checkpoint_is_weightwatchers(shared, run_weightwatcher, file):
    """Read from the file as it is, prefixes and all."""
    path = shared / "data" / file
    snapshot = analyze(path, preset="weightwatcher")
    assert snapshot.summary["alpha_weighted"] == pytest.approx(run_weightwatcher(MEAN_ALPHA_HAT, str(path)), rel=1e-9)


def test_the_better_model_has_the_smaller_alpha_hat(shared):
    by_error = sorted(TEST_ERROR, key=lambda file: TEST_ERROR[file])
    alpha_hat = [analyze(shared / "data" / file, preset="weightwatcher").summary["alpha_weighted"] for file in by_error]
    assert alpha_hat == sorted(alpha_hat)

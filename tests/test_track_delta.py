"""Following W − W₀: what alpha is blind to, in a loop of one's own and under a Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ww_monitor import Monitor
from ww_monitor.errors import InvalidArgument
from ww_monitor.walk.sources import walk_source
from ww_monitor.walk.torch import walk


def orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1))).Q


def test_a_turned_matrix_has_the_same_alpha_and_another_left_subspace():
    layer = nn.Linear(60, 80, bias=False)
    monitor = Monitor(track_delta=True)
    before = monitor.observe(walk(layer), step=0).layers[0]
    with torch.no_grad():
        layer.weight.copy_(orthogonal(80) @ layer.weight)
    after = monitor.observe(walk(layer), step=1).layers[0]
    assert after.value("alpha") == pytest.approx(before.value("alpha"), rel=1e-3)
    assert (before.value("delta_norm"), after.value("delta_norm") > 1) == (0.0, True)
    assert before.value("left_rotation") == pytest.approx(0.0, abs=1e-9)
    assert after.value("left_rotation") > 0.7
    assert after.value("right_rotation") == pytest.approx(0.0, abs=1e-4)


def test_the_baseline_is_a_copy_and_is_forgotten_when_a_new_run_begins():
    layer = nn.Linear(16, 16, bias=False)
    monitor = Monitor(track_delta=True)
    monitor.observe(walk(layer), step=0)
    with torch.no_grad():
        layer.weight.mul_(3)
    assert monitor.observe(walk(layer), step=1).summary["delta_norm"] == pytest.approx(2.0, rel=1e-6)
    monitor.restart()
    assert monitor.observe(walk(layer), step=0).summary["delta_norm"] == 0.0


def test_without_it_no_copy_is_held_and_no_column_is_added():
    monitor = Monitor()
    snapshot = monitor.observe(walk(nn.Linear(16, 16)), step=0)
    assert "delta_norm" not in snapshot.layers[0].metrics
    assert monitor.analyzer._baseline is None


def test_the_callback_publishes_the_drift_and_training_is_bit_identical(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    from ww_monitor.callbacks.lightning import SpectralMonitor

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(16, 12)

        def training_step(self, batch, index):
            return self.fc(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    def trained(callbacks):
        net = Net()
        data = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(0))
        trainer = pl.Trainer(
            max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=None))
        return net, trainer

    net, trainer = trained([SpectralMonitor(every_n_steps=4, track_delta=True, console=False)])
    plain, _ = trained([])
    assert torch.equal(net.fc.weight, plain.fc.weight)
    assert trainer.callback_metrics["ww/delta_norm"] > 0.01
    assert 0 <= trainer.callback_metrics["ww/left_rotation"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"lora": ("base", "factors")}, "factors"), ({"experts": "mixed"}, "mixed")],
)
def test_a_wrong_choice_for_the_walker_is_refused_at_construction(arguments, message):
    pytest.importorskip("pytorch_lightning")
    from ww_monitor.callbacks.lightning import SpectralMonitor

    with pytest.raises(InvalidArgument, match=message):
        SpectralMonitor(**arguments)


def test_the_callback_hands_split_to_the_walker():
    pytest.importorskip("pytorch_lightning")
    from ww_monitor.callbacks.lightning import SpectralMonitor

    net = nn.ModuleDict({"both": nn.Linear(32, 40)})
    callback = SpectralMonitor(split={"both": 2})
    assert [matrix.shape for matrix in walk_source(net, **callback._how)] == [(1, 20, 32), (1, 20, 32)]

"""Trackers beside the sinks: the framework's logger carries our values, and the table of dashboards what is more."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.histories import published
from ww_monitor.sinks import trackers
from ww_monitor.sinks.dashboard import Dashboard

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning, the trainer, is not installed")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))
        self.attention = nn.MultiheadAttention(24, 2)

    def training_step(self, batch, batch_idx):
        x = self.attention(batch[0], batch[0], batch[0])[0]
        return nn.functional.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(folder, logger):
    from ww_monitor.callbacks.lightning import SpectralMonitor

    monitor = SpectralMonitor(4, console=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 24, generator=generator), torch.arange(64) % 10)
    trainer.fit(Module(), DataLoader(data, batch_size=8))
    return monitor.monitor.history


@pytest.mark.filterwarnings("ignore:.*loader strategy is deprecated.*")  # mlflow's use of sqlalchemy
def test_mlflow_gets_what_is_published_of_every_snapshot(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow, the tracker, is not installed")
    from pytorch_lightning.loggers import MLFlowLogger

    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    logger = MLFlowLogger("run", tracking_uri=address, artifact_location=str(tmp_path / "artifacts"))
    history = fit(tmp_path, logger)
    client = mlflow.tracking.MlflowClient(address)
    expected = {max(0, one.step - 1): values for one, values in zip(history, published(history), strict=True)}
    assert list(expected) == [0, 3, 7]
    keys = set().union(*expected.values())
    assert {"ww/alpha", "ww_alpha/net.0", "ww_alpha/attention.q"} <= keys
    assert {key for key in client.get_run(logger.run_id).data.metrics if key.startswith("ww")} == keys
    for key in keys:
        read = {metric.step: metric.value for metric in client.get_metric_history(logger.run_id, key)}
        assert read == {x: values[key] for x, values in expected.items() if key in values}


# --- dashboards


class Wall:
    """A tracker that nobody has heard of."""

    def __init__(self) -> None:
        self.painted: list[tuple[int, int]] = []

    def paint(self, step: int, layers: int) -> None:
        self.painted.append((step, layers))


class Mural(Dashboard):
    """Its dashboard."""

    def _show(self, tracker, snapshot, step, values):
        assert not values
        tracker.paint(step, len(snapshot.layers))


class Painter(pl.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.wall = Wall()

    @property
    def experiment(self):
        return self.wall


def test_one_entry_in_the_table_brings_a_new_trackers_dashboard_to_the_callbacks(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.DASHBOARDS, "paint", Mural)
    painter = Painter()
    history = fit(tmp_path, painter)
    assert painter.wall.painted == [(max(0, one.step - 1), len(one.layers)) for one in history]
    assert len(history) == 3


def test_a_trainers_callback_gives_the_tracker_that_the_table_knows(monkeypatch):
    huggingface = pytest.importorskip("ww_monitor.callbacks.huggingface", reason="transformers is not installed")
    monkeypatch.setitem(trackers.DASHBOARDS, "paint", Mural)

    class Held:
        def __init__(self, **held) -> None:
            vars(self).update(held)

    wall = Wall()
    assert huggingface._tracker(Held(easel=1, wall=wall)) is wall
    assert huggingface._tracker(Held(module=Held(run=wall))) is wall
    assert huggingface._tracker(Held(module=pytest)) is None


def test_what_has_any_attribute_is_no_tracker():
    class Anything:
        def __getattr__(self, name):
            return print

    assert trackers.dashboard_of(Anything()) is None
    assert trackers.dashboard_of(None) is None

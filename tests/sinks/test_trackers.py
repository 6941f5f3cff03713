"""Trackers that nobody wrote a sink for: the framework's logger carries our values into their local stores."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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
def test_mlflow_gets_every_scalar_of_every_snapshot(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow, the tracker, is not installed")
    from pytorch_lightning.loggers import MLFlowLogger

    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    logger = MLFlowLogger("run", tracking_uri=address, artifact_location=str(tmp_path / "artifacts"))
    history = fit(tmp_path, logger)
    client = mlflow.tracking.MlflowClient(address)
    expected = {max(0, snapshot.step - 1): snapshot.scalars() for snapshot in history}
    assert list(expected) == [0, 3, 7]
    keys = set().union(*expected.values())
    assert {"ww/alpha", "ww_alpha/net.0", "ww_alpha/attention.q"} <= keys
    assert {key for key in client.get_run(logger.run_id).data.metrics if key.startswith("ww")} == keys
    for key in keys:
        read = {metric.step: metric.value for metric in client.get_metric_history(logger.run_id, key)}
        assert read == {x: values[key] for x, values in expected.items() if key in values}

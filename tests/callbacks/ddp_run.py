"""Trains on two ranks on the CPU, watched by SpectralMonitor: a run after the other in a folder each.

Run as `python -m tests.callbacks.ddp_run FOLDER`; each rank leaves JSON of what it saw.
"""

import json
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from tests.processes import on_two_ranks
from ww_monitor.callbacks.lightning import SpectralMonitor


class Net(pl.LightningModule):
    def __init__(self, step_seconds: float) -> None:
        super().__init__()
        self.step_seconds = step_seconds
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))
        with torch.no_grad():
            self.net[0].weight[3, 4] = 2.0

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        time.sleep(self.step_seconds)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Counting(CSVLogger):
    """Counts the calls that reach the Trainer's loggers on this rank."""

    calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        super().log_metrics(metrics, step)


def train(folder: Path, what: str) -> None:
    monitor = SpectralMonitor(
        every_n_steps=None if what == "budget" else 2,
        max_overhead=0.9 if what == "budget" else 0.02,
        stop_on="traps" if what in ("stop_on", "sharded") else None,
        console=False,
    )
    callbacks = [monitor]
    if what == "early_stopping":
        callbacks.append(EarlyStopping("ww/num_traps", mode="max", stopping_threshold=0.5))
    logger = Counting(folder)
    trainer = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if what == "sharded" else "ddp",
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = TensorDataset(torch.randn(128, 24), torch.arange(128) % 10)
    trainer.fit(Net(step_seconds=0.05 if what == "budget" else 0.0), DataLoader(data, batch_size=8))
    report = {
        "step": trainer.global_step,
        "alpha": float(trainer.callback_metrics["ww/alpha"]),
        "snapshots": len(monitor.monitor.history),
        "log calls": logger.calls,
        "steps": [snapshot.step for snapshot in monitor.monitor.history],
        "history": [snapshot.to_json() for snapshot in monitor.monitor.history],
        "last step": monitor.monitor.last_step,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(report))


def main(root: Path) -> None:
    for what in ("early_stopping", "stop_on", "sharded", "budget"):
        place = root / what
        place.mkdir(exist_ok=True)
        train(place, what)


if __name__ == "__main__":
    on_two_ranks(lambda: main(Path(sys.argv[1])))

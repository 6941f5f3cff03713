"""What `ww-monitor[lightning]` alone must do; run by CI in an environment with nothing else."""

import sys
import tempfile
from importlib.util import find_spec

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from ww_monitor import History
from ww_monitor.callbacks.lightning import SpectralMonitor

assert not any(find_spec(name) for name in ("transformers", "keras", "wandb", "tensorboard", "matplotlib"))


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


with tempfile.TemporaryDirectory() as folder:
    data = DataLoader(TensorDataset(torch.randn(64, 32), torch.randint(10, (64,))), batch_size=16)
    trainer = pl.Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[SpectralMonitor(every_n_steps=3)],
    )
    trainer.fit(Net(), data)
    steps = [snapshot.step for snapshot in History.read(f"{folder}/ww_history.jsonl")]
assert steps == [0, 3, 6, 8], steps
print("the extra lightning is enough", file=sys.stderr)

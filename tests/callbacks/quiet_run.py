"""One training with the callback and one without, by every trainer that is named: the lines that each has printed.

A `tensorflow` stands on the path that greets whoever imports it, as TensorFlow and oneDNN do, and then is not there.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def lightning() -> Callable[[bool, str], None]:
    import pytorch_lightning as pl

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(60, 40)

        def training_step(self, batch, index):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(watched: bool, folder: str) -> None:
        callbacks = []
        if watched:
            from ww_monitor.callbacks.lightning import SpectralMonitor

            callbacks = [SpectralMonitor(console=False)]
        given = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
        trainer = pl.Trainer(logger=pl.loggers.TensorBoardLogger(folder), callbacks=callbacks, **given)
        trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(9, 60)))

    return train


def huggingface() -> Callable[[bool, str], None]:
    from transformers import Trainer, TrainingArguments

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(60, 40)

        def forward(self, x):
            return {"loss": self.layer(x).square().mean()}

    def train(watched: bool, folder: str) -> None:
        callbacks = []
        if watched:
            from ww_monitor.callbacks.huggingface import SpectralMonitor

            callbacks = [SpectralMonitor(console=False)]
        given = {
            "report_to": ["tensorboard"],
            "max_steps": 3,
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        data = [{"x": torch.randn(60)} for _ in range(9)]
        Trainer(Net(), TrainingArguments(folder, **given), train_dataset=data, callbacks=callbacks).train()

    return train


def keras() -> Callable[[bool, str], None]:
    import keras as k

    def train(watched: bool, folder: str) -> None:
        callbacks = []
        if watched:
            from ww_monitor.callbacks.keras import SpectralMonitor
            from ww_monitor.sinks.tensorboard import TensorBoard

            callbacks = [SpectralMonitor(console=False, folder=folder, sinks=[TensorBoard(folder)])]
        net = k.Sequential([k.Input((60,)), k.layers.Dense(40)])
        net.compile("sgd", "mse")
        net.fit(torch.randn(32, 60).numpy(), torch.randn(32, 40).numpy(), verbose=2, callbacks=callbacks)

    return train


def lines(train: Callable[[bool, str], None], watched: bool) -> list[str]:
    """What a forked process writes to its descriptors 1 and 2 while it trains, numbers taken out."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 1
            try:
                train(watched, folder)
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        output.seek(0)
        text = output.read().decode().replace(folder, "FOLDER")
    return re.sub(r"\d[\d.:,e+-]*", "N", text).splitlines()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        greeting = "import os; os.write(2, b'TensorFlow greets\\n'); raise ImportError('there is no TensorFlow')"
        Path(path, "tensorflow.py").write_text(greeting)
        sys.path.insert(0, path)
        makers, found = {"lightning": lightning, "huggingface": huggingface, "keras": keras}, {}
        for name in sys.argv[1:]:
            made = makers[name]()
            found[name] = {kind: lines(made, kind == "with") for kind in ("without", "with")}
        json.dump(found, sys.stdout)

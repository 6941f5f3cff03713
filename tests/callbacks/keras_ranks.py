"""Trains with Keras on two ranks, watched by SpectralMonitor; each rank leaves what it saw in a file.

Run as `python -m tests.callbacks.keras_ranks FOLDER` with KERAS_BACKEND=torch. Every process sees the same data,
so that the weights stay equal without a wrapper around the model.
"""

import json
import sys
from pathlib import Path

if "tensorflow" not in sys.modules:
    sys.modules["tensorflow"] = None  # nothing here needs it

import keras
import numpy as np
import torch

from tests.processes import on_two_ranks
from ww_monitor.callbacks.keras import SpectralMonitor
from ww_monitor.sinks.memory import Memory


class Logs(keras.callbacks.Callback):
    """The alpha that a later callback is given at the end of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha: list[float] = []

    def on_epoch_end(self, epoch, logs=None):
        self.alpha.append(logs["ww_alpha"])


def make_model() -> keras.Model:
    """Two matrices, a planted trap in the first."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(32, "relu", name="in"), keras.layers.Dense(10, name="out")]
    model = keras.Sequential([keras.Input((24,)), *layers])
    kernel = np.array(model.layers[0].kernel)
    kernel[3, 4] = 2.0
    model.layers[0].kernel.assign(kernel)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(1e-3), loss=loss)
    return model


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    sink, logs = Memory(), Logs()
    monitor = SpectralMonitor(3, folder=folder / f"rank{rank}", stop_on="traps", patience=3, sinks=[sink])
    x = np.random.default_rng(0).normal(size=(64, 24)).astype("float32")
    model = make_model()
    model.fit(x, np.arange(64) % 10, batch_size=8, epochs=3, callbacks=[monitor, logs], verbose=0)
    history = monitor.monitor.history
    report = {
        "steps": [snapshot.step for snapshot in history],
        "alpha": [snapshot.summary["alpha"] for snapshot in history],
        "logs": logs.alpha,
        "stopped at": int(model.optimizer.iterations.numpy()),
        "in the sink": len(sink.history),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    on_two_ranks(lambda: main(Path(sys.argv[1])))

"""What `ww-monitor[keras]` alone must do, on Keras' torch backend; run by CI in an environment with nothing else."""

import os
import sys
import tempfile
from importlib.util import find_spec

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

from ww_monitor import History
from ww_monitor.callbacks.keras import SpectralMonitor

assert not any(find_spec(name) for name in ("pytorch_lightning", "transformers", "tensorflow", "jax", "wandb"))

rng = np.random.default_rng(0)
x, y = rng.normal(size=(64, 32)).astype("float32"), rng.integers(10, size=64)
net = keras.Sequential([keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)])
net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
with tempfile.TemporaryDirectory() as folder:
    monitor = SpectralMonitor(every_n_steps=3, folder=folder)
    net.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[monitor])
    steps = [snapshot.step for snapshot in History.read(f"{folder}/ww_history.jsonl")]
assert steps[-1] == 8, steps
assert len(steps) >= 3, steps
print("the extra keras is enough", file=sys.stderr)

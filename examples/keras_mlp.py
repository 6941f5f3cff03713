"""A Keras MLP learns scikit-learn's digits, watched by SpectralMonitor: `python examples/keras_mlp.py`.

The backend is torch unless KERAS_BACKEND says jax or tensorflow. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported

import keras
from sklearn.datasets import load_digits

from ww_monitor.callbacks.keras import SpectralMonitor
from ww_monitor.sinks.tensorboard import TensorBoard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/keras_mlp"))
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    layers = [keras.layers.Dense(width, activation="relu", name=f"fc{width}") for width in (128, 64)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10, name="head")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss=loss, metrics=["accuracy"])
    model.fit(
        x / 16,
        y,
        epochs=options.epochs,
        validation_split=0.2,
        verbose=2,
        callbacks=[
            SpectralMonitor(  # first, so that the others see its values
                every_n_steps=50,
                stop_on="traps",
                metrics=["alpha", "trap_headroom", "num_traps"],
                folder=options.output,
                sinks=[TensorBoard(options.output)],
            ),
            keras.callbacks.EarlyStopping(monitor="ww_alpha", mode="min", patience=5),
            keras.callbacks.CSVLogger(str(options.output / "log.csv")),
        ],
    )
    print(f"tensorboard --logdir {options.output}")


if __name__ == "__main__":
    main()

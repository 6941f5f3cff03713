"""Two layers of a Keras model that actions step, against the same training by hand in float64."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np

from ww_monitor import History
from ww_monitor.actions import LayerwiseDecay, LayerwiseRate
from ww_monitor.callbacks.keras import SpectralMonitor

RATE, MOMENTUM, DECAY, EVERY, STEPS = 0.05, 0.9, 0.1, 3, 10


def net(optimizer, **compiled):
    """64 → 64 → 64 without biases or activations, the same one each time."""
    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(64, use_bias=False, name=name) for name in "ab"]
    model = keras.Sequential([keras.Input((64,)), *dense])
    model.compile(optimizer, "mse", **compiled)
    return model


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of all steps, eight examples each."""
    x, y = np.random.default_rng(0).normal(size=(2, 8 * STEPS, 64)).astype("float32")
    return x, y


def fit(model, folder: Path, actions, *callbacks, steps=range(STEPS)) -> list[np.ndarray]:
    """The weights after these steps."""
    monitor = SpectralMonitor(every_n_steps=EVERY, console=False, actions=actions, folder=folder)
    x, y = (values[8 * steps.start : 8 * steps.stop] for values in batches())
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[monitor, *callbacks])
    return [np.array(value) for value in model.get_weights()]


def error(folder: Path) -> float:
    """The largest difference of the weights after ten steps from those of a loop by hand with the history's factors."""
    model = net(keras.optimizers.SGD(RATE, MOMENTUM, weight_decay=DECAY))
    weights = {name: np.array(value, dtype="float64") for name, value in zip("ab", model.get_weights(), strict=True)}
    acting = [LayerwiseRate(low=1, high=5, dry_run=False), LayerwiseDecay(dry_run=False)]
    end = fit(model, folder, acting)
    factors = {
        snapshot.step: {row.name: (row.value("rate_factor"), row.value("decay_factor")) for row in snapshot.layers}
        for snapshot in History.read(folder / "ww_history.jsonl")
    }
    assert {1.0, 5.0} == {rate for rate, _ in factors[0].values()}
    moved, (x, y) = dict.fromkeys("ab", 0.0), batches()
    for step in range(STEPS):
        some_x, some_y = (values[8 * step : 8 * step + 8].astype("float64") for values in (x, y))
        hidden = some_x @ weights["a"]
        wrong = 2 * (hidden @ weights["b"] - some_y) / some_y.size
        slopes = {"b": hidden.T @ wrong, "a": some_x.T @ (wrong @ weights["b"].T)}
        for name, (rate, decay) in factors[step // EVERY * EVERY].items():
            moved[name] = MOMENTUM * moved[name] - RATE * slopes[name]
            weights[name] = weights[name] * (1 - rate * RATE * decay * DECAY) + rate * moved[name]
    return max(float(abs(weights[name] - value).max()) for name, value in zip("ab", end, strict=True))


class PartlyBuilt(keras.Model):
    """One layer has its weights from the beginning, one from its first call on."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = keras.layers.Dense(64, name="early"), keras.layers.Dense(64, name="late")
        self.early.build((None, 64))

    def call(self, x):
        return self.late(self.early(x))


class OnTheLate:
    """The same factor on the rate of one layer at all times."""

    option, metric, needs, dry_run = "lr", "rate_factor", (), False

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def factors(self, snapshot):
        return {layer.name: self.factor for layer in snapshot.layers if layer.name == "late"}


def late(folder: Path) -> bool:
    """Whether a factor moves a layer that has its weights only from the first step on."""
    ends = []
    for factor in (1.0, 0.5):
        keras.utils.set_random_seed(0)
        model = PartlyBuilt()
        model.compile(keras.optimizers.SGD(0.01), "mse")
        fit(model, folder / str(factor), [OnTheLate(factor)])
        ends.append(np.array(model.late.kernel))
    return bool((ends[0] != ends[1]).any())

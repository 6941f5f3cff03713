"""Actions in Keras: each step of its optimizer is changed after it was made, or it is said why not."""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ww_monitor import History, SpectralWarning
from ww_monitor.actions import LayerwiseDecay, LayerwiseRate

EVERY = 4
ACTING = [LayerwiseRate(low=1, high=5, dry_run=False), LayerwiseDecay(dry_run=False)]
DRY = [LayerwiseRate(low=1, high=5), LayerwiseDecay()]

pytestmark = [
    # Keras turns torch parameters into arrays with `copy=False`, which torch's `__array__` does not take yet
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


def inputs():
    """96 examples of 64 numbers."""
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).numpy()


@pytest.fixture
def keras():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


def two_layers(keras, optimizer=None, **arguments):
    """64 → 64 → 64, the same one each time, by AdamW unless told."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), *(keras.layers.Dense(64, name=name, **arguments) for name in "ab")])
    model.compile(optimizer or keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    return model


def watching(folder: Path, actions, **options):
    from ww_monitor.callbacks.keras import SpectralMonitor

    return SpectralMonitor(every_n_steps=EVERY, console=False, folder=folder, actions=actions, **options)


def fit(model, *callbacks, steps=range(8)) -> list[str]:
    """Train a compiled model for these steps; what the monitors say."""
    x = inputs()[8 * steps.start : 8 * steps.stop]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, x, batch_size=8, shuffle=False, verbose=0, callbacks=list(callbacks))
    return [str(one.message) for one in caught if issubclass(one.category, SpectralWarning)]


def weights(model) -> list[Any]:
    return [value.tolist() for value in model.get_weights()]


def test_in_keras_a_dry_run_changes_no_bit_and_an_acting_run_does(keras, tmp_path):
    ends = {}
    for name, actions in (("plain", []), ("dry", DRY), ("acting", ACTING)):
        model = two_layers(keras)
        assert fit(model, watching(tmp_path / name, actions)) == []
        ends[name] = weights(model)
        assert float(model.optimizer.learning_rate) == pytest.approx(1e-2)
    assert ends["dry"] == ends["plain"]
    assert ends["acting"][0] != ends["plain"][0]
    factors = [layer.value("rate_factor") for layer in History.read(tmp_path / "dry" / "ww_history.jsonl").last.layers]
    assert sorted(factors) == [1.0, 5.0]


@pytest.mark.parametrize("cut", [4, 5])
def test_a_resumed_keras_run_that_acts_is_the_uninterrupted_one_bit_for_bit(keras, tmp_path, cut):
    whole, first = two_layers(keras), two_layers(keras)
    fit(whole, watching(tmp_path / "whole", ACTING))
    fit(first, monitor := watching(tmp_path / "cut", ACTING), steps=range(cut))
    state = json.loads(json.dumps(monitor.state_dict()))
    first.save(tmp_path / "model.keras")
    resumed, again = keras.saving.load_model(tmp_path / "model.keras"), watching(tmp_path / "cut", ACTING)
    again.load_state_dict(state)
    fit(resumed, again, steps=range(cut, 8))
    assert weights(resumed) == weights(whole)


def test_in_keras_gradients_that_are_accumulated_decay_nothing_between_two_updates(keras, tmp_path):
    """Eight batches of four each are two updates; after the six that are none the weights are those before."""
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(self.model.get_weights()[0].tolist())

    model = two_layers(keras, keras.optimizers.AdamW(1e-2, weight_decay=0.1, gradient_accumulation_steps=4))
    assert fit(model, watching(tmp_path, ACTING), Look()) == []
    assert [one == other for one, other in itertools.pairwise(seen)] == [True, True, False, True, True, True, False]


def own_adam(keras):
    """An optimizer of the user's, of which nothing is known, under a name of Keras'."""
    return type("Adam", (keras.optimizers.Adam,), {"__module__": "users"})(1e-2)


REASONS = {
    "averages": (
        lambda keras: keras.optimizers.AdamW(1e-2, use_ema=True),
        "LayerwiseRate does nothing: .*use_ema=True",
    ),
    "ftrl": (lambda keras: keras.optimizers.Ftrl(1e-2), "LayerwiseRate does nothing: .*got Ftrl"),
    "a rate of its own": (
        lambda keras: keras.optimizers.Adafactor(1e-2),
        "LayerwiseRate does nothing: .*got Adafactor",
    ),
    "a class of the user's": (lambda keras: own_adam(keras), "LayerwiseRate does nothing: .*got Adam$"),
    "a function": (
        lambda keras: keras.optimizers.AdamW(lambda: 1e-2),
        "LayerwiseDecay does nothing: expected a learning_rate that is a number or a schedule, got a function",
    ),
    "no decay": (lambda keras: keras.optimizers.SGD(1e-2), "LayerwiseDecay does nothing: .*got SGD without"),
    "two decays": (lambda keras: keras.optimizers.Muon(1e-2), "LayerwiseDecay does nothing: .*got two in Muon"),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_keras_optimizer_that_cannot_be_stepped_so_gives_one_warning_and_trains_as_ever(keras, tmp_path, case):
    make, message = REASONS[case]
    plain, acting = two_layers(keras, make(keras)), two_layers(keras, make(keras))
    fit(plain)
    (said,) = fit(acting, watching(tmp_path, ACTING[:1] if "Rate" in message else ACTING[1:]))
    assert re.search(message, said)
    assert weights(acting) == weights(plain)


def test_a_rate_that_is_a_function_is_not_asked_beside_the_step(keras, tmp_path):
    """Which may count how often it is."""

    def calls(actions) -> int:
        asked = []

        def rate():
            asked.append(None)
            return 1e-2

        fit(two_layers(keras, keras.optimizers.SGD(rate)), watching(tmp_path / str(len(actions)), actions))
        return len(asked)

    assert calls(ACTING[:1]) == calls([]) > 0


def test_one_monitor_acts_on_a_keras_model_at_a_time(keras, tmp_path):
    alone, both = two_layers(keras), two_layers(keras)
    fit(alone, watching(tmp_path / "alone", ACTING))
    second = watching(tmp_path / "2", ACTING, prefix="2/")
    said = fit(both, watching(tmp_path / "1", ACTING), second)
    assert len(said) == 2  # one an action
    assert all("another monitor acts on this model" in line for line in said)
    assert weights(both) == weights(alone)


def test_a_keras_weight_that_the_step_has_left_alone_does_not_decay(keras, tmp_path):
    """A layer whose output is not used has no gradient, and Keras decays only what has one."""
    used, unused = keras.layers.Dense(64), keras.layers.Dense(64)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = used, unused

        def call(self, x):
            self.unused(x)
            return self.used(x)

    keras.utils.set_random_seed(0)
    model = Model()
    model(inputs()[:8])
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    before = [layer.kernel.numpy().copy() for layer in (used, unused)]
    fit(model, watching(tmp_path, ACTING))
    stayed = [bool((layer.kernel.numpy() == old).all()) for layer, old in zip((used, unused), before, strict=True)]
    assert stayed == [False, True]


def test_a_keras_weight_with_a_constraint_keeps_the_base_and_that_is_said(keras, tmp_path):
    limit = keras.constraints.UnitNorm()
    plain, acting = (two_layers(keras, keras.optimizers.SGD(0.1), kernel_constraint=limit) for _ in range(2))
    fit(plain)
    (said,) = fit(acting, watching(tmp_path, ACTING[:1]))
    assert "2 layers keep the base, such as 'a': they have LoRA or a constraint" in said
    assert weights(acting) == weights(plain)


def test_a_keras_layer_with_lora_keeps_the_base_and_a_frozen_one_is_not_spoken_of(keras, tmp_path):
    model = two_layers(keras)
    model.layers[0].enable_lora(4)
    model.layers[1].trainable = False
    model.compile(keras.optimizers.SGD(0.1), "mse")
    (said,) = fit(model, watching(tmp_path, ACTING[:1]))
    assert "1 layers keep the base, such as 'a': they have LoRA or a constraint" in said


def test_a_rate_that_a_callback_behind_the_monitor_sets_is_that_of_the_decay(keras, tmp_path):
    """A warm-up from a tenth: what is decayed differs by the rate of the step before otherwise."""

    class WarmUp(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.optimizer.learning_rate = 1e-2 * (batch + 1)

    before, behind = (two_layers(keras, keras.optimizers.AdamW(1e-3, weight_decay=1.0)) for _ in range(2))
    fit(before, WarmUp(), watching(tmp_path / "1", ACTING[1:]))
    fit(behind, watching(tmp_path / "2", ACTING[1:]), WarmUp())
    assert weights(before) == weights(behind)


def test_what_another_callback_does_to_weights_is_no_part_of_a_step(keras, tmp_path):
    """One before the monitor clips them after each step: what is left is within its limits."""

    class Clip(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for layer in self.model.layers:
                layer.kernel.assign(keras.ops.clip(layer.kernel, -0.05, 0.05))

    model = two_layers(keras, keras.optimizers.SGD(1.0))
    fit(model, Clip(), watching(tmp_path, ACTING[:1]))
    assert max(abs(layer.kernel.numpy()).max() for layer in model.layers) <= 0.05


def test_a_keras_model_with_two_optimizers_trains_as_ever_and_that_is_said(keras, tmp_path):
    plain, acting = (two_layers(keras, keras.optimizers.SGD(0.1)) for _ in range(2))
    plain.other, acting.other = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)
    fit(plain)
    (said,) = fit(acting, watching(tmp_path, ACTING[:1]))
    assert "LayerwiseRate does nothing: expected one optimizer, got 2" in said
    assert weights(acting) == weights(plain)


def test_a_keras_optimizer_under_two_names_is_one_and_one_that_makes_no_step_is_told(keras, tmp_path):
    model = two_layers(keras, keras.optimizers.SGD(0.1))
    model.same = model.optimizer
    assert fit(model, watching(tmp_path / "alias", ACTING[:1])) == []

    class Own(keras.Sequential):
        def train_step(self, batch):
            return {"loss": 0.0}

    keras.utils.set_random_seed(0)
    idle = Own([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(64)])
    idle.compile(keras.optimizers.SGD(0.1), "mse")
    (said,) = fit(idle, watching(tmp_path / "idle", ACTING[:1]))
    assert "actions have changed no step" in said

"""Actions in Keras: each step of its optimizer is changed after it was made, or it is said why not."""

from __future__ import annotations

import itertools
import json
import os
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


def fit(
    keras, folder: Path, actions, *, optimizer=None, steps: int = 8, begin: int = 0, resumed=None, **compiled
) -> Any:
    """Weights after these steps of a Keras model, the monitor, and the model."""
    from ww_monitor.callbacks.keras import SpectralMonitor

    if resumed is None:
        keras.utils.set_random_seed(0)
        dense = [keras.layers.Dense(64, "tanh", name=name, **compiled) for name in "ab"]
        model = keras.Sequential([keras.Input((64,)), *dense, keras.layers.Dense(10, name="head")])
        model.compile(optimizer or keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    else:
        model = resumed
    monitor = SpectralMonitor(every_n_steps=EVERY, console=False, folder=folder, actions=actions)
    if resumed is not None:
        monitor.load_state_dict(json.loads((folder / "state.json").read_text()))
    x = inputs()[8 * begin : 8 * steps]
    model.fit(x, x[:, :10], batch_size=8, shuffle=False, verbose=0, callbacks=[monitor])
    return [weight.tolist() for weight in model.get_weights()], monitor, model


def test_in_keras_a_dry_run_changes_no_bit_and_an_acting_run_does(keras, tmp_path):
    plain, *_ = fit(keras, tmp_path / "plain", [])
    assert fit(keras, tmp_path / "dry", DRY)[0] == plain
    factors = [layer.value("rate_factor") for layer in History.read(tmp_path / "dry" / "ww_history.jsonl").last.layers]
    assert sorted(factors[:2]) == [1.0, 5.0]
    acting, _, model = fit(keras, tmp_path / "acting", ACTING)
    assert acting[0] != plain[0]
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-2)


@pytest.mark.parametrize("cut", [4, 5])
def test_a_resumed_keras_run_that_acts_is_the_uninterrupted_one_bit_for_bit(keras, tmp_path, cut):
    whole, *_ = fit(keras, tmp_path / "whole", ACTING)
    _, monitor, model = fit(keras, tmp_path / "cut", ACTING, steps=cut)
    (tmp_path / "cut" / "state.json").write_text(json.dumps(monitor.state_dict()))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert fit(keras, tmp_path / "cut", ACTING, begin=cut, resumed=loaded)[0] == whole


def test_in_keras_gradients_that_are_accumulated_decay_nothing_between_two_updates(keras, tmp_path):
    """Eight batches of four each are two updates; after the six that are none the weights are those before."""
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(self.model.get_weights()[0].tolist())

    from ww_monitor.callbacks.keras import SpectralMonitor

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(64)])
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1, gradient_accumulation_steps=4), "mse")
    monitor = SpectralMonitor(every_n_steps=1, console=False, folder=tmp_path, actions=ACTING)
    x = inputs()[:64]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, x, batch_size=8, shuffle=False, verbose=0, callbacks=[monitor, Look()])
    assert not [one for one in caught if issubclass(one.category, SpectralWarning)]
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
    acting = ACTING[:1] if "Rate" in message else ACTING[1:]
    with pytest.warns(SpectralWarning, match=message) as caught:
        weights, *_ = fit(keras, tmp_path / "acting", acting, optimizer=make(keras))
    assert weights == fit(keras, tmp_path / "plain", [], optimizer=make(keras))[0]
    assert len([one for one in caught if issubclass(one.category, SpectralWarning)]) == 1


def test_one_monitor_acts_on_a_keras_model_at_a_time(keras, tmp_path):
    from ww_monitor.callbacks.keras import SpectralMonitor

    second = SpectralMonitor(every_n_steps=EVERY, console=False, folder=tmp_path / "2", actions=ACTING, prefix="2/")
    alone, *_ = fit(keras, tmp_path / "alone", ACTING)

    def both():
        keras.utils.set_random_seed(0)
        dense = [keras.layers.Dense(64, "tanh", name=name) for name in "ab"]
        model = keras.Sequential([keras.Input((64,)), *dense, keras.layers.Dense(10, name="head")])
        model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
        first = SpectralMonitor(every_n_steps=EVERY, console=False, folder=tmp_path / "1", actions=ACTING)
        x = inputs()[:64]
        model.fit(x, x[:, :10], batch_size=8, shuffle=False, verbose=0, callbacks=[first, second])
        return [weight.tolist() for weight in model.get_weights()]

    with pytest.warns(SpectralWarning, match="another monitor acts on this model"):
        assert both() == alone


def test_a_keras_layer_that_is_frozen_or_has_no_weights_yet_is_no_trouble(keras, tmp_path):
    from ww_monitor.callbacks.keras import SpectralMonitor

    keras.utils.set_random_seed(0)
    frozen = keras.layers.Dense(64, trainable=False)
    model = keras.Sequential([keras.layers.Dense(64), frozen, keras.layers.Dense(64)])
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    monitor = SpectralMonitor(every_n_steps=1, console=False, folder=tmp_path, actions=ACTING, strict=True)
    x = inputs()
    model.fit(x, x, batch_size=32, verbose=0, callbacks=[monitor])
    assert monitor.monitor.acting._steppers == []
    assert {len(one.layers) for one in monitor.monitor.history} == {3}


def lines_of(keras, folder: Path, model, *callbacks, actions=ACTING, before=(), steps=6, every=2) -> list[str]:
    """What a short run of a compiled model says."""
    from ww_monitor.callbacks.keras import SpectralMonitor

    monitor = SpectralMonitor(every_n_steps=every, console=False, folder=folder, actions=actions)
    x = inputs()[: 8 * steps]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, x, batch_size=8, shuffle=False, verbose=0, callbacks=[*before, monitor, *callbacks])
    return [str(one.message) for one in caught if issubclass(one.category, SpectralWarning)]


def two_layers(keras, optimizer, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), *(keras.layers.Dense(64, name=name, **arguments) for name in "ab")])
    model.compile(optimizer, "mse")
    return model


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras', of a layer without gradients
        lines_of(keras, tmp_path, model)
    assert [bool((layer.kernel.numpy() == old).all()) for layer, old in zip((used, unused), before, strict=True)] == [
        False,
        True,
    ]


def test_a_keras_weight_with_a_constraint_keeps_the_base_and_that_is_said(keras, tmp_path):
    def weights(actions):
        limit = keras.constraints.UnitNorm()
        model = two_layers(keras, keras.optimizers.SGD(0.1), kernel_constraint=limit)
        said = lines_of(keras, tmp_path / str(len(actions)), model, actions=actions)
        return [value.tolist() for value in model.get_weights()], said

    acting, said = weights(ACTING[:1])
    assert acting == weights([])[0]
    assert [
        line for line in said if "2 layers keep the base, such as 'a': they have LoRA or a constraint" in line
    ] == said
    assert len(said) == 1


def test_a_keras_layer_with_lora_keeps_the_base_and_a_frozen_one_is_not_spoken_of(keras, tmp_path):
    model = two_layers(keras, keras.optimizers.SGD(0.1))
    model.layers[0].enable_lora(4)
    model.layers[1].trainable = False
    model.compile(keras.optimizers.SGD(0.1), "mse")
    (said,) = lines_of(keras, tmp_path, model, actions=ACTING[:1])
    assert "1 layers keep the base, such as 'a': they have LoRA or a constraint" in said


def test_a_rate_that_a_callback_behind_the_monitor_sets_is_that_of_the_decay(keras, tmp_path):
    """A warm-up from a tenth: what is decayed differs by the rate of the step before otherwise."""

    class WarmUp(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.optimizer.learning_rate = 1e-2 * (batch + 1)

    def weights(place):
        model = two_layers(keras, keras.optimizers.AdamW(1e-3, weight_decay=1.0))
        chosen = {"before": {"before": [WarmUp()]}, "behind": {}}[place]
        lines_of(keras, tmp_path / place, model, *([] if chosen else [WarmUp()]), actions=ACTING[1:], **chosen)
        return [value.tolist() for value in model.get_weights()]

    assert weights("before") == weights("behind")


def test_what_another_callback_does_to_weights_is_no_part_of_a_step(keras, tmp_path):
    """One before the monitor clips them after each step: what is left is within its limits."""

    class Clip(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for layer in self.model.layers:
                layer.kernel.assign(keras.ops.clip(layer.kernel, -0.05, 0.05))

    model = two_layers(keras, keras.optimizers.SGD(1.0))
    lines_of(keras, tmp_path, model, actions=ACTING[:1], before=[Clip()])
    assert max(abs(layer.kernel.numpy()).max() for layer in model.layers) <= 0.05


def test_a_keras_model_with_two_optimizers_trains_as_ever_and_that_is_said(keras, tmp_path):
    def weights(actions):
        model = two_layers(keras, keras.optimizers.SGD(0.1))
        model.other = keras.optimizers.SGD(0.1)
        said = lines_of(keras, tmp_path / str(len(actions)), model, actions=actions)
        return [value.tolist() for value in model.get_weights()], said

    acting, said = weights(ACTING[:1])
    assert acting == weights([])[0]
    assert ["LayerwiseRate does nothing: expected one optimizer, got 2" in line for line in said] == [True]


def test_a_keras_optimizer_under_two_names_is_one_and_one_that_makes_no_step_is_told(keras, tmp_path):
    model = two_layers(keras, keras.optimizers.SGD(0.1))
    model.same = model.optimizer
    assert lines_of(keras, tmp_path / "alias", model, actions=ACTING[:1]) == []

    class Own(keras.Sequential):
        def train_step(self, batch):
            return {"loss": 0.0}

    keras.utils.set_random_seed(0)
    idle = Own([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(64)])
    idle.compile(keras.optimizers.SGD(0.1), "mse")
    (said,) = lines_of(keras, tmp_path / "idle", idle, actions=ACTING[:1])
    assert "actions have changed no step" in said

"""Actions in the trainers: dry runs change nothing, runs that act resume bit for bit, and logs have the base rate."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ww_monitor import History, SpectralWarning
from ww_monitor.actions import LayerwiseDecay, LayerwiseRate, param_groups

EVERY = 4
ACTING = [LayerwiseRate(low=1, high=5, dry_run=False), LayerwiseDecay(dry_run=False)]
DRY = [LayerwiseRate(low=1, high=5), LayerwiseDecay()]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
    # Keras turns torch parameters into arrays with `copy=False`, which torch's `__array__` does not take yet
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def data() -> TensorDataset:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.arange(96) % 10)


def make_optimizer(model: nn.Module, grouped: bool) -> torch.optim.Optimizer:
    groups = param_groups(model) if grouped else model.parameters()
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def decaying(optimizer: torch.optim.Optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def lightning(folder: Path, actions, *, steps: int = 11, resume: Path | None = None, grouped: bool = True) -> Any:
    """Weights, base rates as a callback sees them, and a checkpoint after the last step."""
    pl = pytest.importorskip("pytorch_lightning")
    from ww_monitor.callbacks.lightning import SpectralMonitor

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, index):
            seen.append(self.optimizers().param_groups[0]["lr"])  # inside the closure of the optimizer
            rows = slice(8 * self.global_step, 8 * self.global_step + 8)  # Lightning resumes with another batch
            return nn.functional.cross_entropy(self.net(data().tensors[0][rows]), data().tensors[1][rows])

        def configure_optimizers(self):
            optimizer = make_optimizer(self, grouped)
            return [optimizer], [{"scheduler": decaying(optimizer), "interval": "step"}]

    seen: list[float] = []
    monitor = SpectralMonitor(every_n_steps=EVERY, console=False, actions=actions)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[monitor],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(data(), batch_size=8), ckpt_path=resume)
    checkpoint = folder / f"{steps}.ckpt"
    trainer.save_checkpoint(checkpoint)
    return flat(module), seen, checkpoint


def trainer(folder: Path, actions, *, steps: int = 11, resume: Path | None = None, grouped: bool = True) -> Any:
    """The same with the Trainer."""
    library = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ww_monitor.callbacks.huggingface import SpectralMonitor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x, labels):
            seen.append(optimizer.param_groups[0]["lr"])
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

    seen: list[float] = []
    model = Model()
    optimizer = make_optimizer(model, grouped)
    args = library.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, save_strategy="steps", save_steps=steps,
        logging_strategy="steps", logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, max_grad_norm=0,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in data()]
    monitor = SpectralMonitor(every_n_steps=EVERY, console=False, actions=actions)
    done = library.Trainer(
        model, args, train_dataset=rows, callbacks=[monitor], optimizers=(optimizer, decaying(optimizer))
    )
    done.remove_callback(library.PrinterCallback)
    done.train(resume_from_checkpoint=None if resume is None else str(resume))
    logged = [one["learning_rate"] for one in done.state.log_history if "learning_rate" in one]
    assert logged[-len(seen) :] == pytest.approx(seen)
    assert sum(map(len, (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks))) == 0
    return flat(model), seen, folder / f"checkpoint-{steps}"


def flat(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.fixture(params=[lightning, trainer])
def train(request):
    return request.param


def test_a_dry_run_changes_no_bit_and_its_factors_are_in_the_history(train, tmp_path):
    dry, *_ = train(tmp_path / "dry", DRY)
    plain, *_ = train(tmp_path / "plain", [])
    assert dry == plain
    history = History.read(next((tmp_path / "dry").rglob("ww_history.jsonl")))
    rates = [layer.value("rate_factor") for layer in history.snapshots[0].layers]
    assert (sorted(rates[:2]), rates[2] == rates[2]) == ([1.0, 5.0], False)  # ten outputs: too few eigenvalues
    assert history.last.summary["decay_factor"] == pytest.approx((2 / 3 + 3) / 2)


def test_a_run_that_acts_differs_and_shows_the_rates_of_its_scheduler(train, tmp_path):
    acting, seen, _ = train(tmp_path / "acting", ACTING)
    plain, base, _ = train(tmp_path / "plain", [])
    assert acting != plain
    assert seen == base == pytest.approx([1e-2 * 0.9**step for step in range(11)])


@pytest.mark.parametrize("cut", [5, 8])
def test_a_resumed_run_that_acts_is_the_uninterrupted_one_bit_for_bit(train, tmp_path, cut):
    whole, *_ = train(tmp_path / "whole", ACTING)
    *_, checkpoint = train(tmp_path / "cut", ACTING, steps=cut)
    resumed, *_ = train(tmp_path / "cut", ACTING, resume=checkpoint)
    assert resumed == whole


def test_an_optimizer_without_groups_gives_one_warning_and_trains_as_ever(train, tmp_path):
    with pytest.warns(SpectralWarning, match="LayerwiseRate does nothing: .*make its groups with") as caught:
        acting, *_ = train(tmp_path / "acting", ACTING[:1], grouped=False)
    plain, *_ = train(tmp_path / "plain", [], grouped=False)
    assert acting == plain
    assert len([one for one in caught if issubclass(one.category, SpectralWarning)]) == 1


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
    x = data().tensors[0].numpy()[8 * begin : 8 * steps]
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
    x = data().tensors[0].numpy()[:64]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, x, batch_size=8, shuffle=False, verbose=0, callbacks=[monitor, Look()])
    assert not [one for one in caught if issubclass(one.category, SpectralWarning)]
    assert [one == other for one, other in itertools.pairwise(seen)] == [True, True, False, True, True, True, False]


REASONS = {
    "averages": (
        lambda keras: keras.optimizers.AdamW(1e-2, use_ema=True),
        "LayerwiseRate does nothing: .*use_ema=True",
    ),
    "ftrl": (lambda keras: keras.optimizers.Ftrl(1e-2), "LayerwiseRate does nothing: .*got Ftrl"),
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


def test_a_constraint_on_a_keras_weight_holds_after_a_step_that_was_changed(keras, tmp_path):
    limit = keras.constraints.MaxNorm(0.5, axis=None)
    weights, *_ = fit(keras, tmp_path, ACTING, optimizer=keras.optimizers.AdamW(0.3), kernel_constraint=limit)
    assert all(torch.tensor(weight).norm() <= 0.5 + 1e-5 for weight in (weights[0], weights[2]))


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
        x = data().tensors[0].numpy()[:64]
        model.fit(x, x[:, :10], batch_size=8, shuffle=False, verbose=0, callbacks=[first, second])
        return [weight.tolist() for weight in model.get_weights()]

    with pytest.warns(SpectralWarning, match="another monitor acts on this model"):
        assert both() == alone


def test_a_checkpoint_of_steps_that_stands_before_is_told_to_stand_behind(keras, tmp_path):
    from ww_monitor.callbacks.keras import SpectralMonitor

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "{batch}.keras", save_freq=2)
    x = data().tensors[0].numpy()[:16]
    for actions, said in ((DRY, 0), (ACTING, 1)):
        monitor = SpectralMonitor(every_n_steps=EVERY, console=False, folder=tmp_path, actions=actions)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, x, batch_size=8, verbose=0, callbacks=[saving, monitor])
        assert sum("saves steps before actions change them" in str(one.message) for one in caught) == said


def test_a_keras_layer_that_is_frozen_or_has_no_weights_yet_is_no_trouble(keras, tmp_path):
    from ww_monitor.callbacks.keras import SpectralMonitor

    keras.utils.set_random_seed(0)
    frozen = keras.layers.Dense(64, trainable=False)
    model = keras.Sequential([keras.layers.Dense(64), frozen, keras.layers.Dense(64)])
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    monitor = SpectralMonitor(every_n_steps=1, console=False, folder=tmp_path, actions=ACTING, strict=True)
    x = data().tensors[0].numpy()
    model.fit(x, x, batch_size=32, verbose=0, callbacks=[monitor])
    assert monitor.monitor.acting._steppers == []
    assert {len(one.layers) for one in monitor.monitor.history} == {3}

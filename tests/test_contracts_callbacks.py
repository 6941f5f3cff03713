"""What every callback keeps to, in the real trainer of its framework: one suite for all of them.

A new callback needs a class here with `train`, which trains a small net from given weights, and a row in `FRAMEWORKS`.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import pickle
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn

from tests.histories import steps_of
from tests.registries import before_measurement, before_summary
from ww_monitor import History, SpectralWarning
from ww_monitor.callbacks._adapter import Adapter
from ww_monitor.sinks.memory import Memory

EPOCH = 4
"""Optimizer steps an epoch."""

BATCH = 8
SIZES = (24, 32, 32, 10)

EachStep = Callable[[int, Sequence[torch.Tensor]], None]
"""Called by a callback of the framework's own, before the monitor, with completed steps and weights `[out, in]`."""


@dataclass
class Run:
    """What a run leaves: steps done, weights `[out, in]`, a checkpoint, and the step of the best one."""

    steps: int
    matrices: list[torch.Tensor]
    checkpoint: Path | None = None
    best: int | None = None


def nothing(step: int, matrices: Sequence[torch.Tensor]) -> None:
    """What happens after a step, unless a test says otherwise."""


def make_weights(*, trap: bool = False) -> list[torch.Tensor]:
    """Three matrices `[out, in]`; with `trap` an entry of the second far above the size that makes an outlier."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(m, n, generator=generator) / n**0.5 for n, m in pairwise(SIZES)]
    if trap:
        weights[1][3, 4] = 2.5
    return weights


def make_net(weights: Sequence[torch.Tensor]) -> nn.Sequential:
    torch.manual_seed(5)
    (fan, one, two, out), drop = SIZES, nn.Dropout(0.3)
    net = nn.Sequential(nn.Linear(fan, one), nn.ReLU(), drop, nn.Linear(one, two), nn.ReLU(), drop, nn.Linear(two, out))
    with torch.no_grad():
        for parameter, values in zip(matrices_of(net), weights, strict=True):
            parameter.copy_(values)
    return net


def matrices_of(net: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in net.modules() if isinstance(module, nn.Linear)]


def make_data(accumulate: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = EPOCH * BATCH * accumulate
    return torch.randn(size, SIZES[0], generator=torch.Generator().manual_seed(0)), torch.arange(size) % SIZES[-1]


def copies(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [matrix.detach().clone() for matrix in matrices]


class Lightning:
    """`early` is the framework's own early stopping on alpha, `best` its best checkpoint by alpha; every 4 steps."""

    def __init__(self) -> None:
        self.pl = pytest.importorskip("pytorch_lightning", reason="Lightning, the framework, is not installed")
        from ww_monitor.callbacks.lightning import SpectralMonitor

        self.SpectralMonitor = SpectralMonitor

    def spectral_monitor(self, folder: Path, **arguments: Any) -> Any:
        return self.SpectralMonitor(**arguments)

    def train(
        self,
        folder: Path,
        *monitors: Any,
        steps: int = 8,
        accumulate: int = 1,
        lr: float = 1e-2,
        weights: Sequence[torch.Tensor] | None = None,
        each_step: EachStep = nothing,
        early: bool = False,
        best: bool = False,
        save: bool = False,
        resume: Path | None = None,
    ) -> Run:
        from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
        from torch.utils.data import DataLoader, TensorDataset

        net = make_net(make_weights() if weights is None else weights)

        class Module(self.pl.LightningModule):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def training_step(self, batch, batch_idx):
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=lr)

        class Each(self.pl.Callback):  # type: ignore[name-defined,misc]
            seen = 0

            def on_train_batch_end(self, trainer, pl_module, *arguments):
                if trainer.global_step > self.seen:
                    self.seen = trainer.global_step
                    each_step(self.seen, matrices_of(net))

        callbacks = [Each(), *monitors]
        if early:
            callbacks.append(EarlyStopping("ww/alpha", mode="min", patience=1, check_on_train_epoch_end=True))
        if best:
            callbacks.append(ModelCheckpoint(folder / "best", monitor="ww/alpha", mode="min"))
        trainer = self.pl.Trainer(
            max_epochs=steps // EPOCH,
            accumulate_grad_batches=accumulate,
            callbacks=callbacks,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=best,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            default_root_dir=folder,
        )
        trainer.fit(Module(), DataLoader(TensorDataset(*make_data(accumulate)), batch_size=BATCH), ckpt_path=resume)
        checkpoint, chosen = folder / f"{trainer.global_step}.ckpt", None
        if save:
            trainer.save_checkpoint(checkpoint)
        if best:
            path = trainer.checkpoint_callback.best_model_path
            chosen = torch.load(path, weights_only=True)["global_step"]
        return Run(trainer.global_step, copies(matrices_of(net)), checkpoint, chosen)


class HuggingFace:
    def __init__(self) -> None:
        self.transformers = pytest.importorskip("transformers", reason="transformers, the framework, is not installed")
        pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
        from ww_monitor.callbacks.huggingface import SpectralMonitor

        self.SpectralMonitor = SpectralMonitor

    def spectral_monitor(self, folder: Path, **arguments: Any) -> Any:
        return self.SpectralMonitor(**arguments)

    def train(
        self,
        folder: Path,
        *monitors: Any,
        steps: int = 8,
        accumulate: int = 1,
        lr: float = 1e-2,
        weights: Sequence[torch.Tensor] | None = None,
        each_step: EachStep = nothing,
        early: bool = False,
        best: bool = False,
        save: bool = False,
        resume: Path | None = None,
    ) -> Run:
        library = self.transformers

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = make_net(make_weights() if weights is None else weights)

            def forward(self, x, labels):
                logits = self.net(x)
                return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

        class Each(library.TrainerCallback):  # type: ignore[name-defined,misc]
            def on_step_end(self, args, state, control, model=None, **kwargs):
                each_step(state.global_step, matrices_of(model))

        model = Model()
        data = [{"x": x, "labels": y} for x, y in zip(*make_data(accumulate), strict=True)]
        watching = {"metric_for_best_model": "ww_alpha", "greater_is_better": False}
        args = library.TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulate,
            learning_rate=lr,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0,
            eval_strategy="steps" if early or best else "no",
            eval_steps=EPOCH,
            save_strategy="steps" if save or best else "no",
            save_steps=EPOCH,
            load_best_model_at_end=best,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **(watching if early or best else {}),
        )
        callbacks = [Each(), *monitors]
        if early:
            callbacks.append(library.EarlyStoppingCallback(1))
        trainer = library.Trainer(model, args, train_dataset=data, eval_dataset=data[:BATCH], callbacks=callbacks)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        state = trainer.state
        checkpoint = folder / f"checkpoint-{state.global_step}"
        chosen = int(state.best_model_checkpoint.split("-")[-1]) if best else None
        return Run(state.global_step, copies(matrices_of(model)), checkpoint, chosen)


class Keras:
    """On its torch backend; `tests/callbacks/test_keras.py` has the others."""

    def __init__(self) -> None:
        os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported
        self.keras = pytest.importorskip("keras", reason="keras, the framework, is not installed")
        if self.keras.backend.backend() != "torch":
            pytest.skip("keras has been imported with another backend than torch")
        from ww_monitor.callbacks.keras import SpectralMonitor

        self.SpectralMonitor = SpectralMonitor

    def spectral_monitor(self, folder: Path, **arguments: Any) -> Any:
        return self.SpectralMonitor(folder=folder, **arguments)

    def make_model(self, weights: Sequence[torch.Tensor], lr: float, accumulate: int) -> Any:
        keras, (fan, *widths) = self.keras, SIZES
        layers = [keras.Input((fan,))]
        for place, width in enumerate(widths):
            layers.append(keras.layers.Dense(width, None if width == widths[-1] else "relu", name=f"dense{place}"))
            layers.append(keras.layers.Dropout(0.3))
        model = keras.Sequential(layers[:-1])
        for parameter, values in zip(self.matrices(model), weights, strict=True):
            parameter.copy_(values)
        optimizer = keras.optimizers.SGD(lr, gradient_accumulation_steps=accumulate if accumulate > 1 else None)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    def matrices(self, model: Any) -> list[torch.Tensor]:
        return [layer.kernel.value.data.T for layer in model.layers if isinstance(layer, self.keras.layers.Dense)]

    def train(
        self,
        folder: Path,
        *monitors: Any,
        steps: int = 8,
        accumulate: int = 1,
        lr: float = 1e-2,
        weights: Sequence[torch.Tensor] | None = None,
        each_step: EachStep = nothing,
        early: bool = False,
        best: bool = False,
        save: bool = False,
        resume: Path | None = None,
    ) -> Run:
        from ww_monitor.callbacks.keras import completed_updates

        keras, matrices = self.keras, self.matrices
        keras.utils.set_random_seed(5)
        model = self.make_model(make_weights() if weights is None else weights, lr, accumulate)
        if resume is not None:
            model = keras.saving.load_model(resume)
            for monitor, state in zip(monitors, json.loads(resume.with_suffix(".json").read_text()), strict=True):
                monitor.load_state_dict(state)

        class Each(keras.callbacks.Callback):  # type: ignore[name-defined,misc]
            seen = completed_updates(model)

            def on_train_batch_end(self, batch, logs=None):
                if (step := completed_updates(self.model)) > self.seen:
                    self.seen = step
                    each_step(step, matrices(self.model))

        callbacks = [Each(), *monitors]
        if early:
            callbacks.append(keras.callbacks.EarlyStopping("ww_alpha", mode="min", patience=1))
        if best:
            path = str(folder / "{epoch}.best.keras")
            callbacks.append(keras.callbacks.ModelCheckpoint(path, "ww_alpha", mode="min", save_best_only=True))
        x, y = (part.numpy() for part in make_data(accumulate))
        epochs = {"initial_epoch": completed_updates(model) // EPOCH, "epochs": steps // EPOCH}
        model.fit(x, y, batch_size=BATCH, callbacks=callbacks, verbose=0, shuffle=False, **epochs)
        done = completed_updates(model)
        checkpoint = folder / f"{done}.keras"
        if save:
            model.save(checkpoint)
            checkpoint.with_suffix(".json").write_text(json.dumps([monitor.state_dict() for monitor in monitors]))
        chosen = max((int(path.name.split(".")[0]) * EPOCH for path in folder.glob("*.best.keras")), default=None)
        return Run(done, copies(matrices(model)), checkpoint, chosen)


FRAMEWORKS = {"lightning": Lightning, "huggingface": HuggingFace, "keras": Keras}

pytestmark = [
    # Keras turns torch parameters into arrays with `copy=False`, which torch's `__array__` does not take yet
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
]


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return FRAMEWORKS[request.param]()


@pytest.fixture(autouse=True)
def nothing_left_running():
    """No test of this suite may leave a thread of ours behind."""
    yield
    if our_threads():
        gc.collect()  # a callback of a run that died closes with the last that holds it
        wait_until(lambda: not our_threads())
    assert our_threads() == []


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ww_monitor")]


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)


def make(framework, folder: Path, every_n_steps: int | None = 2, **arguments) -> Any:
    """A monitor of `framework`, quiet on the console."""
    return framework.spectral_monitor(folder, every_n_steps=every_n_steps, **{"console": False, **arguments})


def seen_by(monitor) -> list[int | None]:
    return steps_of(monitor.monitor.history)


def files_in(folder: Path) -> dict[str, list[int | None]]:
    """Name of each history file → its steps."""
    return {path.name: steps_of(History.read(path)) for path in sorted(folder.rglob("ww_history*.jsonl"))}


def rows_of(snapshot) -> list[dict[str, Any]]:
    """The numbers of every layer."""
    return [{"status": layer.status, **layer.metrics} for layer in snapshot.layers]


def settled(snapshot) -> list[dict[str, Any]]:
    """The same without what depends on the snapshot before, of which the background may have fewer."""
    return [{key: value for key, value in row.items() if key != "spectral_drift"} for row in rows_of(snapshot)]


def same(one: Any, other: Any, relative: float = 0.0) -> bool:
    """Equality of plain data, floats to `relative`; NaN equals NaN."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], relative) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b, relative) for a, b in zip(one, other, strict=True))
    if isinstance(one, float):
        return bool(np.isclose(one, other, rtol=relative, atol=0.0, equal_nan=True))
    return bool(one == other)


def spectral_warnings(caught) -> list[str]:
    return [str(warning.message) for warning in caught if issubclass(warning.category, SpectralWarning)]


def at(step: int, do: Callable[[Sequence[torch.Tensor]], object]) -> EachStep:
    """Do something after step number `step`."""

    def each_step(now: int, matrices: Sequence[torch.Tensor]) -> None:
        if now == step:
            do(matrices)

    return each_step


def break_middle(matrices: Sequence[torch.Tensor]) -> None:
    matrices[1].detach()[0, 0] = float("nan")


def interrupt(matrices: Sequence[torch.Tensor]) -> None:
    raise KeyboardInterrupt


# --- when it looks


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_schedule_counts_optimizer_steps(framework, tmp_path, accumulate):
    monitor = make(framework, tmp_path, 3)
    run = framework.train(tmp_path, monitor, accumulate=accumulate)
    assert run.steps == 8
    assert files_in(tmp_path) == {"ww_history.jsonl": [0, 3, 6, 8]}


def test_the_first_snapshot_is_of_the_first_weights_and_the_last_of_the_last(framework, tmp_path):
    monitor, weights = make(framework, tmp_path, 5), make_weights()
    run = framework.train(tmp_path, monitor, weights=weights)
    history = monitor.monitor.history
    for snapshot, matrices in ((history[0], weights), (history.last, run.matrices)):
        norms = [matrix.double().square().sum().log10().item() for matrix in matrices]
        assert [layer.value("log_norm") for layer in snapshot.layers] == pytest.approx(norms, rel=1e-9)


def test_the_default_cadence_sees_both_ends_and_says_what_it_costs(framework, tmp_path, capsys):
    monitor = framework.spectral_monitor(tmp_path)
    framework.train(tmp_path, monitor)
    steps = seen_by(monitor)
    assert (steps[0], steps[-1]) == (0, 8)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "watching" in line]
    assert "watching 3 matrices" in line
    assert "an analysis takes" in line
    assert "as often as 2 % of the run's time allows" in line


# --- what it leaves alone

MODES = {
    "sync": {},
    "async": {"mode": "async"},
    "budget": {"every_n_steps": None},
    "everything": {"every_n_steps": 3, "metrics": "all", "track_delta": True},
}


def global_state() -> dict[str, Any]:
    """What a run shares with the rest of the process."""
    loggers = {
        name: (one.level, one.disabled, one.propagate, list(one.handlers), list(one.filters))
        for name, one in {**logging.root.manager.loggerDict, "": logging.root}.items()
        if isinstance(one, logging.Logger) and not name.startswith("ww_monitor")
    }
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_default_dtype(),
        ),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "loggers": loggers,
        "numpy errors": np.geterr(),
        "streams": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def seeded(framework, folder: Path, *monitors) -> tuple[Run, dict[str, Any]]:
    """A run from equal random streams, and the state of the process after it."""
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    return framework.train(folder, *monitors, steps=4, weights=make_weights(trap=True)), global_state()


@pytest.mark.parametrize("arguments", MODES.values(), ids=MODES.keys())
def test_training_is_bit_identical_and_the_process_is_as_it_would_be_without(framework, tmp_path, arguments):
    plain, state = seeded(framework, tmp_path / "plain")
    monitor = make(framework, tmp_path / "watched", **arguments)
    watched, state_with = seeded(framework, tmp_path / "watched", monitor)
    assert len(monitor.monitor.history) >= 2
    assert monitor.monitor.history[0].summary["num_traps"] >= 1  # so that spectra have been shuffled
    assert all(torch.equal(one, other) for one, other in zip(plain.matrices, watched.matrices, strict=True))
    assert [name for name, value in state.items() if state_with[name] != value] == []


# --- resuming, running again, running two


def test_a_resumed_run_goes_on_in_the_same_file(framework, tmp_path):
    first = framework.train(tmp_path, make(framework, tmp_path), steps=4, save=True)
    monitor = make(framework, tmp_path)
    run = framework.train(tmp_path, monitor, resume=first.checkpoint)
    assert run.steps == 8
    assert files_in(tmp_path) == {"ww_history.jsonl": [0, 2, 4, 6, 8]}
    assert seen_by(monitor) == [0, 2, 4, 6, 8]


def test_patience_counts_on_after_a_resume(framework, tmp_path):
    arguments = {"stop_on": "traps", "patience": 4}
    weights = make_weights(trap=True)
    monitor = make(framework, tmp_path, **arguments)
    first = framework.train(tmp_path, monitor, steps=4, weights=weights, lr=1e-4, save=True)
    run = framework.train(tmp_path, make(framework, tmp_path, **arguments), lr=1e-4, resume=first.checkpoint)
    assert (first.steps, run.steps) == (4, 6)


def test_a_second_run_of_a_monitor_writes_a_second_file(framework, tmp_path):
    monitor = make(framework, tmp_path)
    framework.train(tmp_path, monitor)
    framework.train(tmp_path, monitor, steps=4)
    assert files_in(tmp_path) == {"ww_history-1.jsonl": [0, 2, 4], "ww_history.jsonl": [0, 2, 4, 6, 8]}
    assert seen_by(monitor) == [0, 2, 4]


def test_two_monitors_of_one_run_keep_apart(framework, tmp_path):
    one = make(framework, tmp_path, 2, metrics=["alpha"])
    other = make(framework, tmp_path, 4, metrics=["log_spectral_norm"], mode="async")
    framework.train(tmp_path, one, other, each_step=lambda *_: other.monitor.analyzer.join(30))
    assert files_in(tmp_path) == {"ww_history-1.jsonl": [0, 4, 8], "ww_history.jsonl": [0, 2, 4, 6, 8]}
    for name, metric in (("ww_history.jsonl", "alpha"), ("ww_history-1.jsonl", "log_spectral_norm")):
        kept = {key for snapshot in History.read(tmp_path / name) for key in snapshot.layers[0].metrics}
        assert kept & {"alpha", "log_spectral_norm"} == {metric}


# --- who may stop


def test_stop_on_ends_the_run_when_patience_is_over(framework, tmp_path):
    monitor = make(framework, tmp_path, stop_on="traps", patience=3)
    run = framework.train(tmp_path, monitor, weights=make_weights(trap=True), lr=1e-4)
    assert run.steps == 4
    assert files_in(tmp_path) == {"ww_history.jsonl": [0, 2, 4]}
    assert "3 snapshots in a row" in monitor.monitor.stop_reason


def test_in_the_background_the_stop_comes_one_snapshot_late_at_most(framework, tmp_path):
    monitor = make(framework, tmp_path, stop_on="traps", patience=3, mode="async")

    def slow_step(step: int, matrices: Sequence[torch.Tensor]) -> None:
        assert monitor.monitor.analyzer.join(30)

    weights = make_weights(trap=True)
    run = framework.train(tmp_path, monitor, weights=weights, lr=1e-4, each_step=slow_step)
    assert run.steps == 5
    assert seen_by(monitor) == [0, 2, 4, 5]


def test_the_frameworks_early_stopping_sees_alpha(framework, tmp_path):
    monitor = make(framework, tmp_path)
    run = framework.train(tmp_path, monitor, lr=0.0, steps=16, early=True)  # equal weights are no improvement
    assert run.steps == 2 * EPOCH
    assert len({snapshot.summary["alpha"] for snapshot in monitor.monitor.history}) == 1


def test_the_frameworks_best_checkpoint_is_that_of_the_least_alpha(framework, tmp_path):
    heavy = np.random.default_rng(0).standard_t(1.2, size=(32, 32)).astype("float32")
    first = make_weights()[1]

    def paint(step: int, matrices: Sequence[torch.Tensor]) -> None:
        if step in (5, 9):
            matrices[1].detach().copy_(torch.from_numpy(heavy) if step == 5 else first)

    monitor = make(framework, tmp_path, 4)
    run = framework.train(tmp_path, monitor, lr=0.0, steps=12, best=True, each_step=paint)
    alphas = {snapshot.step: snapshot.summary["alpha"] for snapshot in monitor.monitor.history}
    assert min(alphas, key=alphas.__getitem__) == 8
    assert run.best == 8


# --- what breaks


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_layer_that_breaks_is_a_status_and_the_run_goes_on(framework, tmp_path, mode):
    monitor = make(framework, tmp_path, mode=mode)

    def each_step(step: int, matrices: Sequence[torch.Tensor]) -> None:
        assert monitor.monitor.analyzer.join(30)
        if step == 4:
            break_middle(matrices)

    run = framework.train(tmp_path, monitor, each_step=each_step)
    assert run.steps == 8
    by_step = {snapshot.step: snapshot for snapshot in History.read(tmp_path / "ww_history.jsonl")}
    assert list(by_step) == [0, 2, 4, 6, 8]
    good = [layer.status == "ok" for layer in by_step[2].layers]
    broken = [layer.status == "ok" for layer in by_step[4].layers]
    assert (good, broken) == ([True, True, True], [True, False, True])
    begun = [finding.layer for finding in by_step[4].findings if finding.rule == "broken_layer"]
    assert begun == [by_step[4].layers[1].name]


class RaisesAt(Memory):
    """Cannot write from step 4 on, nor close."""

    def write(self, snapshot):
        if snapshot.step >= 4:
            raise OSError("no space left")
        super().write(snapshot)

    def close(self):
        raise OSError("no space left")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_sink_that_raises_is_said_once_and_costs_the_others_nothing(framework, tmp_path, mode):
    before, after = Memory(), Memory()
    monitor = make(framework, tmp_path, sinks=[before, RaisesAt(), after], mode=mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = framework.train(tmp_path, monitor, each_step=lambda *_: monitor.monitor.analyzer.join(30))
    assert run.steps == 8
    assert len(spectral_warnings(caught)) == 1
    assert "sink RaisesAt failed: OSError: no space left" in spectral_warnings(caught)[0]
    seen = [0, 2, 4, 6, 8]
    assert (steps_of(before.history), steps_of(after.history)) == (seen, seen)
    assert before.closed
    assert after.closed
    assert files_in(tmp_path) == {"ww_history.jsonl": seen}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_engine_that_fails_is_said_once_and_training_goes_on(framework, tmp_path, mode, monkeypatch):
    plain = framework.train(tmp_path / "plain")
    folder = tmp_path / "watched"
    monitor = make(framework, folder, mode=mode)

    def fails() -> None:
        if len(monitor.monitor.history) == 2:
            raise RuntimeError("no convergence")

    before_summary(monkeypatch, "log_norm", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = framework.train(folder, monitor, each_step=lambda *_: monitor.monitor.analyzer.join(30))
    assert len(spectral_warnings(caught)) == 1
    assert "analysis failed: RuntimeError: no convergence" in spectral_warnings(caught)[0]
    assert files_in(folder) == {"ww_history.jsonl": [0, 2]}
    assert all(torch.equal(one, other) for one, other in zip(plain.matrices, run.matrices, strict=True))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_interrupted_run_leaves_its_history_and_the_next_one_works(framework, tmp_path, mode):
    monitor = make(framework, tmp_path, mode=mode)

    def each_step(step: int, matrices: Sequence[torch.Tensor]) -> None:
        assert monitor.monitor.analyzer.join(30)
        if step == 5:
            interrupt(matrices)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        framework.train(tmp_path, monitor, each_step=each_step)
    framework.train(tmp_path, monitor, steps=4, each_step=lambda *_: monitor.monitor.analyzer.join(30))
    assert files_in(tmp_path) == {"ww_history-1.jsonl": [0, 2, 4], "ww_history.jsonl": [0, 2, 4]}
    assert our_threads() == []


def test_a_folder_that_no_longer_has_a_path_ends_nothing_and_memory_has_all(framework, tmp_path, monkeypatch):
    monitor, opens = make(framework, tmp_path), Adapter._open

    class Gone(type(tmp_path)):
        def absolute(self):
            raise FileNotFoundError("the working directory was deleted")

    def opened(self, **arguments):
        opens(self, **{**arguments, "folder": lambda: Gone(tmp_path)})

    monkeypatch.setattr(Adapter, "_open", opened)
    with pytest.warns(SpectralWarning, match="choosing the history file failed: FileNotFoundError"):
        framework.train(tmp_path, monitor)
    assert seen_by(monitor) == files_in(tmp_path)["ww_history.jsonl"] == [0, 2, 4, 6, 8]


def test_a_process_that_is_not_the_first_says_and_writes_nothing(framework, tmp_path, monkeypatch, capsys):
    opens, sink = Adapter._open, Memory()
    monkeypatch.setattr(Adapter, "_open", lambda self, **arguments: opens(self, **{**arguments, "rank": 1}))
    monitor = make(framework, tmp_path, console=True, sinks=[sink], stop_on="traps", patience=3)
    run = framework.train(tmp_path, monitor, weights=make_weights(trap=True), lr=1e-4)
    assert files_in(tmp_path) == {}
    assert len(sink.history) == 0
    assert "ww_monitor" not in capsys.readouterr().out
    assert (run.steps, seen_by(monitor)) == (4, [0, 2, 4])  # it stops with the first


COPIES = [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), lambda one: pickle.loads(cloudpickle.dumps(one))]
"""As processes that are spawned, tuners and clusters copy a callback."""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_callback_is_copied_before_and_during_a_run_and_a_copy_runs_by_itself(framework, tmp_path, mode):
    monitor = make(framework, tmp_path, mode=mode, console=True)
    copies = [make_copy(monitor) for make_copy in COPIES]

    def each_step(step: int, matrices: Sequence[torch.Tensor]) -> None:
        if step == 3:
            copies.extend(make_copy(monitor) for make_copy in COPIES)

    framework.train(tmp_path, monitor, each_step=each_step)
    assert len(copies) == 6
    for number, one in enumerate(copies[::3]):
        framework.train(tmp_path / str(number), one, steps=4)
        assert seen_by(one)[-1] == 4
        assert files_in(tmp_path)["ww_history.jsonl"][-1] == 8


# --- what the last release has written

STATES = Path(__file__).parent / "states"
SAVED = {
    "lightning": ("lightning.ckpt", lambda checkpoint: checkpoint),
    "huggingface": ("trainer_state.json", lambda checkpoint: checkpoint / "trainer_state.json"),
    "keras": ("keras.json", lambda checkpoint: checkpoint.with_suffix(".json")),
}
"""Written after 4 steps by version 0.1 (commit 1929194), and where it is in a checkpoint of today."""


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_the_last_release_resumes(name, tmp_path):
    """What it has seen, told and counted goes on, in its own history file."""
    framework, weights = FRAMEWORKS[name](), make_weights(trap=True)

    def monitor() -> Any:
        return make(framework, tmp_path, stop_on="traps", patience=50)

    file, place = SAVED[name]
    checkpoint = framework.train(tmp_path, monitor(), steps=4, weights=weights, lr=1e-4, save=True).checkpoint
    shutil.copy(STATES / file, place(checkpoint))
    shutil.copy(STATES / "history.jsonl", tmp_path / "ww_history.jsonl")
    resumed = monitor()
    framework.train(tmp_path, resumed, steps=8, weights=weights, lr=1e-4, resume=checkpoint)
    assert files_in(tmp_path) == {"ww_history.jsonl": [0, 2, 4, 6, 8]}
    assert seen_by(resumed) == [0, 2, 4, 6, 8]
    told = [finding for finding in History.read(tmp_path / "ww_history.jsonl").findings if finding.rule == "trap"]
    assert [(finding.step, finding.state) for finding in told] == [(0, "begin")]
    (count,) = [count for (rule, _), count in resumed.monitor.findings.held.items() if rule == "trap"]
    assert count == 5


# --- in the background


def test_snapshots_of_the_background_come_in_order_with_the_numbers_of_their_step(framework, tmp_path):
    sync, sink = make(framework, tmp_path / "sync", 1), Memory()
    framework.train(tmp_path / "sync", sync, lr=0.3)
    monitor = make(framework, tmp_path / "async", 1, mode="async", sinks=[sink])
    framework.train(tmp_path / "async", monitor, lr=0.3)
    expected = {snapshot.step: settled(snapshot) for snapshot in sync.monitor.history}
    steps = steps_of(sink.history)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 8)
    assert len(steps) > 2
    assert not same(expected[1], expected[8], 1e-3)
    assert all(same(settled(snapshot), expected[snapshot.step], 1e-12) for snapshot in sink.history)
    assert sink.history.last.summary["snapshots_dropped"] == len(expected) - len(steps)


def test_the_end_of_training_waits_for_the_background_no_longer_than_the_limit(framework, tmp_path, monkeypatch):
    release = threading.Event()

    def hangs(loaded) -> None:
        if threading.current_thread().name in our_threads():
            release.wait(30)

    before_measurement(monkeypatch, "live_sides", hangs)
    monkeypatch.setattr("ww_monitor.monitor.monitor.JOIN_SECONDS", 0.2)
    monitor = make(framework, tmp_path, mode="async")
    try:
        start = time.monotonic()
        with pytest.warns(SpectralWarning, match="the last analysis took longer"):
            framework.train(tmp_path, monitor)
        assert time.monotonic() - start < 15
    finally:
        release.set()
    assert files_in(tmp_path) == {"ww_history.jsonl": [0, 8]}


# --- the same everywhere


@pytest.fixture(scope="module")
def untrained_histories(tmp_path_factory):
    """The history file of every framework for the same weights, which do not change."""
    histories = {}
    for name, kind in FRAMEWORKS.items():
        framework, folder = kind(), tmp_path_factory.mktemp(name)
        monitor = make(framework, folder, 4, metrics="all")
        framework.train(folder, monitor, steps=4, weights=make_weights(trap=True), lr=0.0)
        histories[name] = [json.loads(line) for line in (folder / "ww_history.jsonl").read_text().splitlines()]
    return histories


SHUFFLED = ("trap_p_value", "trap_severity")
"""They depend on the order in which the entries lie, which in a Keras kernel `[in, out]` is another."""

LOOSE = {"esd": 1e-10, "versus_": 1e-6}
"""How equal W·Wᵀ and Wᵀ·W make the smallest eigenvalue of a square matrix, and what a numerical search finds."""


def without_names(snapshot: dict[str, Any]) -> dict[str, Any]:
    """A line of a history file less what differs by nature: names of layers, and the time it took."""
    names = {layer["name"]: f"layer {place}" for place, layer in enumerate(snapshot["layers"])}
    text = json.dumps({key: value for key, value in snapshot.items() if key != "seconds"})
    for name, plain in names.items():
        text = text.replace(name, plain)
    return json.loads(text)


def without_orientation(snapshot: dict[str, Any], *, transposed: bool) -> dict[str, Any]:
    """A line of a history file with matrices as `[out, in]`, less the numbers that depend on it."""
    for layer in snapshot["layers"]:
        if transposed:
            slices, fan, out = layer["shape"]
            layer["shape"] = [slices, out, fan]
            layer["trap_entries"] = [
                {**entry, "row": entry["column"], "column": entry["row"]} for entry in layer["trap_entries"]
            ]
    for values in (snapshot["summary"], *(layer["metrics"] for layer in snapshot["layers"])):
        for metric in SHUFFLED:
            values.pop(metric, None)
    snapshot["findings"] = [{**finding, "message": ""} for finding in snapshot["findings"]]  # it quotes them
    return snapshot


def flat(data: Any, path: str = "") -> dict[str, Any]:
    """Path → value of everything in nested plain data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = {key: value for name, part in items for key, value in flat(part, f"{path}/{name}").items()}
    return found or {path: data}


def unequal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Paths whose values differ by more than 1e-12 relative, or where two numerical ways part by more than `LOOSE`."""
    one, other = flat(one), flat(other)
    tolerance = {path: next((t for part, t in LOOSE.items() if part in path), 1e-12) for path in one}
    parted = [path for path in one.keys() & other.keys() if not same(one[path], other[path], tolerance[path])]
    return sorted((one.keys() ^ other.keys()) | set(parted))


def test_equal_weights_give_lightning_and_hugging_face_equal_history_files(untrained_histories):
    one, other = (list(map(without_names, untrained_histories[name])) for name in ("lightning", "huggingface"))
    assert [snapshot["step"] for snapshot in one] == [0, 4]
    assert one == other


def test_equal_weights_give_keras_the_same_history_file_but_for_its_orientation(untrained_histories):
    lines = {name: list(map(without_names, history)) for name, history in untrained_histories.items()}
    assert [snapshot["step"] for snapshot in lines["keras"]] == [0, 4]
    for one, other in zip(lines["lightning"], lines["keras"], strict=True):
        reference = without_orientation(one, transposed=False)
        assert len(flat(reference["layers"])) > 3 * 50
        assert unequal(reference, without_orientation(other, transposed=True)) == []


@pytest.mark.parametrize(
    ("accumulate", "arguments"),
    [(1, {}), (2, {}), (1, {"mode": "async"}), (1, {"every_n_steps": None, "every_n_epochs": 1})],
)
def test_the_update_of_a_snapshots_step_is_a_hand_made_loops_and_training_stays_the_same(
    framework, tmp_path, accumulate, arguments
):
    weights = {0: make_weights()}
    plain = framework.train(
        tmp_path / "plain", accumulate=accumulate, each_step=lambda k, now: weights.update({k: copies(now)})
    )
    monitor = make(framework, tmp_path, **{"every_n_steps": 3, "track_updates": True, **arguments})
    run = framework.train(tmp_path, monitor, accumulate=accumulate)
    assert all(torch.equal(a, b) for a, b in zip(run.matrices, plain.matrices, strict=True))
    first, *later = monitor.monitor.history
    assert all(np.isnan(layer.value("update_ratio")) for layer in first.layers)  # no step led there
    assert later
    for snapshot in later:
        for layer, before, now in zip(snapshot.layers, weights[snapshot.step - 1], weights[snapshot.step], strict=True):
            moved, square = (now - before).double(), (now - before).double().square()
            ratio = square.mean().sqrt() / before.double().square().mean().sqrt()
            assert layer.value("update_ratio") == pytest.approx(ratio.item(), rel=1e-6)
            norm = torch.linalg.matrix_norm(moved, 2)
            assert layer.value("update_spectral_norm") == pytest.approx(norm.item(), rel=1e-6)
            assert layer.value("update_stable_rank") == pytest.approx((square.sum() / norm**2).item(), rel=1e-6)
            u, _, v = torch.linalg.svd(before.double())
            within = (u[:, :8].T @ moved @ v[:8].T).square().sum() / square.sum()
            assert layer.value("update_alignment") == pytest.approx(within.item(), rel=1e-4)


def test_a_resumed_run_measures_the_update_of_its_next_snapshots_step(framework, tmp_path):
    checkpoint = framework.train(tmp_path, make(framework, tmp_path, 3), steps=4, save=True).checkpoint
    resumed, weights = make(framework, tmp_path, 3, track_updates=True), {}
    keep = lambda step, now: weights.update({step: copies(now)})  # noqa: E731 - dropout draws anew after a resume
    framework.train(tmp_path, resumed, resume=checkpoint, each_step=keep)
    six = next(one for one in resumed.monitor.history if one.step == 6)
    for layer, before, now in zip(six.layers, weights[5], weights[6], strict=True):
        expected = (now - before).double().norm() / before.double().norm()
        assert layer.value("update_ratio") == pytest.approx(expected.item(), rel=1e-6)

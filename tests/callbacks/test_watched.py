"""What frameworks act on: values that are of now, that always exist, and that end no healthy run; keys of one's own."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.histories import steps_of
from tests.test_contracts_callbacks import FRAMEWORKS, Keras, Lightning, make, make_net, make_weights, pytestmark  # noqa: F401 - warnings of the frameworks
from ww_monitor import History, Monitor, Snapshot, SpectralWarning, rules
from ww_monitor.callbacks._watched import Watched
from ww_monitor.sinks.memory import Memory


def said(caught) -> list[str]:
    return [str(warning.message) for warning in caught if issubclass(warning.category, SpectralWarning)]


# --- stoppers, in every trainer


def train_with_stopper(name: str, folder: Path, key: str, *, trap: bool, epochs: int, **stopper) -> int:
    """Epochs of 4 steps until a run ends, with the trainer's own early stopping on a key of ours; patience 2."""
    framework, options = FRAMEWORKS[name](), ("metrics", "track_updates")
    monitor = make(framework, folder, 4, **{name: stopper.pop(name) for name in options if name in stopper})
    if name == "lightning":
        from pytorch_lightning.callbacks import EarlyStopping

        callbacks = [monitor, EarlyStopping(f"ww/{key}", **{"patience": 2, **stopper})]
        return framework.train(folder, *callbacks, steps=4 * epochs, lr=1e-4, weights=make_weights(trap=trap)).steps
    if name == "keras":
        stopping = framework.keras.callbacks.EarlyStopping(f"ww_{key}", **{"patience": 2, **stopper})
        return framework.train(
            folder, monitor, stopping, steps=4 * epochs, lr=1e-4, weights=make_weights(trap=trap)
        ).steps
    return train_hugging_face(framework, folder, monitor, f"ww_{key}", trap=trap, steps=4 * epochs)


def train_hugging_face(framework, folder: Path, monitor, key: str, *, trap: bool, steps: int) -> int:
    library = framework.transformers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net(make_weights(trap=trap))

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.net(x), labels), "logits": x}

    data = [{"x": torch.randn(24, generator=torch.Generator().manual_seed(i)), "labels": i % 10} for i in range(32)]
    args = library.TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=1e-4,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        metric_for_best_model=key,
        greater_is_better=True,
    )
    callbacks = [monitor, library.EarlyStoppingCallback(2)]
    trainer = library.Trainer(Model(), args, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)
    trainer.train()
    return trainer.state.global_step


@pytest.mark.parametrize(("trap", "epochs_done"), [(False, 5), (True, 3)])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_healthy_run_goes_to_its_end_and_one_with_a_trap_stops(tmp_path, name, trap, epochs_done):
    """`trap_free_until` grows while there is no trap: what waits for an improvement is right about it."""
    mode = {} if name == "huggingface" else {"mode": "max"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = train_with_stopper(name, tmp_path, "trap_free_until", trap=trap, epochs=5, **mode)
    assert steps == 4 * epochs_done
    assert said(caught) == []


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_stopper_that_waits_for_a_count_to_improve_is_told_once(tmp_path, name):
    mode = {} if name == "huggingface" else {"mode": "min"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_with_stopper(name, tmp_path, "num_traps", trap=False, epochs=2, **mode)
    (message,) = said(caught)
    assert "num_traps to improve, which it cannot while no layer has a trap" in message
    assert "use stop_on='traps', or let it watch" in message
    assert "trap_free_until" in message


@pytest.mark.parametrize(("trap", "steps"), [(False, 20), (True, 4)])
def test_lightnings_threshold_stops_a_run_with_a_trap_and_no_healthy_one(tmp_path, trap, steps):
    arguments = {"divergence_threshold": 0.5, "patience": 10**9}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train_with_stopper("lightning", tmp_path, "num_traps", trap=trap, epochs=5, **arguments) == steps
    assert said(caught) == []


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_stop_on_traps_ends_no_healthy_run(tmp_path, name):
    framework = FRAMEWORKS[name]()
    assert framework.train(tmp_path, make(framework, tmp_path, 1, stop_on="traps", patience=1), steps=8).steps == 8


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("key", ["trap_severity", "trap_p_value"])
def test_a_watched_value_of_shuffles_is_there_before_any_layer_is_shuffled(tmp_path, name, key):
    mode = {} if name == "huggingface" else {"mode": "max"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train_with_stopper(name, tmp_path, key, trap=False, epochs=1, **mode) == 4
    assert not any("not available" in str(warning.message) for warning in caught)


def test_lightnings_thresholds_on_the_severity_take_a_healthy_run_for_healthy(tmp_path):
    for threshold in ({"mode": "min", "divergence_threshold": 1.2}, {"mode": "max", "stopping_threshold": 1.2}):
        arguments = {**threshold, "patience": 99}
        assert train_with_stopper("lightning", tmp_path, "trap_severity", trap=False, epochs=2, **arguments) == 8


def fail_to_walk(monkeypatch, *, after: int) -> None:
    """Analyses fail once there have been so many."""
    observe, done = Monitor.observe, []

    def observed(self, matrices, **named):
        done.append(named)
        return observe(self, matrices if len(done) <= after else (1 / 0 for _ in "1"), **named)

    monkeypatch.setattr(Monitor, "observe", observed)


@pytest.mark.filterwarnings("ignore::ww_monitor.SpectralWarning")
@pytest.mark.parametrize("key", ["alpha", "trap_free_until"])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_analyses_that_fail_end_no_run_whose_values_are_watched(tmp_path, monkeypatch, name, after, key):
    fail_to_walk(monkeypatch, after=after)
    patience = {} if key == "trap_free_until" else {"patience": 9}
    mode = {} if name == "huggingface" else {"mode": "max" if key == "trap_free_until" else "min", **patience}
    epochs = 2 if name == "huggingface" and key == "alpha" else 5  # its patience is 2
    assert train_with_stopper(name, tmp_path, key, trap=False, epochs=epochs, **mode) == 4 * epochs


@pytest.mark.parametrize("after", [0, 2])
def test_a_stopper_of_lightnings_that_is_not_strict_passes_over_failed_analyses(tmp_path, monkeypatch, after):
    fail_to_walk(monkeypatch, after=after)
    arguments = {"mode": "min", "patience": 2, "strict": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train_with_stopper("lightning", tmp_path, "alpha", trap=False, epochs=6, **arguments) == 24
    (message,) = [text for text in said(caught) if "there is no analysis of step" in text]
    assert message.endswith("at which ww/alpha is watched; while that is so it is left out, which is passed over")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_where_a_failed_analysis_counts_as_the_worst_it_is_said_once(tmp_path, monkeypatch, name):
    fail_to_walk(monkeypatch, after=1)
    mode = {} if name == "huggingface" else {"mode": "min"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train_with_stopper(name, tmp_path, "alpha", trap=False, epochs=9, **mode) < 36
    assert len([text for text in said(caught) if "counts as the worst" in text]) == 1


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_run_whose_traps_are_not_measured_is_no_run_with_a_trap_and_that_is_said(tmp_path, name):
    mode = {} if name == "huggingface" else {"mode": "max"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = train_with_stopper(name, tmp_path, "trap_free_until", trap=True, epochs=5, metrics=["alpha"], **mode)
    assert steps == 20
    (message,) = said(caught)
    assert "trap_free_until is watched, but metrics leave num_traps out" in message


def test_several_readings_at_a_step_take_a_healthy_run_for_healthy():
    watched = Watched("", {"ww/trap_free_until": -1.0}, {"trap_free_until", "num_traps"})
    history = History([Snapshot((), step=10, summary={"num_traps": 0.0})])
    read = [watched.values(history, step)["ww/trap_free_until"] for step in (10, 10, 10, 11, 11, 12)]
    assert read == sorted(set(read))
    assert [int(value) for value in read] == [10, 10, 10, 11, 11, 12]
    history.append(Snapshot((), step=13, summary={"num_traps": 1.0}))
    assert watched.values(history, 13) == watched.values(history, 13) == {"ww/trap_free_until": 10.0}


@pytest.mark.filterwarnings("ignore::ww_monitor.SpectralWarning")
def test_where_an_analysis_fails_the_watched_value_is_not_that_of_other_weights(tmp_path, monkeypatch):
    fail_to_walk(monkeypatch, after=2)
    framework, seen = Lightning(), []
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Reads(framework.pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(float(trainer.callback_metrics["ww/alpha"]))

    watching = ModelCheckpoint(tmp_path / "best", monitor="ww/alpha", mode="min")
    trainer_of = framework.pl.Trainer
    framework.pl = _with(framework.pl, lambda **given: trainer_of(**{**given, "enable_checkpointing": True}))
    framework.train(tmp_path, make(framework, tmp_path, 1000), Reads(), watching, steps=12)
    assert seen[0] < 100
    assert min(seen[1:]) > 1e30


def test_the_trainers_best_model_by_an_update_has_its_key_from_the_first_evaluation(tmp_path):
    arguments = {"trap": False, "epochs": 3, "track_updates": True}
    assert train_with_stopper("huggingface", tmp_path, "update_ratio", **arguments) >= 4


@pytest.mark.parametrize("every", [1, 3])
def test_the_name_of_a_keras_file_saved_at_a_batch_has_the_value_of_its_weights(tmp_path, every):
    framework = Keras()
    keras, model = framework.keras, framework.make_model(make_weights(), 1e-2, 1)
    x, y = np.random.default_rng(0).normal(size=(32, 24)).astype("float32"), np.arange(32) % 10
    monitor = framework.spectral_monitor(tmp_path, every_n_steps=1000, console=False, metrics=["log_norm"])
    template = tmp_path / "{epoch}-{batch}-{ww_log_norm:.6f}.weights.h5"
    saving = keras.callbacks.ModelCheckpoint(template, save_weights_only=True, save_freq=every)
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[monitor, saving])
    names = sorted(float(path.name.split("-")[2].removesuffix(".weights.h5")) for path in tmp_path.glob("*.weights.h5"))
    known = log_norms(monitor)
    assert names == pytest.approx(sorted(known[step] for step in range(every, 13, every)), abs=1e-6)


# --- Lightning measures what is watched


class Spy:
    """Callbacks of Lightning that change weights as the run goes on and say what stands in `callback_metrics`."""

    def __init__(self, pl) -> None:
        class Grow(pl.Callback):
            def on_train_batch_end(self, trainer, module, *arguments):
                with torch.no_grad():
                    module.net[0].weight.mul_(1.5)

        self.Grow = Grow


def log_norms(monitor) -> dict[int, float]:
    return {snapshot.step: snapshot.summary["log_norm"] for snapshot in monitor.monitor.history}


@pytest.mark.parametrize("first", ["monitor first", "checkpoint first"])
@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 3}])
def test_a_checkpoint_is_scored_by_the_weights_it_holds(tmp_path, first, every):
    framework = Lightning()
    from pytorch_lightning.callbacks import ModelCheckpoint

    monitor = make(framework, tmp_path, 1000, metrics=["log_norm"])
    checkpoint = ModelCheckpoint(
        tmp_path / "best",
        monitor="ww/log_norm",
        filename="{step}-{ww/log_norm:.6f}",
        auto_insert_metric_name=False,
        save_top_k=-1,
        **every,
    )
    callbacks = [monitor, checkpoint] if first == "monitor first" else [checkpoint, monitor]
    trainer_of = framework.pl.Trainer
    framework.pl = _with(framework.pl, lambda **given: trainer_of(**{**given, "enable_checkpointing": True}))
    framework.train(tmp_path, Spy(framework.pl).Grow(), *callbacks, steps=12)
    names = {path.stem for path in (tmp_path / "best").glob("*.ckpt")}
    known = log_norms(monitor)
    assert len(names) == (3 if "every_n_epochs" in every else 4)
    for name in names:
        step, value = name.split("-")[0], name.partition("-")[2]
        assert float(value) == pytest.approx(known[int(step)], abs=1e-5)
        matrices = torch.load(tmp_path / "best" / f"{name}.ckpt", weights_only=True)["state_dict"]
        held = sum(w.double().square().sum().log10() for k, w in matrices.items() if k.endswith("weight")) / 3
        assert float(value) == pytest.approx(float(held), abs=1e-4)


class _with:  # noqa: N801 - a namespace with another Trainer
    def __init__(self, pl, trainer) -> None:
        self._pl, self.Trainer = pl, trainer

    def __getattr__(self, name):
        return getattr(self._pl, name)


@pytest.mark.parametrize("first", ["monitor first", "stopping first"])
def test_lightnings_early_stopping_acts_on_the_value_of_its_epoch(tmp_path, first):
    framework = Lightning()
    from pytorch_lightning.callbacks import EarlyStopping

    monitor = make(framework, tmp_path, 1000, metrics=["log_norm"])
    stopping = EarlyStopping("ww/log_norm", mode="max", patience=1)  # it grows in every epoch
    callbacks = [monitor, stopping] if first == "monitor first" else [stopping, monitor]
    assert framework.train(tmp_path, Spy(framework.pl).Grow(), *callbacks, steps=16).steps == 16
    assert steps_of(monitor.monitor.history) == [0, 4, 8, 12, 16]


def test_the_last_snapshot_of_a_lightning_run_is_of_an_epoch_that_ran(tmp_path):
    framework = Lightning()
    monitor = make(framework, tmp_path, 1000)
    framework.train(tmp_path, monitor, steps=8)
    assert [snapshot.epoch for snapshot in monitor.monitor.history] == [0, 1]


# --- Keras logs what is of the epoch


def test_keras_logs_of_an_epoch_without_a_snapshot_repeat_nothing(tmp_path):
    framework = Keras()
    keras, model = framework.keras, framework.make_model(make_weights(), 1e-2, 1)
    x, y = np.random.default_rng(0).normal(size=(32, 24)).astype("float32"), np.arange(32) % 10
    monitor = framework.spectral_monitor(tmp_path, every_n_steps=12, console=False)
    table = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    log = model.fit(x, y, batch_size=8, epochs=5, verbose=0, callbacks=[monitor, table]).history["ww_alpha"]
    alphas = {snapshot.epoch: snapshot.summary["alpha"] for snapshot in monitor.monitor.history}
    assert [math.isnan(value) for value in log] == [False, True, False, True, False]
    assert [log[epoch] for epoch in (0, 2, 4)] == [alphas[epoch] for epoch in (0, 2, 4)]


def test_the_name_of_a_keras_file_has_the_value_of_its_weights(tmp_path):
    framework = Keras()
    keras, model = framework.keras, framework.make_model(make_weights(), 1e-2, 1)
    x, y = np.random.default_rng(0).normal(size=(32, 24)).astype("float32"), np.arange(32) % 10
    monitor = framework.spectral_monitor(tmp_path, every_n_steps=1000, console=False, metrics=["log_norm"])
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "{ww_log_norm:.6f}.weights.h5", save_weights_only=True)
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[monitor, saving])
    names = sorted(float(path.name.removesuffix(".weights.h5")) for path in tmp_path.glob("*.weights.h5"))
    assert names == pytest.approx(sorted(value for step, value in log_norms(monitor).items() if step), abs=1e-6)


# --- the weights that a run ends with


def averaging(pl):
    class Average(pl.Callback):
        """Puts other weights in place when training has ended."""

        def on_train_end(self, trainer, module):
            with torch.no_grad():
                module.net[0].weight.mul_(0.5)

    return Average()


@pytest.mark.parametrize("first", ["monitor first", "averaging first"])
def test_averaged_weights_that_a_lightning_run_ends_with_are_seen_last(tmp_path, first):
    framework = Lightning()
    monitor = make(framework, tmp_path, 4, metrics=["log_norm"])
    callbacks = [monitor, averaging(framework.pl)]
    run = framework.train(tmp_path, *(callbacks if first == "monitor first" else callbacks[::-1]), steps=8)
    mean = sum(float(matrix.double().square().sum().log10()) for matrix in run.matrices) / 3
    assert monitor.monitor.history.last.summary["log_norm"] == pytest.approx(mean)
    assert History.read(tmp_path / "ww_history.jsonl").last.summary["log_norm"] == pytest.approx(mean)
    assert "exchanged_weights" in {finding.rule for finding in monitor.monitor.history.last.findings}


def exchanging(keras, how):
    """Callbacks of Keras, and the optimizer, by which a run ends with other weights than those of its last step."""
    if how == "best weights":
        return [keras.callbacks.EarlyStopping("loss", mode="max", restore_best_weights=True)], keras.optimizers.SGD(0.5)
    swapping = [keras.callbacks.SwapEMAWeights()] * (how == "swapped averages")
    return swapping, keras.optimizers.SGD(0.5, use_ema=True)


@pytest.mark.parametrize("monitors", ["first", "last", "on both sides"])
@pytest.mark.parametrize("how", ["best weights", "averages", "swapped averages"])
def test_the_weights_that_keras_ends_with_are_seen_last(tmp_path, how, monitors):
    framework = Keras()
    keras, model = framework.keras, framework.make_model(make_weights(), 1e-2, 1)
    callbacks, optimizer = exchanging(keras, how)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.random.default_rng(0).normal(size=(32, 24)).astype("float32"), np.arange(32) % 10
    options = {"every_n_steps": 4, "console": False, "metrics": ["log_norm"]}
    one, other = (framework.spectral_monitor(tmp_path, prefix=prefix, **options) for prefix in ("", "b/"))
    callbacks = {"first": [one, *callbacks], "last": [*callbacks, one], "on both sides": [one, *callbacks, other]}[
        monitors
    ]
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=callbacks)
    mean = sum(float(matrix.double().square().sum().log10()) for matrix in framework.matrices(model)) / 3
    for monitor in (one, other) if monitors == "on both sides" else (one,):
        steps, history = steps_of(monitor.monitor.history), monitor.monitor.history
        assert history.last.summary["log_norm"] == pytest.approx(mean)
        assert steps[-2] == steps[-1]  # both are there
        assert monitor._session is None
    assert History.read(tmp_path / "ww_history.jsonl").last.summary["log_norm"] == pytest.approx(mean)
    assert "exchanged_weights" in {finding.rule for finding in one.monitor.history.last.findings}


# --- several monitors in one run


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_two_monitors_of_one_run_get_keys_of_their_own(tmp_path, name):
    framework = FRAMEWORKS[name]()
    one, other = make(framework, tmp_path, 4), make(framework, tmp_path, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        framework.train(tmp_path, one, other, steps=4)
    (message,) = said(caught)
    assert "another SpectralMonitor has the same keys, so this one's begin with '2/'; give prefix=" in message
    assert (steps_of(one.monitor.history), steps_of(other.monitor.history)) == ([0, 4], [0, 2, 4])


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_sinks_of_two_monitors_have_keys_of_their_own_too(tmp_path, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ww_monitor.sinks.tensorboard import TensorBoard

    framework = FRAMEWORKS[name]()
    monitors = [
        make(framework, tmp_path, 2, sinks=[TensorBoard(tmp_path / "tb")], prefix=prefix) for prefix in ("", "b/")
    ]
    framework.train(tmp_path, *monitors, steps=4)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    for key in ("ww/alpha", "b/ww/alpha"):
        assert [event.step for event in events.Scalars(key)] == [0, 2, 4]


def test_a_prefix_stands_before_every_key(tmp_path):
    framework, seen = Lightning(), {}

    class Watch(framework.pl.Callback):
        def on_train_end(self, trainer, module):
            seen.update(trainer.callback_metrics)

    monitors = make(framework, tmp_path, 4, prefix="teacher/"), make(framework, tmp_path, 4, prefix="student/")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        framework.train(tmp_path, *monitors, Watch(), steps=4)
    assert said(caught) == []
    assert {"teacher/ww/alpha", "student/ww/alpha"} <= seen.keys()
    assert not any(key.startswith("ww") for key in seen)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_changed_cadence_resumes(tmp_path, name):
    framework = FRAMEWORKS[name]()
    first = framework.train(tmp_path, make(framework, tmp_path, 2), steps=4, save=True)
    monitor = make(framework, tmp_path, 4)
    framework.train(tmp_path, monitor, resume=first.checkpoint)
    assert steps_of(monitor.monitor.history) == [0, 2, 4, 8]


@pytest.mark.parametrize("name", ["lightning", "huggingface"])
def test_a_run_that_now_stops_on_traps_resumes_beside_another_monitor(tmp_path, name):
    framework = FRAMEWORKS[name]()
    monitors = make(framework, tmp_path, 2), make(framework, tmp_path, 2, metrics=["alpha"], prefix="a/")
    first = framework.train(tmp_path, *monitors, steps=4, save=True)
    one = make(framework, tmp_path, 2, stop_on="traps")
    other = make(framework, tmp_path, 2, metrics=["alpha"], prefix="a/")
    framework.train(tmp_path, other, one, resume=first.checkpoint)
    assert steps_of(one.monitor.history) == steps_of(other.monitor.history) == [0, 2, 4, 6, 8]
    assert len(list(tmp_path.glob("ww_history*"))) == 2


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_resumed_run_in_another_folder_says_what_it_continues(tmp_path, name):
    framework, (old, new) = FRAMEWORKS[name](), (tmp_path / "old", tmp_path / "new")
    old.mkdir()
    first = framework.train(old, make(framework, old, 2), steps=4, save=True)
    framework.train(new, make(framework, new, 2), resume=first.checkpoint)
    begun = History.read(new / "ww_history.jsonl")[0].findings
    said_there = {finding.rule: finding.message for finding in begun}
    assert said_there["continues"] == f"continues {old / 'ww_history.jsonl'}, which ends with step 4"


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_resumed_run_says_everywhere_from_where_distances_count(tmp_path, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ww_monitor.report import write_report
    from ww_monitor.sinks.tensorboard import TensorBoard

    framework = FRAMEWORKS[name]()
    first = framework.train(tmp_path, make(framework, tmp_path, 2, track_delta=True), steps=4, save=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sinks = [TensorBoard(tmp_path / "events")]
        framework.train(tmp_path, make(framework, tmp_path, 2, track_delta=True, sinks=sinks), resume=first.checkpoint)
    (message,) = [text for text in said(caught) if "begin anew" in text]
    message = message.removeprefix("ww_monitor: ")
    history = History.read(tmp_path / "ww_history.jsonl")
    assert steps_of(history) == [0, 2, 4, 6, 8]
    notes = [finding for one in history for finding in one.findings if finding.rule == "track_delta"]
    assert [finding.message for finding in notes] == [message]
    assert [one.step for one in history if one.summary["delta_norm"] == 0.0] == [0, 6]
    assert message.startswith("delta_norm and rotations begin anew at step 6: ")
    assert message in write_report(tmp_path, path=tmp_path / "run.html").read_text()
    events = EventAccumulator(str(tmp_path / "events")).Reload().Tensors("ww/findings/text_summary")
    assert any(message in event.tensor_proto.string_val[0].decode().replace("\\", "") for event in events)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_warning_points_at_the_users_line(tmp_path, name):
    framework = FRAMEWORKS[name]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        framework.train(tmp_path, make(framework, tmp_path, 4), make(framework, tmp_path, 2), steps=4)
    (warning,) = [one for one in caught if issubclass(one.category, SpectralWarning)]
    assert Path(warning.filename).name == "test_contracts_callbacks.py"  # where it calls fit or train


OTHERS = [
    {"stop_on": "traps"},
    {"rules": [rules.trap]},
    {"lora": ["base"]},
    {"track_delta": True},
    {"prefix": "b/"},
    {"experts": "pooled"},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_monitors_that_do_different_things_do_not_share_a_state(tmp_path, other):
    monitors = [Lightning().spectral_monitor(tmp_path, **arguments) for arguments in ({}, other, {"every_n_steps": 7})]
    one, two, three = (monitor.state_key for monitor in monitors)
    assert one == three != two


def test_of_two_monitors_that_differ_in_cadence_only_each_resumes_its_own(tmp_path):
    framework = Lightning()
    first = framework.train(tmp_path, make(framework, tmp_path, 2), make(framework, tmp_path, 4), steps=4, save=True)
    one, other = make(framework, tmp_path, 2), make(framework, tmp_path, 4)
    framework.train(tmp_path, one, other, resume=first.checkpoint)
    assert (steps_of(one.monitor.history), steps_of(other.monitor.history)) == ([0, 2, 4, 6, 8], [0, 4, 8])
    assert len({one.state_key, other.state_key}) == 2


def test_sinks_see_the_keys_without_a_prefix(tmp_path):
    sink = Memory()
    framework = Lightning()
    framework.train(tmp_path, make(framework, tmp_path, 4, prefix="a/", sinks=[sink]), steps=4)
    assert "ww/alpha" in sink.history.last.scalars()

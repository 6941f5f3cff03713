"""SpectralMonitor in real Trainers: trackers and log_history, best models, resuming, subclasses, PEFT, processes."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from tests.histories import published, steps_of
from tests.processes import once, run_python
from ww_monitor import History, SpectralWarning
from ww_monitor.sinks.memory import Memory

pytest.importorskip("transformers", reason="transformers, the framework, is not installed")

from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from ww_monitor.callbacks.huggingface import SpectralMonitor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MLPS = ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]


class Tokens(torch.utils.data.Dataset):
    """8 batches of 8 an epoch."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def make_model(*, trap: bool = False, layers: int = 1) -> GPT2LMHeadModel:
    """With dropout; with `trap` an entry of a matrix far above the size that makes an outlier."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=layers, n_head=2, loss_type="ForCausalLM")
    model = GPT2LMHeadModel(config)
    if trap:
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight[3, 4] = 2.0
    return model


def make_trainer(folder: Path, *callbacks, model=None, kind=Trainer, **arguments) -> Trainer:
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(str(folder), **{**defaults, **arguments})
    model = make_model() if model is None else model
    return kind(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=list(callbacks))


def train(folder: Path, *callbacks, resume=None, **arguments) -> Trainer:
    trainer = make_trainer(folder, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def spectral_monitor(every_n_steps: int | None = 4, **arguments) -> SpectralMonitor:
    return SpectralMonitor(every_n_steps, **{"console": False, "include": ["*mlp*"], **arguments})


def seen_by(monitor: SpectralMonitor) -> list[int | None]:
    return steps_of(monitor.monitor.history)


def entries_of(trainer: Trainer) -> dict[int, dict[str, float]]:
    """Step → our values in the Trainer's log."""
    return {
        entry["step"]: {key: value for key, value in entry.items() if key.startswith("ww")}
        for entry in trainer.state.log_history
        if any(key.startswith("ww") for key in entry)
    }


def model_level(monitor: SpectralMonitor) -> dict[int, dict[str, float]]:
    history = monitor.monitor.history
    return dict(zip(steps_of(history), published(history, layers=False), strict=True))


def prefixed(monitor: SpectralMonitor) -> dict[int, dict[str, float]]:
    """What a tracker should have got: the Trainer's trackers put `train/` before all that is not an evaluation."""
    history = monitor.monitor.history
    return {
        snapshot.step: {f"train/{key}": value for key, value in values.items()}
        for snapshot, values in zip(history, published(history), strict=True)
    }


class Watch(TrainerCallback):
    """Every dict that the Trainer's trackers get, and the metrics of every evaluation."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluations.append(dict(metrics))


# --- how it gets into a Trainer


def test_one_argument_is_all(tmp_path):
    monitor = spectral_monitor(3)
    trainer = train(tmp_path, monitor)
    assert seen_by(monitor) == [0, 3, 6, 8]
    assert [layer.name for layer in monitor.monitor.history.last.layers] == MLPS
    assert entries_of(trainer) == model_level(monitor)


def test_the_class_will_do(tmp_path, capsys):
    trainer = train(tmp_path, SpectralMonitor, max_steps=2)
    assert list(entries_of(trainer)) == [0, 2]
    assert f"history in {tmp_path / 'ww_history.jsonl'}" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [True, False])
def test_attach_joins_a_trainer_once_and_returns_the_callback(tmp_path, inside):
    monitor = spectral_monitor()
    trainer = make_trainer(tmp_path, *([monitor] if inside else []))
    assert monitor.attach(trainer) is monitor
    trainer.train()
    assert trainer.callback_handler.callbacks.count(monitor) == 1
    assert list(entries_of(trainer)) == [0, 4, 8]


def test_a_monitor_moves_from_one_trainer_to_the_next(tmp_path):
    monitor, watch = spectral_monitor(), Watch()
    train(tmp_path / "a", monitor)
    trainer = train(tmp_path / "b", monitor, watch)
    assert list(entries_of(trainer)) == [0, 4, 8]
    assert len([logs for logs in watch.logs if "ww/alpha" in logs]) == 3
    assert steps_of(History.read(tmp_path / "b" / "ww_history.jsonl")) == [0, 4, 8]


def test_without_a_trainer_around_it_the_history_file_is_written_and_a_warning_says_so(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.state.max_steps, monitor = 8, spectral_monitor()
    with pytest.warns(SpectralWarning, match=r"found no Trainer .* call attach\(trainer\)"):
        monitor.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    monitor.on_epoch_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    monitor.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0]


# --- trackers


def test_tensorboard_gets_scalars_and_histograms_in_the_trainers_own_file(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = spectral_monitor()
    train(tmp_path, monitor, report_to="tensorboard")
    (path,) = tmp_path.glob("**/events.out.tfevents*")
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    expected = prefixed(monitor)
    assert list(expected) == [0, 4, 8]
    tags = [tag for tag in events.Tags()["scalars"] if "ww" in tag and not tag.startswith("train/ww_band/")]
    assert set(tags) >= {"train/ww/alpha", f"train/ww_alpha/{MLPS[0]}", f"train/ww_num_traps/{MLPS[1]}"}
    for tag in tags:
        known = {step: values[tag] for step, values in expected.items() if tag in values}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(known, rel=1e-6)
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [event.value for event in events.Scalars("train/ww_band/alpha_low")] == [2.0] * 3
    assert events.Tags()["histograms"] == [f"ww_esd/{name}" for name in MLPS]
    for event, snapshot in zip(events.Histograms(f"ww_esd/{MLPS[0]}"), monitor.monitor.history, strict=True):
        assert event.step == snapshot.step
        assert event.histogram_value.bucket == list(snapshot[MLPS[0]].esd.counts)


def test_a_tensorboard_callback_that_stands_after_it_gets_the_first_snapshot_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor, tensorboard = spectral_monitor(), TensorBoardCallback()
    train(tmp_path / "out", monitor, tensorboard)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list(tmp_path.glob("out/runs/*/events.out.tfevents*"))) == 1


@pytest.fixture
def train_with_wandb(tmp_path, read_wandb, monkeypatch):
    """A function: train into an offline run of its own, and read its rows."""
    wandb = pytest.importorskip("wandb", reason="wandb, the tracker, is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = wandb.Settings(console="off", x_disable_stats=True)

    def run(name, *callbacks, **arguments):
        (tmp_path / name).mkdir()
        wandb.init(mode="offline", dir=tmp_path / name, settings=settings)
        train(tmp_path, *callbacks, report_to="wandb", **arguments)
        wandb.finish()
        return read_wandb(tmp_path / name)["rows"]

    yield run
    wandb.finish()
    wandb.teardown()


def test_wandb_gets_every_scalar_over_the_step(train_with_wandb):
    monitor = spectral_monitor()
    rows = train_with_wandb("run", monitor)
    ours = {
        row["ww/step"]: {key: value for key, value in row.items() if key.startswith("train/ww")}
        for row in rows
        if "train/ww/alpha" in row
    }
    assert ours == prefixed(monitor)
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8]
    assert [row["ww/step"] for row in rows if "ww/layers/_type" in row] == list(ours)


@pytest.mark.parametrize(("how", "first"), [("at the epoch", "user first"), ("at the step", "monitor first")])
def test_no_row_that_the_user_logs_beside_the_trainers_own_is_lost(train_with_wandb, how, first):
    import wandb

    class User(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            wandb.log({"mine": state.global_step}, step=int(state.epoch) if "epoch" in how else state.global_step)

        on_train_begin = on_step_end

    def rows(name, *monitors):
        callbacks = [User(), *monitors] if first == "user first" else [*monitors, User()]
        return [row["mine"] for row in train_with_wandb(name, *callbacks, logging_steps=4) if "mine" in row]

    assert rows("with", spectral_monitor(1)) == rows("without") != []


def test_trackio_gets_every_scalar(tmp_path):
    pytest.importorskip("trackio", reason="trackio, the tracker, is not installed")
    done = run_python(str(HERE / "hf_trackio.py"), str(tmp_path), TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    ours = {
        row["train/global_step"]: {key: value for key, value in row.items() if key.startswith("train/ww")}
        for row in rows
        if "train/ww/alpha" in row
    }
    history = History.read(tmp_path / "ww_history.jsonl")
    assert list(ours) == steps_of(history) == [0, 2, 4]
    for snapshot, values in zip(history, published(history), strict=True):
        expected = {f"train/{key}": value for key, value in values.items()}
        assert ours[snapshot.step] == pytest.approx(expected, rel=1e-12)


def test_the_loss_log_is_the_same_entry_for_entry(tmp_path):
    with_it = train(tmp_path, spectral_monitor(1), eval_strategy="steps", eval_steps=4)
    without = train(tmp_path, eval_strategy="steps", eval_steps=4)

    def own(trainer):
        entries = [entry for entry in trainer.state.log_history if "ww/alpha" not in entry]
        return [
            {key: value for key, value in e.items() if "runtime" not in key and "second" not in key} for e in entries
        ]

    assert [entry["step"] for entry in own(without)] == [2, 4, 4, 6, 8, 8, 8]
    assert own(with_it) == own(without)
    for one, other in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


class MeansWithEveryLog(Trainer):
    """As TRL's trainers: running means of what `compute_loss` saw are flushed with every log."""

    seen: tuple[float, ...] = ()

    def compute_loss(self, model, inputs, **arguments):
        self.seen = (*self.seen, float(len(self.seen)))
        return super().compute_loss(model, inputs, **arguments)

    def log(self, logs, *arguments, **named):
        if self.seen:
            logs["mean"] = sum(self.seen) / len(self.seen)
        self.seen = ()
        super().log(logs, *arguments, **named)


def test_a_subclass_that_flushes_its_means_with_every_log_keeps_them(tmp_path):
    monitor = spectral_monitor(1)
    trainer = train(tmp_path, monitor, kind=MeansWithEveryLog, logging_steps=4)
    assert [entry["mean"] for entry in trainer.state.log_history if "loss" in entry] == [1.5, 1.5]
    assert seen_by(monitor) == list(range(9))


def test_the_console_shows_our_lines_and_not_every_value(tmp_path, capsys):
    train(tmp_path, spectral_monitor(console=True), max_steps=4, model=make_model(trap=True))
    out = capsys.readouterr().out
    assert f"trap at step 0: {MLPS[0]}" in out
    assert "2 snapshots, steps 0 to 4" in out
    assert "ww/alpha" not in out
    assert "'loss'" in out


def test_the_progress_bar_stays_whole(tmp_path, capsys):
    train(tmp_path, spectral_monitor(console=True), max_steps=4, disable_tqdm=False)
    captured = capsys.readouterr()
    line = next(line for line in captured.out.splitlines() if "ww_monitor: watching" in line)
    assert line.startswith("ww_monitor: watching 2 matrices")
    assert "4/4" in captured.err


def test_a_callback_that_raises_costs_itself_only(tmp_path):
    class Broken(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "ww/alpha" in logs:
                raise OSError(28, "No space left on device")

    monitor, watch = spectral_monitor(2), Watch()
    with pytest.warns(SpectralWarning, match="callback Broken failed: OSError.*No space left") as caught:
        trainer = train(tmp_path, Broken(), monitor, watch)
    assert len([warning for warning in caught if warning.category is SpectralWarning]) == 1
    assert trainer.state.global_step == 8
    assert len([logs for logs in watch.logs if "ww/alpha" in logs]) == 5


def test_what_reaches_the_state_can_be_saved_as_json(tmp_path):
    trainer = train(tmp_path, spectral_monitor(), eval_strategy="epoch", save_strategy="epoch")
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text(), parse_constant=pytest.fail)
    assert saved["log_history"] == trainer.state.log_history[: len(saved["log_history"])]
    assert [entry["step"] for entry in saved["log_history"] if "ww/alpha" in entry] == [0, 4, 8]


# --- steps


def test_under_gradient_accumulation_a_step_is_an_optimizer_step(tmp_path):
    monitor = spectral_monitor(1)
    trainer = train(tmp_path, monitor, gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=2)
    assert seen_by(monitor) == [0, 1, 2, 3, 4, 5, 6]
    assert trainer.state.global_step == 6


def test_every_n_epochs_looks_at_the_end_of_every_nth_epoch(tmp_path):
    monitor = spectral_monitor(None, every_n_epochs=2)
    train(tmp_path, monitor, max_steps=-1, num_train_epochs=5)
    assert seen_by(monitor) == [0, 16, 32, 40]
    assert [snapshot.epoch for snapshot in monitor.monitor.history] == [0, 1, 3, 4]


class StopsAt(TrainerCallback):
    """Asks for the end of the run in one of the hooks."""

    def __init__(self, hook: str, step: int) -> None:
        setattr(self, hook, lambda args, state, control, **kwargs: self.ask(state, control, step))

    def ask(self, state, control, step):
        if state.global_step >= step:
            control.should_training_stop = True


@pytest.mark.parametrize(
    ("hook", "step"), [("on_step_end", 3), ("on_evaluate", 2), ("on_epoch_end", 8), ("on_save", 8)]
)
def test_whoever_ends_the_run_the_last_weights_are_seen_and_reach_the_trackers(tmp_path, hook, step):
    """Also where the best model, of another step, is loaded at the end."""
    monitor, watch = spectral_monitor(100), Watch()
    strategy = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    if step == 8:
        strategy = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = train(tmp_path, monitor, StopsAt(hook, step), watch, max_steps=16, report_to="tensorboard", **strategy)
    assert trainer.state.global_step == step
    assert seen_by(monitor) == [0, step]
    assert len([logs for logs in watch.logs if "ww/alpha" in logs]) == 2
    assert len(list(tmp_path.glob("**/events.out.tfevents*"))) == 1


# --- best models and stopping


WATCHING = {
    "metric_for_best_model": "ww_alpha",
    "greater_is_better": False,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "learning_rate": 1e-2,
}


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_checkpoint_is_the_one_whose_own_weights_have_the_best_value(tmp_path, strategy):
    monitor = spectral_monitor(8)
    trainer = train(tmp_path, monitor, load_best_model_at_end=True, save_strategy=strategy, **WATCHING)
    assert seen_by(monitor) == [0, 2, 4, 6, 8]
    alphas = {snapshot.step: snapshot.summary["alpha"] for snapshot in monitor.monitor.history if snapshot.step}
    best = min(alphas, key=alphas.get)
    assert trainer.state.best_metric == alphas[best]
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"


def test_early_stopping_and_best_models_see_our_values(tmp_path):
    watching = {**WATCHING, "metric_for_best_model": "ww_num_traps", "learning_rate": 0.0}
    monitor = spectral_monitor()
    trainer = train(
        tmp_path, monitor, EarlyStoppingCallback(1), load_best_model_at_end=True, save_strategy="best", **watching
    )
    assert trainer.state.best_metric == 0.0
    assert trainer.state.global_step == 4


def test_a_warning_says_that_early_stopping_stands_before_it(tmp_path):
    with pytest.warns(
        SpectralWarning, match="EarlyStoppingCallback stands before .* cannot see eval_ww_alpha; put it after"
    ):
        trainer = train(tmp_path, EarlyStoppingCallback(1), spectral_monitor(), **WATCHING)
    assert trainer.state.global_step == 8


def test_early_stopping_on_another_metric_may_stand_anywhere(tmp_path):
    watching = {**WATCHING, "metric_for_best_model": "loss", "learning_rate": 1e-4}
    assert train(tmp_path, EarlyStoppingCallback(9), spectral_monitor(), **watching).state.global_step == 8


def test_the_last_evaluation_and_the_last_checkpoint_have_the_values_of_the_last_step(tmp_path):
    monitor, watch = spectral_monitor(100), Watch()
    train(tmp_path, monitor, watch, eval_strategy="steps", eval_steps=8, save_strategy="steps", save_steps=8)
    assert seen_by(monitor) == [0, 8]
    assert watch.evaluations[-1]["eval_ww_alpha"] == monitor.monitor.history.last.summary["alpha"]
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in saved["log_history"] if "ww/alpha" in entry] == [0, 8]


def test_an_evaluation_has_the_latest_model_level_values(tmp_path):
    monitor, watch = spectral_monitor(), Watch()
    train(tmp_path, monitor, watch, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    assert seen_by(monitor) == [0, 4, 8]
    first, second, last = (snapshot.summary["alpha"] for snapshot in monitor.monitor.history)
    assert [values["eval_ww_alpha"] for values in watch.evaluations] == [first, first, second, second, last]
    assert not any(key.startswith("eval_ww_") and "/" in key for key in watch.evaluations[0])


class Searching(TrainerCallback):
    """A hyperparameter search, as far as a callback can tell."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.is_hyper_param_search = True


@pytest.mark.parametrize(("watched", "ours"), [("loss", set()), ("ww_alpha", {"eval_ww_alpha"})])
def test_the_objective_of_a_hyperparameter_search_is_left_alone(tmp_path, watched, ours):
    """It is the sum of all metrics, unless the user says otherwise."""
    watch = Watch()
    train(tmp_path, Searching(), spectral_monitor(), watch, **{**WATCHING, "metric_for_best_model": watched})
    assert [{key for key in values if "ww" in key} for values in watch.evaluations] == [ours] * 4


def test_an_evaluation_after_the_run_is_left_alone(tmp_path):
    trainer = train(tmp_path, spectral_monitor())
    assert not any("ww" in key for key in trainer.evaluate())


@pytest.mark.parametrize("greater", [True, False])
def test_a_watched_value_that_is_not_known_counts_as_the_worst(tmp_path, greater):
    model = make_model()
    for layer in (model.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_proj):
        torch.nn.init.constant_(layer.weight, 0.0)
        layer.weight.requires_grad_(False)
    watch, watching = Watch(), {**WATCHING, "greater_is_better": greater, "save_strategy": "best"}
    with pytest.warns(SpectralWarning, match="ww_alpha is not known .* counts as the worst"):
        trainer = train(tmp_path, spectral_monitor(), watch, model=model, **watching)
    assert trainer.state.global_step == 8
    assert not list(tmp_path.glob("checkpoint-*"))
    values = [value for metrics in (*watch.logs, *watch.evaluations) for value in metrics.values()]
    assert not any(math.isnan(value) for value in values)


def test_a_metric_that_does_not_exist_is_refused_by_the_trainer(tmp_path):
    with pytest.raises(KeyError, match=r"eval_ww_alfa.*eval_ww_alpha"):
        train(tmp_path, spectral_monitor(), **{**WATCHING, "metric_for_best_model": "ww_alfa"})


@pytest.mark.parametrize(
    ("arguments", "stops_at"),
    [
        ({"patience": 3}, 4),
        ({"patience": 1}, 1),
        ({"patience": 100}, 8),
        ({"patience": 1, "stop_on": None}, 8),
        ({"patience": 1, "exclude": ["*c_fc"]}, 8),
    ],
)
def test_stop_on_traps_stops_after_patience_snapshots(tmp_path, capsys, arguments, stops_at):
    monitor = spectral_monitor(2, **{"stop_on": "traps", "console": True, **arguments})
    trainer = train(tmp_path, monitor, model=make_model(trap=True), gradient_accumulation_steps=2)
    assert trainer.state.global_step == stops_at
    assert monitor.monitor.last_step == stops_at
    assert capsys.readouterr().out.count(f"ww_monitor: stopping at step {stops_at}: traps in") == (stops_at < 8)


# --- runs that go on, or end early


@pytest.mark.parametrize("restore", [True, False])
def test_a_resumed_run_goes_on_where_the_first_ended(tmp_path, restore):
    whole = train(tmp_path / "whole", spectral_monitor(2), model=make_model(trap=True))
    folder = tmp_path / "cut"
    train(folder, spectral_monitor(2), model=make_model(trap=True), save_strategy="steps", save_steps=3)
    monitor = spectral_monitor(2, stop_on="traps", patience=100)
    arguments = {"restore_callback_states_from_checkpoint": restore, "save_strategy": "steps", "save_steps": 3}
    trainer = train(folder, monitor, resume=str(folder / "checkpoint-3"), model=make_model(trap=True), **arguments)
    assert monitor in trainer.callback_handler.callbacks
    assert [path.name for path in folder.glob("ww_*")] == ["ww_history.jsonl"]
    assert seen_by(monitor) == [0, 2, 3, 4, 6, 8]
    assert entries_of(trainer)[8] == entries_of(whole)[8]
    read = History.read(folder / "ww_history.jsonl")
    assert [(finding.step, finding.rule) for finding in read.findings if finding.rule == "trap"] == [(0, "trap")]


@pytest.mark.parametrize(("saving", "made"), [({}, 0), ({"save_strategy": "steps", "save_steps": 4}, 2)])
def test_a_state_is_made_where_a_checkpoint_is_written_and_nowhere_else(tmp_path, monkeypatch, saving, made):
    states = []
    monitor = spectral_monitor(1)
    state_dict = monitor.monitor.state_dict
    monkeypatch.setattr(monitor.monitor, "state_dict", lambda: states.append(state_dict()) or states[-1])
    trainer = train(tmp_path, monitor, **saving)
    assert seen_by(monitor) == list(range(9))
    assert [state["last_step"] for state in states] == [4, 8][:made]
    for step, state in zip((4, 8), states, strict=False):
        saved = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        (mine,) = (value for key, value in saved["stateful_callbacks"].items() if key.startswith("ww_monitor"))
        assert mine == {"args": {}, "attributes": {**state, "history_file": "ww_history.jsonl"}}
    kept = trainer.state.stateful_callbacks[monitor._key]
    assert kept == copy.deepcopy(kept) == pickle.loads(pickle.dumps(kept)) == dict(kept)
    assert list(kept) == ["args", "attributes"]


def test_a_state_that_cannot_be_made_costs_itself_only(tmp_path, monkeypatch):
    monitor = spectral_monitor(2)
    monkeypatch.setattr(monitor.monitor, "state_dict", lambda: 1 / 0)
    with pytest.warns(SpectralWarning, match="state for the checkpoint failed: ZeroDivisionError"):
        trainer = train(tmp_path, monitor, save_strategy="steps", save_steps=4)
    assert trainer.state.global_step == 8
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_the_patience_count_goes_on(tmp_path):
    def monitor() -> SpectralMonitor:
        return spectral_monitor(2, stop_on="traps", patience=5)

    saving = {"save_strategy": "steps", "save_steps": 4}
    first = train(tmp_path, monitor(), model=make_model(trap=True), max_steps=4, **saving)
    second = monitor()
    trainer = train(tmp_path, second, resume=True, model=make_model(trap=True), max_steps=16, **saving)
    assert (first.state.global_step, trainer.state.global_step) == (4, 8)


@pytest.mark.parametrize("restore", [True, False])
def test_a_checkpoint_from_before_the_monitor_resumes_and_saves(tmp_path, restore):
    saving = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": restore}
    train(tmp_path, max_steps=4, **saving)
    monitor = spectral_monitor(2)
    train(tmp_path, monitor, resume=True, **saving)
    assert seen_by(monitor) == [4, 6, 8]
    again = spectral_monitor(2)
    train(tmp_path, again, resume=True, max_steps=12, **saving)
    assert seen_by(again) == [4, 6, 8, 10, 12]


def test_a_checkpoint_with_the_monitor_resumes_without_it(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True}
    train(tmp_path, spectral_monitor(2), max_steps=4, **saving)
    assert train(tmp_path, resume=True, **saving).state.global_step == 8


def test_a_state_that_cannot_be_read_costs_the_past_only(tmp_path):
    train(tmp_path, spectral_monitor(2), max_steps=4, save_strategy="steps", save_steps=4)
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    content = json.loads(path.read_text())
    for key in content["stateful_callbacks"]:
        if "ww_monitor" in key:
            content["stateful_callbacks"][key] = {"args": {}, "attributes": {"last_step": 4}}
    path.write_text(json.dumps(content))
    monitor = spectral_monitor(2)
    with pytest.warns(SpectralWarning, match="resume failed: KeyError"):
        train(tmp_path, monitor, resume=True)
    assert seen_by(monitor) == [4, 6, 8]


def test_train_called_twice_is_two_runs(tmp_path):
    """The Trainer counts from 0 again."""
    monitor = spectral_monitor()
    trainer = make_trainer(tmp_path, monitor)
    trainer.train()
    trainer.train()
    assert seen_by(monitor) == [0, 4, 8]
    assert [steps_of(History.read(path)) for path in sorted(tmp_path.glob("ww_*"))] == [[0, 4, 8]] * 2


def test_train_called_again_from_the_last_checkpoint_is_one_run(tmp_path):
    monitor = spectral_monitor()
    trainer = make_trainer(tmp_path, monitor, save_strategy="steps", save_steps=8)
    trainer.train()
    trainer.args.max_steps = 12
    trainer.train(resume_from_checkpoint=True)
    assert [steps_of(History.read(path)) for path in tmp_path.glob("ww_*")] == [[0, 4, 8, 12]]


class Dies(TrainerCallback):
    def __init__(self, error: type[BaseException]) -> None:
        self.error: type[BaseException] | None = error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5 and self.error:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_a_run_that_died_the_next_one_begins_with_nothing_left_open(tmp_path, error):
    sink = Memory()
    monitor = spectral_monitor(2, sinks=[sink])
    trainer = make_trainer(tmp_path, monitor, Dies(error))
    with pytest.raises(error):
        trainer.train()
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0, 2, 4]
    trainer.train()
    assert monitor.monitor.sinks == [sink]
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0, 2, 4]
    assert steps_of(History.read(tmp_path / "ww_history-1.jsonl")) == [0, 2, 4, 6, 8]


def test_after_a_run_that_died_the_sinks_are_closed_with_the_callback(tmp_path):
    sink = Memory()
    trainer = make_trainer(tmp_path, spectral_monitor(2, sinks=[sink]), Dies(RuntimeError))
    with pytest.raises(RuntimeError) as caught:
        trainer.train()
    assert not sink.closed
    del trainer, caught
    gc.collect()
    assert sink.closed


# --- models, processes


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_a_peft_model_is_watched_by_base_and_delta(tmp_path):
    peft = pytest.importorskip("peft", reason="peft, which makes LoRA models, is not installed")
    model = make_model()
    config = peft.LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    monitor = spectral_monitor(min_size=4)
    trainer = train(tmp_path, monitor, model=peft.get_peft_model(model, config), learning_rate=1e-2)
    first, *_, last = monitor.monitor.history
    changed = {
        layer.name: layer.value("stable_rank") != last[layer.name].value("stable_rank") for layer in first.layers
    }
    prefix = f"base_model.model.{MLPS[0]}"
    assert changed == {prefix: False, f"{prefix}.lora[default]": True, f"base_model.model.{MLPS[1]}": False}
    assert list(entries_of(trainer)) == [0, 4, 8]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute"
)  # its own
def test_names_of_a_compiled_model_are_clean(tmp_path):
    monitor = spectral_monitor()
    trainer = train(tmp_path, monitor, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    assert trainer.model_wrapped is not trainer.model
    assert monitor.monitor.history.layer_names == MLPS


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Path:
    """The folder of runs with two processes."""

    def run(folder):
        done = run_python("-m", "tests.callbacks.hf_ddp", str(folder), folder=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ww_monitor: watching") == 4

    return once(tmp_path_factory, "huggingface_ddp", run)


@pytest.mark.parametrize(
    ("what", "step", "traps", "history"),
    [
        ("early_stopping", 6, 4, [0, 2, 4, 6]),
        ("stop_on", 2, 2, [0, 2]),
        ("resume", 8, 5, [0, 2, 4, 6, 8]),
    ],
)
def test_two_processes_agree_and_write_once(processes, what, step, traps, history):
    ranks = [json.loads((processes / what / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["step"] for rank in ranks] == [step] * 2
    assert [rank["traps"] for rank in ranks] == [[1.0] * traps] * 2
    assert ranks[0]["log calls"] == ranks[1]["log calls"]
    assert ranks[0]["best"] == ranks[1]["best"] == (1.0 if what == "early_stopping" else None)
    (path,) = (processes / what).glob("ww_history*")
    assert steps_of(History.read(path)) == history
    runs = 2 if what == "resume" else 1
    assert len(list((processes / what).glob("runs/*/events.out.tfevents*"))) == runs


def test_two_processes_end_with_the_weights_of_a_run_without_it(processes):
    weights = [json.loads((processes / what / "rank0.json").read_text())["weights"] for what in ("without", "resume")]
    assert weights[0] == weights[1]

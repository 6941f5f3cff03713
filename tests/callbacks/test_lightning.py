"""SpectralMonitor in real Trainers: what is logged where, who may stop, and what a run that dies leaves behind."""

from __future__ import annotations

import copy
import csv
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.histories import published, steps_of
from tests.processes import once, run_in_forks, run_python
from ww_monitor import History, InvalidArgument, Options, SpectralWarning, rules
from ww_monitor.sinks.memory import Memory

pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning, the framework, is not installed")

from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402 - needs pytorch_lightning
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger  # noqa: E402

from ww_monitor.callbacks.lightning import SpectralMonitor  # noqa: E402

ROOT = Path(__file__).parents[2]


class Module(pl.LightningModule):
    """8 batches of 8 an epoch; the learning rate leaves a planted trap where it is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def loader(batches: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    size = 8 * batches
    return DataLoader(TensorDataset(torch.randn(size, 24, generator=generator), torch.arange(size) % 10), batch_size=8)


def make_trainer(folder: Path, callbacks, **arguments) -> pl.Trainer:
    quiet = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=callbacks, **{**quiet, **arguments})


def fit(folder: Path, net: nn.Module, *callbacks, ckpt_path=None, module=Module, **arguments) -> pl.Trainer:
    trainer = make_trainer(folder, list(callbacks), **arguments)
    trainer.fit(module(net), loader(), loader(1) if module is Validated else None, ckpt_path=ckpt_path)
    return trainer


def spectral_monitor(every_n_steps: int | None = 4, **arguments) -> SpectralMonitor:
    return SpectralMonitor(every_n_steps, **{"console": False, **arguments})


def transitions_of(history: History) -> list[tuple[int | None, str, str, str]]:
    return [(finding.step, finding.rule, finding.layer, finding.state) for finding in history.findings]


def of_rule(history: History, rule: str) -> list[tuple[int | None, str, str]]:
    return [(step, layer, state) for step, name, layer, state in transitions_of(history) if name == rule]


def read_csv(logger: CSVLogger) -> list[dict[str, float]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def expected_rows(history: History) -> dict[int, dict[str, float]]:
    """Lightning's logging step (the index of the batch that stepped, from 0) → the scalars of that snapshot."""
    return {max(0, one.step - 1): values for one, values in zip(history, published(history), strict=True)}


# --- what is logged, and where


def test_it_looks_before_the_first_step_where_due_and_after_the_last(tmp_path, net):
    monitor = spectral_monitor(3)
    fit(tmp_path, net, monitor)
    assert steps_of(monitor.monitor.history) == [0, 3, 6, 8]
    assert [layer.name for layer in monitor.monitor.history.last.layers] == ["net.0", "net.2", "net.4"]
    assert {snapshot.epoch for snapshot in list(monitor.monitor.history)[:-1]} == {0}


def test_tensorboard_gets_scalars_and_histograms_in_the_trainers_own_file(tmp_path, net):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = spectral_monitor()
    trainer = fit(tmp_path, net, monitor, logger=TensorBoardLogger(tmp_path))
    folder = Path(trainer.logger.log_dir)
    assert len(list(tmp_path.glob("**/events.out.tfevents*"))) == 1
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    expected = expected_rows(monitor.monitor.history)
    assert list(expected) == [0, 3, 7]
    assert set(events.Tags()["scalars"]) >= {"ww/alpha", "ww_alpha/net.0", "ww_num_traps/net.4"}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("ww") and not tag.startswith("ww_band/"):
            known = {x: values[tag] for x, values in expected.items() if tag in values}
            assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(known, rel=1e-6)
    assert [event.value for event in events.Scalars("ww_band/alpha_high")] == [6.0] * 3
    assert events.Tags()["histograms"] == ["ww_esd/net.0", "ww_esd/net.2", "ww_esd/net.4"]
    histograms = events.Histograms("ww_esd/net.2")
    assert [event.step for event in histograms] == [0, 3, 7]
    for event, snapshot in zip(histograms, monitor.monitor.history, strict=True):
        esd = snapshot["net.2"].esd
        assert event.histogram_value.bucket == list(esd.counts)
        assert event.histogram_value.bucket_limit == list(esd.edges[1:])


def test_csv_gets_every_scalar_at_the_step_of_its_batch(tmp_path, net):
    monitor = spectral_monitor()
    trainer = fit(tmp_path, net, monitor, logger=CSVLogger(tmp_path))
    rows = read_csv(trainer.logger)
    expected = expected_rows(monitor.monitor.history)
    assert [int(row.pop("step")) for row in rows] == list(expected)
    assert rows == list(expected.values())


@pytest.fixture
def wandb_logger(tmp_path, monkeypatch):
    """A function: an offline logger with a folder of its own; its runs end with the test."""
    wandb = pytest.importorskip("wandb", reason="wandb, the tracker, is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = wandb.Settings(console="off", x_disable_stats=True)
    yield lambda name, **given: WandbLogger(save_dir=tmp_path / name, offline=True, settings=settings, **given)
    wandb.finish()
    wandb.teardown()


def test_wandb_gets_every_scalar_over_the_step(tmp_path, net, read_wandb, wandb_logger):
    monitor, logger = spectral_monitor(), wandb_logger("run")
    fit(tmp_path, net, monitor, logger=logger)
    logger.experiment.finish()
    written = read_wandb(tmp_path / "run")
    media = ("ww_esd/", "ww/layers/", "ww/alpha_map/")
    ours = {row["ww/step"]: row for row in written["rows"] if "ww/step" in row}
    for step, values in zip(ours, published(monitor.monitor.history), strict=True):
        found = {key: ours[step][key] for key in ours[step] if key.startswith("ww") and not key.startswith(media)}
        assert found == {**values, "ww/step": step}
        assert ours[step]["ww/layers/_type"] == "table-file"
        assert "ww_esd/net.0/_type" in ours[step]
    assert list(ours) == steps_of(monitor.monitor.history)
    assert {("*", "trainer/global_step"), ("ww/alpha", "ww/step"), ("ww_esd/net.0", "ww/step")} < set(written["steps"])


def test_the_prefix_of_a_wandb_logger_stands_before_our_values(tmp_path, net, read_wandb, wandb_logger):
    logger = wandb_logger("run", prefix="exp")
    fit(tmp_path, net, spectral_monitor(), logger=logger)
    logger.experiment.finish()
    assert any("exp-ww/alpha" in row for row in read_wandb(tmp_path / "run")["rows"])


HOWS = {
    "at the epoch": lambda run, epoch, step: run.log({"mine": step}, step=epoch),
    "at the step": lambda run, epoch, step: run.log({"mine": step}, step=step),
    "in turn": lambda run, epoch, step: run.log({"mine": step}),
    "without commit": lambda run, epoch, step: run.log({f"mine {step}": step}, commit=False),
}


@pytest.mark.parametrize(
    ("hook", "how", "first"),
    [
        ("on_train_batch_end", "at the epoch", "user first"),
        ("on_train_batch_end", "at the step", "monitor first"),
        ("on_train_batch_end", "without commit", "monitor first"),
        ("on_train_epoch_end", "at the epoch", "monitor first"),
        ("on_train_epoch_end", "in turn", "user first"),
    ],
)
def test_no_row_that_the_user_logs_beside_a_wandb_logger_is_lost(
    tmp_path, net, read_wandb, wandb_logger, hook, how, first
):
    def log(self, trainer, *arguments):
        HOWS[how](trainer.logger.experiment, trainer.current_epoch, trainer.global_step)

    user = type("User", (pl.Callback,), {"on_train_start": log, hook: log})()
    rows = {}
    for name in ("without", "with"):
        monitors = [spectral_monitor(1)] * (name == "with")
        logger = wandb_logger(name)
        callbacks = [user, *monitors] if first == "user first" else [*monitors, user]
        fit(tmp_path, copy.deepcopy(net), *callbacks, logger=logger, max_epochs=3, limit_train_batches=3)
        logger.experiment.finish()
        rows[name] = read_wandb(tmp_path / name)["rows"]
    mine = {name: [{k: v for k, v in row.items() if k.startswith("mine")} for row in rows[name]] for name in rows}
    assert [row for row in mine["with"] if row] == [row for row in mine["without"] if row]
    assert len({row["ww/step"] for row in rows["with"] if "ww/step" in row}) == 10


def test_histograms_and_pictures_of_two_monitors_have_keys_of_their_own(tmp_path, net):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, net, spectral_monitor(), spectral_monitor(prefix="again/"), logger=logger)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    for kind in ("scalars", "histograms", "images", "tensors"):
        ours = {tag for tag in tags[kind] if tag.startswith(("ww", "again/"))}
        assert {tag.removeprefix("again/") for tag in ours} == {tag for tag in ours if not tag.startswith("again/")}
        assert len(ours) == 2 * len({tag.removeprefix("again/") for tag in ours}) > 0


def test_several_loggers_get_the_same(tmp_path, net):
    monitor = spectral_monitor()
    loggers = [CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="b")]
    fit(tmp_path, net, monitor, logger=loggers)
    assert read_csv(loggers[0]) == read_csv(loggers[2])
    assert len(read_csv(loggers[0])) == 3
    assert list(Path(loggers[1].log_dir).glob("events*"))


def test_without_a_logger_the_history_file_is_in_the_root_folder(tmp_path, net):
    monitor = spectral_monitor()
    fit(tmp_path, net, monitor)
    history = History.read(tmp_path / "ww_history.jsonl")
    assert [snapshot.to_json() for snapshot in history] == [s.to_json() for s in monitor.monitor.history]


def test_with_a_logger_the_history_file_is_in_its_folder(tmp_path, net):
    trainer = fit(tmp_path, net, spectral_monitor(), logger=CSVLogger(tmp_path))
    assert [path.parent for path in tmp_path.glob("**/ww_history*")] == [Path(trainer.logger.log_dir)]


def test_no_history_file_where_none_is_wanted(tmp_path, net):
    fit(tmp_path, net, spectral_monitor(history=False))
    assert list(tmp_path.glob("**/*ww*")) == []


def test_fast_dev_run_looks_once_around_its_step_and_writes_nothing(tmp_path, net):
    monitor = spectral_monitor()
    fit(tmp_path, net, monitor, fast_dev_run=True, logger=True)
    assert steps_of(monitor.monitor.history) == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_a_barebones_trainer_is_watched_too(tmp_path, net):
    monitor = spectral_monitor()
    trainer = pl.Trainer(callbacks=[monitor], barebones=True, accelerator="cpu", max_steps=8, default_root_dir=tmp_path)
    trainer.fit(Module(net), loader())
    assert steps_of(monitor.monitor.history) == [0, 4, 8]


def test_further_sinks_get_what_the_loggers_get_and_are_closed(tmp_path, net):
    sink = Memory()
    monitor = spectral_monitor(sinks=[sink])
    fit(tmp_path, net, monitor)
    assert sink.history.snapshots == monitor.monitor.history.snapshots
    assert sink.closed


# --- steps


def test_under_gradient_accumulation_a_step_counts_once(tmp_path, net):
    monitor = spectral_monitor(2)
    trainer = fit(tmp_path, net, monitor, accumulate_grad_batches=2, max_epochs=2, logger=CSVLogger(tmp_path))
    assert steps_of(monitor.monitor.history) == [0, 2, 4, 6, 8]
    assert [row["step"] for row in read_csv(trainer.logger)] == [0, 1, 3, 5, 7]


def test_every_step_is_seen_once_under_accumulation(tmp_path, net):
    monitor = spectral_monitor(1)
    fit(tmp_path, net, monitor, accumulate_grad_batches=3)
    assert steps_of(monitor.monitor.history) == [0, 1, 2, 3]


class TwoOptimizers(Module):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[index].parameters(), lr=1e-3) for index in (0, 2)]


def test_with_two_optimizers_no_multiple_is_jumped_over(tmp_path, net):
    monitor = spectral_monitor(3)
    trainer = fit(tmp_path, net, monitor, module=TwoOptimizers, logger=CSVLogger(tmp_path))
    assert trainer.global_step == 16
    assert steps_of(monitor.monitor.history) == [0, 4, 6, 10, 12, 16]
    assert [row["step"] for row in read_csv(trainer.logger)] == [0, 1, 2, 4, 5, 7]


def test_every_n_epochs_looks_at_the_end_of_every_nth_epoch(tmp_path, net):
    monitor = spectral_monitor(None, every_n_epochs=2)
    trainer = fit(tmp_path, net, monitor, max_epochs=4, logger=CSVLogger(tmp_path))
    assert steps_of(monitor.monitor.history) == [0, 16, 32]
    assert [row["step"] for row in read_csv(trainer.logger)] == [0, 15, 31]
    assert [snapshot.epoch for snapshot in monitor.monitor.history] == [0, 1, 3]


# --- other callbacks


class Watch(pl.Callback):
    """Remembers what the Trainer shows after each batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.bar: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.bar.append(dict(trainer.progress_bar_metrics))


def test_callback_metrics_hold_the_latest_model_level_values_from_the_first_batch_on(tmp_path, net):
    monitor, watch = spectral_monitor(), Watch()
    fit(tmp_path, net, monitor, watch)
    first, second, last = (snapshot.scalars(layers=False) for snapshot in monitor.monitor.history)
    assert set(first) >= {"ww/alpha", "ww/num_traps", "ww/trap_headroom"}
    for seen, known in zip(watch.metrics, [first] * 3 + [second] * 4 + [last], strict=True):
        assert {key: value for key, value in seen.items() if key in known} == pytest.approx(known, rel=1e-6)


def test_the_progress_bar_shows_the_latest_alpha(tmp_path, net):
    monitor, watch = spectral_monitor(), Watch()
    fit(tmp_path, net, monitor, watch)
    alphas = [snapshot.summary["alpha"] for snapshot in monitor.monitor.history]
    assert ["ww_alpha" in bar for bar in watch.bar] == [False] * 3 + [True] * 5
    assert [bar["ww_alpha"] for bar in watch.bar[3:]] == pytest.approx([alphas[1]] * 4 + [alphas[2]], rel=1e-6)


@pytest.mark.parametrize("bar", [pl.callbacks.TQDMProgressBar, pl.callbacks.RichProgressBar])
def test_console_lines_and_progress_bar_go_together(tmp_path, net_with_trap, capsys, bar):
    monitor = SpectralMonitor(4, stop_on="traps", patience=2)
    fit(tmp_path, net_with_trap, monitor, bar(), enable_progress_bar=True)
    shown = capsys.readouterr()
    text = " ".join((shown.out + shown.err).split())
    assert "ww_alpha" in text
    assert "ww_monitor: watching 3 matrices, 0 skipped" in text
    assert "every 4 steps" in text
    assert "ww_monitor ‼ trap at step 0: net.2: 1 correlation trap a shuffle" in text
    assert "ww_monitor: stopping at step 4: traps in 2 snapshots in a row" in text
    assert "2 snapshots, steps 0 to 4" in text


def test_without_console_nothing_is_printed(tmp_path, net_with_trap, capsys):
    fit(tmp_path, net_with_trap, spectral_monitor(stop_on="traps", patience=2))
    assert "ww_monitor" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("stopping", "val", "arguments", "stops_at"),
    [
        ({"monitor": "ww/num_traps", "mode": "max", "stopping_threshold": 0.5}, False, {}, 8),
        ({"monitor": "ww/alpha", "mode": "min", "stopping_threshold": 1e6}, False, {}, 8),
        ({"monitor": "ww/num_traps", "mode": "min", "patience": 2}, False, {}, 24),
        (
            {"monitor": "ww/alpha", "mode": "max", "stopping_threshold": 0.0, "check_on_train_epoch_end": False},
            True,
            {},
            8,
        ),
        ({"monitor": "ww/num_traps", "mode": "max", "stopping_threshold": 0.5}, True, {"val_check_interval": 3}, 3),
        ({"monitor": "ww/num_traps", "mode": "max", "patience": 100}, True, {"val_check_interval": 3}, 40),
    ],
)
@pytest.mark.parametrize("first", ["monitor first", "stopping first"])
def test_early_stopping_works_on_our_keys(tmp_path, net_with_trap, stopping, val, arguments, stops_at, first):
    callbacks = [spectral_monitor(100), EarlyStopping(**stopping)]
    callbacks = callbacks if first == "monitor first" else callbacks[::-1]
    trainer = fit(tmp_path, net_with_trap, *callbacks, module=Validated if val else Module, max_epochs=5, **arguments)
    assert trainer.global_step == stops_at


def test_model_checkpoint_sees_the_value_of_its_own_step(tmp_path, net):
    monitor = spectral_monitor(2)
    checkpoint = ModelCheckpoint(
        tmp_path,
        monitor="ww/alpha",
        filename="{step}-{ww/alpha:.5f}",
        auto_insert_metric_name=False,
        every_n_train_steps=4,
        save_top_k=-1,
    )
    fit(tmp_path, net, checkpoint, monitor, enable_checkpointing=True)
    alphas = {snapshot.step: snapshot.summary["alpha"] for snapshot in monitor.monitor.history}
    assert sorted(path.stem for path in tmp_path.glob("*.ckpt")) == [f"{step}-{alphas[step]:.5f}" for step in (4, 8)]


def test_a_metric_that_is_not_known_is_never_published(tmp_path, net):
    for layer in (net[0], net[2], net[4]):
        nn.init.constant_(layer.weight, 0.0)
    watch = Watch()
    fit(tmp_path, net, spectral_monitor(), watch)
    assert "ww/alpha" not in watch.metrics[0]
    assert "ww/stable_rank" not in watch.metrics[0]
    assert all(math.isfinite(value) for metrics in watch.metrics for value in metrics.values())


# --- stopping


@pytest.mark.parametrize(
    ("arguments", "trainer_arguments", "stops_at"),
    [
        ({"patience": 3}, {}, 4),
        ({"patience": 1}, {}, 0),
        ({"patience": 3}, {"min_steps": 11}, 11),
        ({"patience": 3}, {"min_epochs": 2}, 16),
        ({"patience": 100}, {}, 24),
        ({"patience": 1, "stop_on": "broken_layers"}, {}, 24),
        ({"patience": 1, "stop_on": None}, {}, 24),
        ({"patience": 1, "exclude": ["net.2"]}, {}, 24),
    ],
)
def test_stop_on_traps_stops_after_patience_snapshots(tmp_path, net_with_trap, arguments, trainer_arguments, stops_at):
    monitor = spectral_monitor(2, **{"stop_on": "traps", **arguments})
    trainer = fit(tmp_path, net_with_trap, monitor, max_epochs=3, **trainer_arguments)
    assert trainer.global_step == stops_at


def test_the_reason_for_the_stop_is_said_once_and_kept(tmp_path, net_with_trap, capsys):
    monitor = SpectralMonitor(2, stop_on="traps", patience=2)
    fit(tmp_path, net_with_trap, monitor, min_steps=7)
    out = capsys.readouterr().out
    assert out.count("ww_monitor: stopping at step 2: traps in 2 snapshots in a row: net.2: ") == 1
    assert out.count("stopping") == 1
    assert monitor.monitor.stop_reason.startswith("traps in 5 snapshots in a row: net.2: ")


# --- runs that end early, go on, or begin anew


def resume(folder: Path, net, monitor, checkpoint, **arguments) -> pl.Trainer:
    return fit(folder, net, monitor, ckpt_path=checkpoint, max_epochs=-1, max_steps=8, **arguments)


def test_a_resumed_run_goes_on_where_the_first_ended(tmp_path, net_with_trap, make_trap_net):
    whole = spectral_monitor(2)
    fit(tmp_path / "whole", net_with_trap, whole, max_steps=8)
    first, second = spectral_monitor(2), spectral_monitor(2)
    fit(tmp_path / "cut", make_trap_net(), first, max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    resume(tmp_path / "cut", make_trap_net(), second, tmp_path / "4.ckpt")
    assert [path.name for path in (tmp_path / "cut").glob("ww_*")] == ["ww_history.jsonl"]
    read = History.read(tmp_path / "cut" / "ww_history.jsonl")
    assert steps_of(read) == steps_of(whole.monitor.history) == [0, 2, 4, 6, 8]
    for one, other in zip(list(read)[:3], whole.monitor.history, strict=False):
        assert one.scalars() == other.scalars()
    assert transitions_of(read) == transitions_of(whole.monitor.history)
    assert of_rule(read, "trap") == [(0, "net.2", "begin")]
    assert of_rule(read, "under_trained") == [(4, "net.0", "begin")]
    assert steps_of(second.monitor.history) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("weights_only", [True, False])
def test_the_patience_count_goes_on(tmp_path, make_trap_net, weights_only):
    first, second = (spectral_monitor(2, stop_on="traps", patience=5) for _ in range(2))
    fit(tmp_path, make_trap_net(), first, max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    trainer = make_trainer(tmp_path, [second], max_epochs=9)
    trainer.fit(Module(make_trap_net()), loader(), ckpt_path=tmp_path / "4.ckpt", weights_only=weights_only)
    assert first.monitor.stop_reason == ""
    assert trainer.global_step == 8


def test_what_a_run_saw_after_its_checkpoint_is_not_told_twice(tmp_path, net, make_trap_net):
    class Grow(pl.Callback):
        """Plants a trap after step 5."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                with torch.no_grad():
                    pl_module.net[2].weight[3, 4] = 2.0

    folder = tmp_path / "checkpoints"
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, net, Grow(), spectral_monitor(2), checkpoint, enable_checkpointing=True, max_steps=7)
    assert steps_of(first := History.read(tmp_path / "ww_history.jsonl")) == [0, 2, 4, 6, 7]
    assert of_rule(first, "trap") == [(6, "net.2", "begin")]
    (saved,) = [path for path in folder.iterdir() if path.stem == "step=3"]
    saved = saved.rename(tmp_path / "3.ckpt")
    for path in folder.iterdir():
        path.unlink()
    trainer = make_trainer(tmp_path, [Grow(), spectral_monitor(2), checkpoint], max_steps=8, enable_checkpointing=True)
    trainer.fit(Module(make_trap_net(False)), loader(), ckpt_path=saved)
    read = History.read(tmp_path / "ww_history.jsonl")
    assert steps_of(read) == [0, 2, 3, 4, 6, 8]
    assert of_rule(read, "trap") == [(6, "net.2", "begin")]


def test_a_checkpoint_from_before_the_monitor_resumes(tmp_path, make_trap_net):
    fit(tmp_path, make_trap_net(), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    monitor = spectral_monitor(2)
    resume(tmp_path, make_trap_net(), monitor, tmp_path / "4.ckpt")
    assert steps_of(monitor.monitor.history) == [4, 6, 8]
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [4, 6, 8]


def test_a_run_without_a_state_does_not_add_to_the_file_of_another(tmp_path, make_trap_net):
    fit(tmp_path, make_trap_net(), spectral_monitor(4))
    fit(tmp_path / "plain", make_trap_net(), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    resume(tmp_path, make_trap_net(), spectral_monitor(2), tmp_path / "4.ckpt")
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0, 4, 8]
    assert steps_of(History.read(tmp_path / "ww_history-1.jsonl")) == [4, 6, 8]


def test_a_checkpoint_with_the_monitor_resumes_without_it(tmp_path, make_trap_net):
    fit(tmp_path, make_trap_net(), spectral_monitor(2), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    trainer = make_trainer(tmp_path, [], max_epochs=-1, max_steps=8)
    with pytest.warns(UserWarning, match="ww_monitor.SpectralMonitor"):
        trainer.fit(Module(make_trap_net()), loader(), ckpt_path=tmp_path / "4.ckpt")
    assert trainer.global_step == 8


def test_a_state_that_cannot_be_read_costs_the_past_only(tmp_path, make_trap_net):
    fit(tmp_path, make_trap_net(), spectral_monitor(2), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    content = torch.load(tmp_path / "4.ckpt", weights_only=True)
    for key in content["callbacks"]:
        content["callbacks"][key] = {"last_step": 4}
    torch.save(content, tmp_path / "4.ckpt")
    monitor = spectral_monitor(2)
    with pytest.warns(SpectralWarning, match="resume failed: KeyError"):
        resume(tmp_path, make_trap_net(), monitor, tmp_path / "4.ckpt")
    assert steps_of(monitor.monitor.history) == [4, 6, 8]


def test_a_second_fit_of_a_new_model_starts_a_fresh_history(tmp_path, net, make_trap_net):
    monitor = spectral_monitor(4)
    fit(tmp_path, make_trap_net(), monitor)
    fit(tmp_path, net, monitor)
    assert steps_of(monitor.monitor.history) == [0, 4, 8]
    assert of_rule(monitor.monitor.history, "trap") == []
    first, second = (History.read(tmp_path / name) for name in ("ww_history.jsonl", "ww_history-1.jsonl"))
    assert steps_of(first) == steps_of(second) == [0, 4, 8]
    assert (of_rule(first, "trap"), of_rule(second, "trap")) == ([(0, "net.2", "begin")], [])


def test_a_fit_after_a_resumed_one_starts_a_fresh_history_too(tmp_path, make_trap_net):
    fit(tmp_path, make_trap_net(), spectral_monitor(2), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    monitor = spectral_monitor(2)
    resume(tmp_path, make_trap_net(), monitor, tmp_path / "4.ckpt")
    fit(tmp_path, make_trap_net(), monitor, max_steps=4)
    assert steps_of(monitor.monitor.history) == [0, 2, 4]
    assert steps_of(History.read(tmp_path / "ww_history-1.jsonl")) == [0, 2, 4]


def test_a_second_fit_of_the_same_trainer_leaves_a_history_without_repeats(tmp_path, make_trap_net):
    monitor = spectral_monitor(4)
    trainer, module = make_trainer(tmp_path, [monitor]), Module(make_trap_net())
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    histories = [History.read(path) for path in sorted(tmp_path.glob("ww_*"))]
    assert [steps_of(history) for history in histories] == [[0, 4, 8, 12, 16]]
    assert of_rule(histories[0], "trap") == [(0, "net.2", "begin")]


class Dies(Module):
    error: type[BaseException] = KeyboardInterrupt

    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt, (KeyboardInterrupt, SystemExit)), (RuntimeError, RuntimeError)]
)
def test_a_run_that_dies_leaves_a_history_that_can_be_read(tmp_path, net_with_trap, error, raised, monkeypatch):
    monkeypatch.setattr(Dies, "error", error)
    sink = Memory()
    monitor = spectral_monitor(2, sinks=[sink])
    with pytest.raises(raised):
        fit(tmp_path, net_with_trap, monitor, module=Dies)
    history = History.read(tmp_path / "ww_history.jsonl")
    assert steps_of(history)[:3] == [0, 2, 4]
    assert of_rule(history, "trap") == [(0, "net.2", "begin")]
    assert sink.closed
    assert monitor.monitor.sinks == [sink]


class Breaks(pl.Callback):
    """Makes the side layer NaN before the fifth batch, infinite or whole again later."""

    def __init__(self, **values: float) -> None:
        self.values = {int(step.removeprefix("at_")): value for step, value in values.items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.values:
            with torch.no_grad():
                pl_module.side.weight[0, 0] = self.values[trainer.global_step]


class WithSide(Module):
    """Has a layer that no gradient reaches."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        torch.manual_seed(1)
        self.side = nn.Linear(32, 32)


def test_a_layer_that_breaks_is_found_and_costs_the_others_nothing(tmp_path, net, make_trap_net):
    whole, watched, watch = spectral_monitor(2), spectral_monitor(2), Watch()
    fit(tmp_path / "whole", net, whole, module=WithSide)
    breaks = Breaks(at_4=math.nan, at_6=0.0)
    trainer = fit(tmp_path / "broken", make_trap_net(False), watched, watch, breaks, module=WithSide)
    history = watched.monitor.history
    assert trainer.global_step == 8
    assert of_rule(history, "broken_layer") == [(6, "side", "begin"), (8, "side", "end")]
    assert [layer.status for layer in history.of_layer("side")] == ["ok", "ok", "ok", "not_finite", "ok"]
    for name in ("net.0", "net.2", "net.4"):
        assert [str(layer) for layer in history.of_layer(name)] == [
            str(one) for one in whole.monitor.history.of_layer(name)
        ]
    assert all(math.isfinite(metrics["ww/alpha"]) for metrics in watch.metrics)


def test_early_stopping_survives_a_broken_layer_and_stop_on_does_not(tmp_path, net, make_trap_net):
    stopping = EarlyStopping("ww/alpha", patience=100)
    trainer = fit(tmp_path, net, spectral_monitor(2), stopping, Breaks(at_2=math.nan), module=WithSide)
    assert (trainer.global_step, stopping.stopped_epoch) == (8, 0)
    monitor = spectral_monitor(2, stop_on="broken_layers", patience=1)
    trainer = fit(tmp_path, make_trap_net(False), monitor, Breaks(at_2=math.inf), module=WithSide)
    assert trainer.global_step == 4
    assert "broken_layers in 1 snapshot: side: no spectrum: not_finite" in monitor.monitor.stop_reason


class FullDisk(CSVLogger):
    def log_metrics(self, metrics, step=None):
        raise OSError(28, "No space left on device")


def test_a_logger_that_raises_costs_itself_only(tmp_path, net):
    monitor = spectral_monitor(2)
    loggers = [FullDisk(tmp_path, name="full"), CSVLogger(tmp_path, name="good")]
    with pytest.warns(SpectralWarning, match="logger FullDisk failed: OSError.*No space left") as caught:
        trainer = fit(tmp_path, net, monitor, logger=loggers)
    assert len([warning for warning in caught if warning.category is SpectralWarning]) == 1
    assert trainer.global_step == 8
    assert [row["step"] for row in read_csv(loggers[1])] == [0, 1, 3, 5, 7]
    assert steps_of(History.read(Path(trainer.log_dir) / "ww_history.jsonl")) == [0, 2, 4, 6, 8]


def test_a_history_file_that_cannot_be_written_costs_itself_only(tmp_path, net):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monitor = spectral_monitor(2)
    with pytest.warns(SpectralWarning, match="sink JsonLines failed: ") as caught:
        trainer = fit(blocked, net, monitor)
    assert len([warning for warning in caught if warning.category is SpectralWarning]) == 1
    assert trainer.global_step == 8
    assert steps_of(monitor.monitor.history) == [0, 2, 4, 6, 8]


# --- several monitors, arguments


def test_two_monitors_keep_apart(tmp_path, net_with_trap, make_trap_net):
    def monitors() -> list[SpectralMonitor]:
        return [spectral_monitor(2), spectral_monitor(4, preset="weightwatcher")]

    first = monitors()
    fit(tmp_path, net_with_trap, *first, max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    assert len({monitor.state_key for monitor in first}) == 2
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0, 2, 4]
    assert steps_of(History.read(tmp_path / "ww_history-1.jsonl")) == [0, 4]
    second = monitors()
    fit(tmp_path, make_trap_net(), *second, ckpt_path=tmp_path / "4.ckpt", max_epochs=-1, max_steps=8)
    assert [steps_of(monitor.monitor.history) for monitor in second] == [[0, 2, 4, 6, 8], [0, 4, 8]]
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0, 2, 4, 6, 8]
    assert steps_of(History.read(tmp_path / "ww_history-1.jsonl")) == [0, 4, 8]
    assert {snapshot.preset for snapshot in History.read(tmp_path / "ww_history-1.jsonl")} == {"weightwatcher"}


@pytest.mark.parametrize(
    "other",
    [
        {"include": ["net.0"]},
        {"exclude": ["net.0"]},
        {"metrics": ["alpha"]},
        {"min_size": 20},
        {"seed": 1},
        {"replicas": 5},
    ],
    ids=str,
)
def test_two_monitors_of_one_cadence_may_look_at_different_things(tmp_path, net, other):
    one, two = spectral_monitor(4), spectral_monitor(4, **other)
    fit(tmp_path, net, one, two)
    assert steps_of(one.monitor.history) == steps_of(two.monitor.history) == [0, 4, 8]


def test_the_state_key_is_the_same_in_every_process():
    assert spectral_monitor(4).state_key == spectral_monitor(4).state_key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1; got 0"),
        ({"every_n_steps": -1}, "every_n_steps must be an integer >= 1; got -1"),
        ({"every_n_steps": 2.5}, r"every_n_steps must be an integer >= 1; got 2\.5"),
        ({"every_n_steps": True}, "every_n_steps must be an integer >= 1; got True"),
        ({"every_n_epochs": 0}, "every_n_epochs must be an integer >= 1; got 0"),
        ({"patience": 0}, "patience must be an integer >= 1; got 0"),
        ({"stop_on": "trap"}, "stop_on must be one of None, 'traps', 'harmful_traps', 'broken_layers'; got 'trap'"),
        ({"preset": "ww"}, "preset must be one of 'default', 'weightwatcher'; got 'ww'"),
        ({"stop_on": "traps", "metrics": ["alpha"]}, "stop_on='traps' needs the metric 'num_traps'"),
        ({"metrics": ["alfa"]}, "metrics must be among 'alpha', .*; got 'alfa'"),
        ({"include": "net.*"}, r"include must be a sequence of globs; got the string 'net\.\*'"),
        ({"min_size": 0}, "min_size must be an integer >= 1; got 0"),
        ({"max_size": 1}, "max_size must be None or >= min_size=8; got 1"),
        ({"sinks": [print]}, "sinks must have write and close; got"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(InvalidArgument, match=f"^SpectralMonitor: {message}"):
        SpectralMonitor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"include": ["net.0"]}, lambda history: history.layer_names),
        ({"exclude": ["net.0"]}, lambda history: history.layer_names),
        ({"min_size": 12}, lambda history: history.layer_names),
        ({"max_size": 20}, lambda history: history.layer_names),
        ({"metrics": ["alpha"]}, lambda history: list(history.last.summary)),
        ({"preset": "weightwatcher"}, lambda history: history.last.preset),
        ({"rules": (rules.broken_layer,)}, lambda history: [finding.rule for finding in history.findings]),
        ({"seed": 5}, lambda history: history.last.summary["trap_severity"]),
        ({"significance": 0.999}, lambda history: history.last.summary["num_spikes"]),
        ({"fit": "hill"}, lambda history: history.last.summary["alpha"]),
        ({"fit": "hill", "fit_k": 5}, lambda history: history.last.summary["n_tail"]),
        ({"aspect_ratio": 1.0}, lambda history: history.last.summary["alpha"]),
    ],
)
def test_every_argument_does_something(tmp_path, net_with_trap, plain_history, arguments, what):
    monitor = spectral_monitor(8, **arguments)
    fit(tmp_path, net_with_trap, monitor)
    assert what(monitor.monitor.history) != what(plain_history)


ENGINE = {
    "preset": "weightwatcher",
    "metrics": ["alpha"],
    "seed": 3,
    "replicas": 7,
    "significance": 0.5,
    "fit": "hill",
    "fix_fingers": "clip_xmax",
    "aspect_ratio": 2.0,
    "strict": True,
}


@pytest.mark.parametrize("argument", ENGINE)
def test_an_argument_reaches_the_engine(argument):
    options = {argument: ENGINE[argument]}
    assert spectral_monitor(**options).monitor.options == Options(**options) != Options()


def test_every_option_of_the_engine_is_an_argument():
    assert spectral_monitor(fit="hill", fit_k=5).monitor.options == Options(fit="hill", fit_k=5)
    assert {field.name for field in fields(Options)} == {*ENGINE, "fit_k", "keep_eigenvalues"}


@pytest.fixture(scope="module")
def plain_history(tmp_path_factory, make_trap_net) -> History:
    """The run that the arguments above change."""
    monitor = spectral_monitor(8)
    fit(tmp_path_factory.mktemp("plain"), make_trap_net(), monitor)
    return monitor.monitor.history


def test_strict_raises_with_layer_and_step(tmp_path, net):
    from ww_monitor import LayerError

    with pytest.raises(LayerError, match="layer 'side' at step 4: expected finite weights"):
        fit(tmp_path, net, spectral_monitor(2, strict=True), Breaks(at_3=math.nan), module=WithSide)


# --- wrappers, namespaces, processes


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.compile's own
def test_names_of_a_compiled_submodule_are_clean(tmp_path, net):
    monitor = spectral_monitor(8)
    fit(tmp_path, torch.compile(net, backend="eager"), monitor)
    assert monitor.monitor.history.layer_names == ["net.0", "net.2", "net.4"]


NAMESPACE_SCRIPT = """
import sys, torch
import {namespace} as pl
{before}
from ww_monitor.callbacks.lightning import SpectralMonitor
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(24, 16)
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
assert ({other!r} in sys.modules) == {both}
for callbacks in ([SpectralMonitor(1, console=False)], SpectralMonitor(1, console=False)):
    trainer = pl.Trainer(max_steps=2, callbacks=callbacks, accelerator="cpu", logger=False, default_root_dir={root!r},
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 24), batch_size=2))
    (monitor,) = [callback for callback in trainer.callbacks if isinstance(callback, SpectralMonitor)]
    assert isinstance(monitor, pl.Callback)
    assert [snapshot.step for snapshot in monitor.monitor.history] == [0, 1, 2]
print("fine")
"""


NAMESPACES = [
    ("pytorch_lightning", "lightning.pytorch", "", False),
    ("lightning.pytorch", "pytorch_lightning", "", False),
    ("lightning.pytorch", "pytorch_lightning", "import pytorch_lightning", True),
]


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory):
    """Where each script has left how it ended; none of them has Lightning imported before."""

    def run(folder):
        commands = {}
        for case, (namespace, other, before, both) in enumerate(NAMESPACES):
            script, root = folder / f"{case}.py", str(folder / str(case))
            text = NAMESPACE_SCRIPT.format(namespace=namespace, other=other, before=before, both=both, root=root)
            script.write_text(text)
            commands[str(case)] = [str(script)]
        run_in_forks(folder, commands, "ww_monitor")

    return once(tmp_path_factory, "lightning_namespaces", run)


@pytest.mark.parametrize("case", range(len(NAMESPACES)))
def test_the_trainer_of_each_namespace_accepts_it_in_a_list_and_alone(namespaces, case):
    pytest.importorskip(NAMESPACES[case][0].split(".")[0])
    done = json.loads((namespaces / f"{case}.json").read_text())
    assert done["status"] == 0, done["err"]
    assert done["out"].splitlines()[-1] == "fine"


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The folder of runs with two processes."""

    def run(folder):
        done = run_python("-m", "tests.callbacks.ddp_run", str(folder), folder=ROOT)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "lightning_ddp", run)


@pytest.mark.parametrize(("what", "stops_at"), [("early_stopping", 8), ("stop_on", 4), ("sharded", 4)])
def test_two_processes_agree_and_write_once(processes, what, stops_at):
    folder = processes / what
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["step"] for rank in ranks] == [stops_at] * 2
    assert [rank["last step"] for rank in ranks] == [stops_at] * 2
    assert ranks[0]["alpha"] == ranks[1]["alpha"]
    snapshots = stops_at // 2 + 1
    assert [(rank["snapshots"], rank["log calls"]) for rank in ranks] == [(snapshots, snapshots), (snapshots, 0)]
    (path,) = folder.glob("**/ww_history*")
    assert steps_of(History.read(path)) == list(range(0, stops_at + 1, 2))


def test_two_processes_look_at_the_same_steps_within_a_budget(processes):
    ranks = [json.loads((processes / "budget" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["history"] == ranks[1]["history"]
    assert ranks[0]["steps"][0] == 0
    assert ranks[0]["steps"][-1] == ranks[0]["step"] == 40
    assert len(ranks[0]["steps"]) > 2

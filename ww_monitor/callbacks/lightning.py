"""The PyTorch Lightning callback; works with `pytorch_lightning` and with `lightning.pytorch`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import torch

from ww_monitor.callbacks._adapter import Adapter, hook
from ww_monitor.callbacks._watched import Watched, fields_of
from ww_monitor.errors import MissingDependency
from ww_monitor.record import NAN, Snapshot, summary_key
from ww_monitor.sinks.trackers import dashboard_of

_READERS_OF_KEYS = (
    "_validate_callbacks_list",
    "_call_callbacks_on_load_checkpoint",
    "_call_callbacks_load_state_dict",
)
"""Functions of Lightning's that read `state_key` and act on it."""

_NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def _callback_bases() -> tuple[type, ...]:
    """The Callback class of every Lightning namespace in use, or installed if none is in use yet.

    The two namespaces have distinct classes, and a Trainer of one refuses callbacks that derive from the other only.
    """
    in_use = [name for name in _NAMESPACES if name in sys.modules]
    installed = [name for name in _NAMESPACES if importlib.util.find_spec(name.split(".")[0]) is not None]
    if not installed:
        raise MissingDependency("ww_monitor.callbacks.lightning: needs Lightning; pip install 'ww-monitor[lightning]'")
    return tuple(importlib.import_module(name).Callback for name in in_use or installed)


class SpectralMonitor(Adapter, *_callback_bases()):  # type: ignore[misc]
    """Follows the spectra of a module's weight matrices while it trains.

    Model-level values go to every logger of the Trainer as `ww/<metric>`, layers as `ww_<metric>/<layer>`, and a
    TensorBoard or W&B logger gets more than numbers (see `ww_monitor.sinks.tensorboard.Dashboard` and
    `ww_monitor.sinks.wandb.Dashboard`). `trainer.callback_metrics` has the model-level values from the first step on,
    so `ModelCheckpoint(monitor="ww/alpha")` works, and `{ww/alpha:.2f}` in its file names. What a checkpoint, a stopper
    or a scheduler of the learning rate watches is measured when it is read, whatever the schedule and the order of the
    callbacks, and always has a value. The progress bar shows `ww_alpha`. `ww_history.jsonl` in the log folder holds
    everything and is read by `ww_monitor.History.read`. The metrics with unit, source and meaning are in
    `docs/metrics.md`.

    `stop_on="traps"` ends a run whose trap persists. `EarlyStopping` waits for improvements, and the count of traps of
    a healthy run has none: let it watch `ww/trap_free_until` with `mode="max"`, the step up to which no trap was
    seen, or give `EarlyStopping("ww/num_traps", divergence_threshold=0.5, patience=10**9)`.

    Training is bit-identical with and without it. A failure inside becomes a status or one `SpectralWarning`.

    The arguments are described with `__init__`.
    """

    _epoch = 0
    """The last one of which a batch was trained: the Trainer counts on when an epoch has ended."""

    @hook
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """First snapshot, so that every key exists before a callback looks for it."""
        monitor, step = self.monitor, trainer.global_step
        self._began_at, self._updates = step, max(1, len(trainer.optimizers))  # of several each counts in manual loops
        self._epoch = trainer.current_epoch
        self._keep_apart(trainer.callbacks)
        self._look_around(trainer)
        self._open(
            step=step,
            folder=lambda: _folder(trainer),
            print_line=_printer(trainer),
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            optimizers=trainer.optimizers,
        )
        if monitor.last_step == step and len(monitor.history):
            self._publish_metrics(trainer, monitor.history.last)
        else:
            self._observe(trainer, pl_module, whole=True)
        self._publish_watched(trainer)
        self._announce()

    @hook
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The weights before a step after which a snapshot is due, where updates are measured."""
        before, step = self._began_at, trainer.global_step
        self._began_at, self._updates = step, max(self._updates, step - before)
        last = trainer.max_steps >= 0 and step + self._updates >= trainer.max_steps  # -1: no bound
        if trainer.is_last_batch:
            last |= trainer.current_epoch + 1 == trainer.max_epochs
            last |= self.monitor.due_at_epoch_end(trainer.current_epoch, step + 1)
        about = {"updates": self._updates, "optimizers": trainer.optimizers}
        self._before_step(lambda: pl_module, step=step, last=last, **about)

    @hook
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A snapshot where one is due; repeats and jumps of `global_step` are the schedule's business."""
        self._epoch = trainer.current_epoch
        due, read = self.monitor.due(trainer.global_step), bool(self._watched) and self._is_read_now(trainer, batch_idx)
        if due or read:
            snapshots = self._observe(trainer, pl_module, whole=read)
            self._publish_watched(trainer, read=read)
        else:
            snapshots = self._published(trainer, self.monitor.collect())
        alpha = snapshots[-1].summary.get("alpha", NAN) if snapshots else NAN
        if alpha == alpha and not getattr(trainer, "barebones", False):  # which warns of every log
            with self.monitor.guard("progress bar", always=True):
                pl_module.log(f"{self._name}ww_alpha", alpha, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    @hook
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """A snapshot where somebody acts on our values after the validation."""
        if self._watched and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._observe(trainer, pl_module, whole=True)
            self._publish_watched(trainer)

    @hook
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A snapshot where the epoch schedule asks for one, or somebody acts on our values now."""
        if self.monitor.due_at_epoch_end(trainer.current_epoch, trainer.global_step) or self._watched:
            self._observe(trainer, pl_module, whole=bool(self._watched), after_batch=True)
            self._publish_watched(trainer)

    @hook
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Last snapshot."""
        self._observe(trainer, pl_module, whole=True, after_batch=True)

    @hook
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """A snapshot of the weights that somebody has put in place of those of the last step, and the table."""
        if self._are_exchanged(pl_module, trainer.global_step):
            self._observe(trainer, pl_module, whole=True, after_batch=True, again=True)
        self._show_table()

    @hook
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the sinks, also after an exception or an interrupt."""
        self._close()

    @hook
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The run died: nothing of what was seen is lost."""
        self.teardown(trainer, pl_module, "fit")

    @hook
    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, as resuming with `weights_only` needs."""
        return self._state()

    @hook
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a resumed run."""
        self._load_state(state_dict)

    @property
    def state_key(self) -> str:
        """One key for every monitor that does the same; of several in one Trainer the second one's has its number.

        Who reads it knows what a hook is told too late: all callbacks of a Trainer, or the keys in a checkpoint, among
        which may be that of the last release.
        """
        caller: FrameType | None = sys._getframe(1)
        while caller is not None and caller.f_code.co_name.startswith("<"):  # a comprehension
            caller = caller.f_back
        name = "" if caller is None else caller.f_code.co_name
        known = caller.f_locals if caller is not None and name in _READERS_OF_KEYS else {}
        if name == "_validate_callbacks_list":
            self._number_among(known.get("callbacks", ()))
        trainer = known.get("trainer")
        return self._key_among(known.get("callback_states") or (), () if trainer is None else trainer.callbacks)

    def _observe(
        self, trainer: Any, pl_module: Any, *, whole: bool = False, after_batch: bool = False, again: bool = False
    ) -> list[Snapshot]:
        """Look now, on every rank alike, unless there is a whole one of this step; what is complete, published."""
        step = trainer.global_step
        # The axis of Lightning's own logs, which nothing public gives. It moves behind the hooks of a batch: what comes
        # later takes one off, as `FitLoop.on_advance_end` does for the values of an epoch.
        x = int(trainer.fit_loop.epoch_loop._batches_that_stepped)
        with self.monitor.timed():
            done = self._published(trainer, self.monitor.finish() if whole else [])
            if whole and self.monitor.is_seen(step) and not again:
                return done
            self._x[step] = max(0, x - 1) if after_batch else x
            snapshots = self._snapshot(pl_module, step=step, epoch=self._epoch, whole=whole)
            return [*done, *self._published(trainer, snapshots)]

    def _look_around(self, trainer: Any) -> None:
        """Note what others watch, and say what would end a healthy run."""
        with self.monitor.guard("looking at the other callbacks", always=True):
            found = [(one, key) for one in trainer.callbacks for key in _watched_by(one)]
            found += [(one.scheduler, one.monitor) for one in trainer.lr_scheduler_configs if one.monitor]
            strict = {key for one, key in found if trainer.world_size > 1 or getattr(one, "strict", True)}
            patient = {key for _, key in found} - strict  # not on several ranks, which may differ in what they know
            self._watched = Watched(self._name, {key: _worst(one) for one, key in found}, self._model_metrics, patient)
            waiting = [(one, key) for one, key in found if _waits_for_improvement(one, trainer)]
            for advice in self._watched.advice(waiting, str):
                self.monitor.say_once(advice, advice)

    def _is_read_now(self, trainer: Any, batch_idx: int) -> bool:
        """Whether somebody acts on our values before the next batch: what is read at the end of an epoch is of now."""
        step = trainer.global_step
        by_step = [one for one in trainer.lr_scheduler_configs if one.reduce_on_plateau and one.interval == "step"]
        plateau = any((batch_idx + 1) % one.frequency == 0 for one in by_step)
        saved = any(_saves_at(one, step, self.monitor.analyzer.agreed) for one in trainer.checkpoint_callbacks)
        return bool(trainer.is_last_batch) or plateau or saved

    def _published(self, trainer: Any, snapshots: list[Snapshot]) -> list[Snapshot]:
        with self.monitor.timed():
            for snapshot in snapshots:
                self._log(trainer, snapshot, self._x.pop(snapshot.step, 0))
                self._publish_metrics(trainer, snapshot)
        reason = self.monitor.stop_reason
        if reason and not trainer.should_stop:
            trainer.should_stop = True
            self._say(f"stopping at step {trainer.global_step}: {reason}")
        return snapshots

    def _log(self, trainer: Any, snapshot: Snapshot, x: int) -> None:
        """Tell every logger, on the first rank."""
        scalars = self._shown_values(snapshot)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            name, board = type(logger).__name__, None
            with self.monitor.guard(f"dashboard of {name}", key=f"dashboard {id(logger)}", always=True):
                board, start = dashboard_of(tracker := logger.experiment), getattr(logger, "_prefix", "")
                # A hyphen, as LOGGER_JOIN_CHAR of Lightning's loggers.
                keyed = {f"{start}-{key}": value for key, value in scalars.items()} if start else scalars
                self._dashboards.update(tracker, snapshot, x, keyed)
            with self.monitor.guard(f"logger {name}", key=f"logger {id(logger)}", always=True):
                if board is None or not board.carries_values:
                    logger.log_metrics(scalars, step=x)

    def _publish_metrics(self, trainer: Any, snapshot: Snapshot) -> None:
        for metric in snapshot.summary:  # what is not known now is not what it was
            trainer.callback_metrics.pop(self._name + summary_key(metric), None)
        values = {**self._values(snapshot, layers=False), **self._watched.values(self.monitor.history)}
        trainer.callback_metrics.update(_tensors(values))

    def _publish_watched(self, trainer: Any, *, read: bool = True) -> None:
        """What others act on, as it is now: not known where the analysis of these weights has failed."""
        history, step = self.monitor.history, trainer.global_step
        values = self._watched.values(history, step)
        for key in self._watched.all_keys:
            trainer.callback_metrics.pop(key, None)
        trainer.callback_metrics.update(_tensors(values))
        if read and (message := self._watched.lost(history, step, values)):
            self.monitor.say_once("lost values", message)


def _tensors(values: Mapping[str, float]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value, dtype=torch.float64, device="cpu") for key, value in values.items()}


def _watched_by(callback: Any) -> list[str]:
    """The keys that a callback acts on: what it monitors, and what the names of its files have in them."""
    monitor = getattr(callback, "monitor", None)
    return ([monitor] if isinstance(monitor, str) else []) + fields_of(getattr(callback, "filename", None))


def _worst(watcher: Any) -> float:
    """The worst there is for a watcher; finite, for `EarlyStopping` ends a run whose value is not."""
    most = torch.finfo(torch.float32).max
    return -most if getattr(watcher, "mode", "min") == "max" else most


def _waits_for_improvement(callback: Any, trainer: Any) -> bool:
    """Whether it is an `EarlyStopping`, of whichever namespace, whose patience a healthy run would use up."""
    if "EarlyStopping" not in {kind.__name__ for kind in type(callback).__mro__}:
        return False
    has_threshold = callback.stopping_threshold is not None or callback.divergence_threshold is not None
    # 100 checks at least, for a run may have no bound on its epochs (our choice).
    return not (has_threshold and callback.patience >= max(100, trainer.max_epochs or 0))


def _saves_at(callback: Any, step: int, agreed: Callable[[bool], bool]) -> bool:
    """Whether a checkpoint is saved after a batch: every so many steps, or so often, which all ranks agree on."""
    # Nothing public of a `ModelCheckpoint` tells when it saves; a callback of another class lacks these.
    every, interval = getattr(callback, "_every_n_train_steps", 0), getattr(callback, "_train_time_interval", None)
    before = getattr(callback, "_last_time_checked", None)
    timed = interval is not None and agreed(before is not None and monotonic() - before >= interval.total_seconds())
    return timed or (every >= 1 and step % every == 0)


def _folder(trainer: Any) -> Path | None:
    """The log folder (a collective: every rank asks)."""
    folder = trainer.log_dir or trainer.default_root_dir
    return None if trainer.fast_dev_run else Path(folder)


def _printer(trainer: Any) -> Callable[[str], object]:
    """A print that leaves the Trainer's progress bar whole."""
    bar = trainer.progress_bar_callback

    def print_line(line: str) -> None:
        console = getattr(getattr(bar, "progress", None), "console", None)
        if console is not None and bar.is_enabled:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line)
        else:
            print(line)

    return print_line

"""The PyTorch Lightning callback; works with `pytorch_lightning` and with `lightning.pytorch`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ww_monitor.callbacks._adapter import Adapter
from ww_monitor.errors import MissingDependency
from ww_monitor.record import NAN, Snapshot

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
    `ww_monitor.sinks.wandb.Dashboard`). `trainer.callback_metrics` has the
    model-level values, so `EarlyStopping(monitor="ww/num_traps")` and `ModelCheckpoint(monitor="ww/alpha")` work from
    the first step on; the progress bar shows `ww_alpha`. `ww_history.jsonl` in the log folder holds everything and is
    read by `ww_monitor.History.read`. The metrics with unit, source and meaning are in the README's table.

    Training is bit-identical with and without it. A failure inside becomes a status or one `SpectralWarning`.

    The arguments are described with `__init__`.
    """

    _step_key = "trainer/global_step"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """First snapshot, so that every key exists before a callback looks for it."""
        monitor, step = self.monitor, trainer.global_step
        self._began_at, self._updates = step, max(1, len(trainer.optimizers))  # of several each counts in manual loops
        folder = self._folder(trainer)
        self._open(
            step=step, folder=folder, print_line=_printer(trainer), rank=trainer.global_rank, ranks=trainer.world_size
        )
        if monitor.last_step == step and len(monitor.history):
            self._publish_metrics(trainer, monitor.history.last)
        else:
            self._observe(trainer, pl_module, x=trainer.fit_loop.epoch_loop._batches_that_stepped, whole=True)
        self._announce()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The weights before a step after which a snapshot is due, where updates are measured."""
        before, step = self._began_at, trainer.global_step
        self._began_at, self._updates = step, max(self._updates, step - before)
        last = trainer.max_steps >= 0 and step + self._updates >= trainer.max_steps
        if trainer.is_last_batch:
            last |= trainer.current_epoch + 1 == trainer.max_epochs
            last |= self.monitor.due_at_epoch_end(trainer.current_epoch, step + 1)
        about = {"updates": self._updates, "optimizers": trainer.optimizers}
        self._before_step(lambda: pl_module, step=step, last=last, **about)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A snapshot where one is due; repeats and jumps of `global_step` are the schedule's business."""
        if self.monitor.due(trainer.global_step):
            snapshots = self._observe(trainer, pl_module, x=trainer.fit_loop.epoch_loop._batches_that_stepped)
        else:
            snapshots = self._published(trainer, self.monitor.collect())
        alpha = snapshots[-1].summary.get("alpha", NAN) if snapshots else NAN
        if alpha == alpha and not getattr(trainer, "barebones", False):
            with self.monitor.guard("progress bar", always=True):
                pl_module.log("ww_alpha", alpha, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A snapshot where the epoch schedule asks for one."""
        if self.monitor.due_at_epoch_end(trainer.current_epoch, trainer.global_step):
            self._observe(trainer, pl_module, x=self._x_after_batch(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Last snapshot, and the table."""
        self._published(trainer, self.monitor.finish())
        if not self.monitor.is_seen(trainer.global_step):
            self._observe(trainer, pl_module, x=self._x_after_batch(trainer), whole=True)
        self._show_table()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the sinks, also after an exception or an interrupt."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The run died: nothing of what was seen is lost."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, as resuming with `weights_only` needs."""
        return self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a resumed run."""
        self._load_state(state_dict)

    @property
    def state_key(self) -> str:
        """One key for every monitor that analyses the same things as often, whatever the base class."""
        return f"ww_monitor.SpectralMonitor({self._settings})"

    def _observe(self, trainer: Any, pl_module: Any, *, x: int, whole: bool = False) -> list[Snapshot]:
        """Look now, on every rank alike; the snapshots that are complete, published."""
        step = trainer.global_step
        self._x[step] = x
        with self.monitor.timed():
            snapshots = self._snapshot(pl_module, step=step, epoch=trainer.current_epoch, whole=whole)
            return self._published(trainer, snapshots)

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
        scalars = self._shown.scalars(snapshot)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            name = type(logger).__name__
            with self.monitor.guard(f"dashboard of {name}", key=f"dashboard {id(logger)}", always=True):
                # before the values: W&B puts both into one row, which these end
                self._dashboards.update(logger.experiment, snapshot, x)
            with self.monitor.guard(f"logger {name}", key=f"logger {id(logger)}", always=True):
                logger.log_metrics(scalars, step=x)

    def _publish_metrics(self, trainer: Any, snapshot: Snapshot) -> None:
        values = snapshot.scalars(layers=False)
        trainer.callback_metrics.update(
            {key: torch.tensor(value, dtype=torch.float32, device="cpu") for key, value in values.items()}
        )

    def _x_after_batch(self, trainer: Any) -> int:
        """Lightning's logging step of the batch that ended, outside its hook."""
        return max(0, int(trainer.fit_loop.epoch_loop._batches_that_stepped) - 1)

    def _folder(self, trainer: Any) -> Path | None:
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

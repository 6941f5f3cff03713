"""The PyTorch Lightning callback; works with `pytorch_lightning` and with `lightning.pytorch`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ww_monitor.callbacks._adapter import Session, build_monitor
from ww_monitor.errors import MissingDependency
from ww_monitor.record import Snapshot, summary_key
from ww_monitor.rules import TRAINING_RULES, Rule
from ww_monitor.sinks import Sink
from ww_monitor.sinks.tensorboard import write_histograms
from ww_monitor.spectra.marchenko_pastur import SIGNIFICANCE
from ww_monitor.spectra.traps import REPLICAS
from ww_monitor.walk.sources import WHOLE, walk_source

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


class SpectralMonitor(*_callback_bases()):  # type: ignore[misc]
    """Follows the spectra of a module's weight matrices while it trains.

    Model-level values go to every logger of the Trainer as `ww/<metric>`, layers as `ww_<metric>/<layer>`, and a
    TensorBoard logger gets a histogram of log10 λ a layer (`ww_esd/<layer>`). `trainer.callback_metrics` has the
    model-level values, so `EarlyStopping(monitor="ww/num_traps")` and `ModelCheckpoint(monitor="ww/alpha")` work from
    the first step on; the progress bar shows `ww_alpha`. `ww_history.jsonl` in the log folder holds everything and is
    read by `ww_monitor.History.read`. The metrics with unit, source and meaning are in the README's table.

    Training is bit-identical with and without it. A failure inside becomes a status or one `SpectralWarning`.

    Args:
        every_n_steps: Analyse when a multiple of this many optimizer steps is reached (100 if neither is given), also
            before the first step and after the last.
        every_n_epochs: Analyse at the end of every so many epochs.
        stop_on: `"traps"` stops the run when a correlation trap persists, `"broken_layers"` when a layer is NaN.
        patience: In how many consecutive snapshots.
        preset: `"default"` or `"weightwatcher"`.
        metrics: Names of metrics, `None` for the standard ones, or `"all"`.
        include: Globs on layer names.
        exclude: Globs on layer names.
        min_size: Least number of eigenvalues of a layer.
        max_size: Largest number of eigenvalues of a layer.
        seed: Seed of the private generator that shuffles.
        replicas: Shuffles a layer that may hold a trap.
        significance: Probability of a false spike in a random layer, and of a false trap in one shuffle of it.
        fit: `"csn"`, `"hill"` or `"truncated"`; this and the next three as in `ww_monitor.analyze`.
        fit_k: Size of the Hill estimator's tail.
        fix_fingers: `"clip_xmax"` or `None`.
        aspect_ratio: Of the windows that the tail is fitted to, or `None`.
        split: How to cut fused weights; this and the next two as in `ww_monitor.analyze`.
        experts: `"separate"` or `"pooled"`.
        lora: Which of `"base"`, `"delta"` and `"merged"`.
        track_delta: Follow W − W₀ and the rotation of the leading subspaces (see `ww_monitor.Monitor`).
        strict: Raise when a layer fails.
        rules: What to look for (`ww_monitor.rules`).
        sinks: Further sinks.
        console: Print findings, a line at the start, and a table at the end.
        history: Write the history file.

    Raises:
        InvalidArgument: at construction, naming the argument, its value and the choices.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        *,
        stop_on: str | None = None,
        patience: int = 3,
        preset: str = "default",
        metrics: Sequence[str] | str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        min_size: int = 8,
        max_size: int | None = None,
        seed: int = 0,
        replicas: int = REPLICAS,
        significance: float = SIGNIFICANCE,
        fit: str = "csn",
        fit_k: int | None = None,
        fix_fingers: str | None = None,
        aspect_ratio: float | None = None,
        split: Mapping[str, int | Sequence[int]] | None = None,
        experts: Literal["separate", "pooled"] = "separate",
        lora: Sequence[str] = ("base", "delta"),
        track_delta: bool = False,
        strict: bool = False,
        rules: Sequence[Rule] = TRAINING_RULES,
        sinks: Sequence[Sink] = (),
        console: bool = True,
        history: bool = True,
    ) -> None:
        super().__init__()
        self.monitor = build_monitor(
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
            stop_on=stop_on,
            patience=patience,
            preset=preset,
            metrics=metrics,
            include=include,
            exclude=exclude,
            min_size=min_size,
            max_size=max_size,
            seed=seed,
            replicas=replicas,
            significance=significance,
            fit=fit,
            fit_k=fit_k,
            fix_fingers=fix_fingers,
            aspect_ratio=aspect_ratio,
            strict=strict,
            rules=rules,
            sinks=sinks,
            track_delta=track_delta,
        )
        if split is None and preset == "weightwatcher":
            split = WHOLE
        self._walk = partial(walk_source, split=split, experts=experts, lora=lora)
        self._walk(torch.nn.Module())  # a wrong choice is refused here, not at the first step
        self._console = console
        self._history = history
        self._session: Session | None = None
        self._history_name = ""
        self._resumed = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """First snapshot, so that every key exists before a callback looks for it."""
        monitor, step = self.monitor, trainer.global_step
        if not self._resumed and monitor.last_step is not None and (step == 0 or step < monitor.last_step):
            monitor.restart()
            self._history_name = ""
        folder = self._folder(trainer)
        if trainer.is_global_zero:
            print_line = _printer(trainer) if self._console else None
            self._session = Session(monitor, folder=folder, print_line=print_line, continues=self._history_name)
            self._history_name = self._session.history_name
        if monitor.last_step == step and len(monitor.history):
            self._publish_metrics(trainer, monitor.history.last.scalars(layers=False))
        else:
            self._observe(trainer, pl_module, x=trainer.fit_loop.epoch_loop._batches_that_stepped)
        if self._session is not None and len(monitor.history):
            self._session.announce(monitor.history.last)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A snapshot where one is due; repeats and jumps of `global_step` are the schedule's business."""
        if not self.monitor.due(trainer.global_step):
            return
        values = self._observe(trainer, pl_module, x=trainer.fit_loop.epoch_loop._batches_that_stepped)
        alpha = values.get(summary_key("alpha"))
        if alpha is not None and not getattr(trainer, "barebones", False):
            with self.monitor.guard("progress bar", always=True):
                pl_module.log("ww_alpha", alpha, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A snapshot where the epoch schedule asks for one."""
        if self.monitor.due_at_epoch_end(trainer.current_epoch, trainer.global_step):
            self._observe(trainer, pl_module, x=self._x_after_batch(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Last snapshot, and the table."""
        if self.monitor.last_step != trainer.global_step:
            self._observe(trainer, pl_module, x=self._x_after_batch(trainer))
        if self._session is not None:
            self._session.show_table()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the sinks, also after an exception or an interrupt."""
        self._resumed = False
        if self._session is not None:
            self._session.close()
            self._session = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The run died: nothing of what was seen is lost."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, as resuming with `weights_only` needs."""
        return {**self.monitor.state_dict(), "history_file": self._history_name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a resumed run."""
        with self.monitor.guard("resume", always=True):
            self.monitor.load_state_dict(state_dict)
            self._history_name = state_dict["history_file"]
            self._resumed = True

    @property
    def state_key(self) -> str:
        """One key for every monitor that looks at the same things as often, whatever the base class."""
        settings = [f"every={self.monitor.cadence!r}"]
        for part in (self.monitor.options, self.monitor.select):
            for field in fields(part):
                value = getattr(part, field.name)
                if value != field.default and field.name != "strict":
                    settings.append(f"{field.name}={value!r}")
        return f"ww_monitor.SpectralMonitor({', '.join(settings)})"

    def _observe(self, trainer: Any, pl_module: Any, *, x: int) -> dict[str, float]:
        """Analyse on rank 0, tell every rank, publish; returns the model-level values."""
        snapshot: Snapshot | None = None
        if trainer.is_global_zero:
            snapshot = self.monitor.observe(
                self._walk(pl_module), step=trainer.global_step, epoch=trainer.current_epoch
            )
        else:
            self.monitor.last_step = trainer.global_step
        values = snapshot.scalars(layers=False) if snapshot else {}
        values, reason = trainer.strategy.broadcast((values, self.monitor.stop_reason), src=0)
        if snapshot is not None:
            self._log(trainer, snapshot, x)
        self._publish_metrics(trainer, values)
        if reason and not trainer.should_stop:
            trainer.should_stop = True
            if self._session is not None:
                self._session.say(f"stopping at step {trainer.global_step}: {reason}")
        return dict(values)

    def _log(self, trainer: Any, snapshot: Snapshot, x: int) -> None:
        scalars = snapshot.scalars()
        for logger in trainer.loggers:
            name = type(logger).__name__
            with self.monitor.guard(f"logger {name}", key=f"logger {id(logger)}", always=True):
                logger.log_metrics(scalars, step=x)
                if hasattr(logger.experiment, "add_histogram_raw"):
                    write_histograms(logger.experiment, snapshot, x)

    def _publish_metrics(self, trainer: Any, values: dict[str, float]) -> None:
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})

    def _x_after_batch(self, trainer: Any) -> int:
        """Lightning's logging step of the batch that ended, outside its hook."""
        return max(0, int(trainer.fit_loop.epoch_loop._batches_that_stepped) - 1)

    def _folder(self, trainer: Any) -> Path | None:
        """The log folder (a collective: every rank asks)."""
        folder = trainer.log_dir or trainer.default_root_dir
        return Path(folder) if self._history and not trainer.fast_dev_run else None


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

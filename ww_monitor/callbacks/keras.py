"""The Keras 3 callback, for its torch, JAX and TensorFlow backends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ww_monitor.callbacks._adapter import Adapter, calling_object
from ww_monitor.errors import MissingDependency
from ww_monitor.record import NAN, Snapshot, summary_key
from ww_monitor.settings import CallbackOptions, KerasOptions
from ww_monitor.signatures import method_taking

try:
    import keras
except ImportError as error:
    if error.name == "keras":
        message = "ww_monitor.callbacks.keras: needs keras; pip install 'ww-monitor[keras]'"
    else:
        message = f"ww_monitor.callbacks.keras: needs a backend of keras ({error}); set KERAS_BACKEND to one you have"
    raise MissingDependency(message) from error

_RECORDING = tuple(
    getattr(keras.callbacks, name) for name in ("CSVLogger", "History", "ProgbarLogger", "RemoteMonitor", "TensorBoard")
)
"""They write down the logs as they find them."""


class SpectralMonitor(Adapter, keras.callbacks.Callback):  # type: ignore[misc]
    """Follows the spectra of a model's weight matrices while `fit` trains it.

    `model.fit(…, callbacks=[SpectralMonitor(), …])` is all; it must stand before the callbacks that are to see its
    values. The `logs` of every epoch have the latest known model-level values as `ww_<metric>`, so that
    `EarlyStopping(monitor="ww_alpha", mode="min")`, `ModelCheckpoint`, `CSVLogger`, `History` and the progress bar see
    them; the logs of a batch have `ww_alpha` and whatever a later callback monitors. A value that a later callback
    monitors is measured at the end of every epoch, whatever the schedule. A metric that is not known yet is NaN, for
    `CSVLogger` takes its columns from the first epoch, except that a callback that monitors it finds no key, for
    `EarlyStopping` would take NaN for the best. `metrics=["alpha", "num_traps"]` keeps the progress bar short.
    `ww_history.jsonl` in `folder` holds everything and is read by `ww_monitor.History.read`. TensorBoard needs no
    TensorFlow: `sinks=[ww_monitor.sinks.tensorboard.TensorBoard("logs")]`. The metrics with unit, source and meaning
    are in the README's table.

    A step is an update of the weights: `optimizer.iterations`, of several optimizers the largest. A second `fit`
    continues the run where the optimizer does. Keras keeps no state of callbacks: to continue the history of a run
    that a checkpoint resumes, save `state_dict()` with it (a dict for JSON) and call `load_state_dict` before `fit`.

    Training is bit-identical with and without it. A failure inside becomes a status or one `SpectralWarning`. Where
    several processes train, all know the values and stop alike, and the first one writes.

    The arguments are described with `__init__`.
    """

    _epoch: int | None = None
    _begun = False
    _updates_done = 0
    _within_line = False

    @method_taking(KerasOptions)
    def __init__(self, given: KerasOptions) -> None:
        """Check every argument now, not at the first step.

        Raises:
            InvalidArgument: naming the argument, its value and the choices.
        """
        super().__init__(**CallbackOptions.of(given).keywords())
        self._folder = Path(given.folder)
        self._known: dict[str, float] = {}
        self._unknown: dict[str, float] = {}
        self._watched: set[str] = set()

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Close what a run that died has left open, and look who else is there."""
        self._close()
        self._begun = False
        with self.monitor.guard("looking at the other callbacks", always=True):
            calling = calling_object(keras.callbacks.CallbackList)
            self._look_around([] if calling is None else list(calling.callbacks))

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """First snapshot; not when training begins, because a later callback may restore weights then."""
        self._epoch, self._within_line = epoch, False
        if not self._begun:
            self._begin()

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """The weights before a step after which a snapshot is due, where updates are measured."""
        step, epoch, known = self._updates_done, self._epoch or 0, self.params or {}
        last = epoch + 1 == known.get("epochs") or self._watched or self.monitor.due_at_epoch_end(epoch, step + 1)
        self._before_step(lambda: self.model, step=step, last=bool(last) and batch + 1 == known.get("steps"))

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """A snapshot where one is due."""
        self._within_line = True
        if self.monitor.due(step := self._step()):
            self._observe(step)
        else:
            self._take(self.monitor.collect())
        if logs is not None:
            wanted = self._watched | {"ww_alpha"}
            logs.update({key: value for key, value in self._known.items() if key in wanted})

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """A snapshot where the epoch schedule or a later callback asks for one, and after the last step."""
        step = self._step()
        last = epoch + 1 == (self.params or {}).get("epochs") or self.model.stop_training
        if last or self._watched:
            self._observe(step, whole=True)
        elif self.monitor.due_at_epoch_end(epoch, step):
            self._observe(step)
        if logs is not None:
            logs.update({**self._unknown, **self._known})

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        """Last snapshot, where no hook above knew that the step was the last; the table; close the sinks."""
        self._within_line = False
        if self._begun:
            self._observe(self._step(), whole=True)
        self._show_table()
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, as JSON needs."""
        return self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run: the next `fit` appends to its history file in `folder`."""
        self._load_state(state_dict)

    def _begin(self) -> None:
        """Open the files; first snapshot, unless a continued run has it or the model has no weights yet."""
        self._begun, step = True, self._step()
        rank, ranks = _processes()
        self._open(step=step, folder=self._folder, print_line=self._print_line, rank=rank, ranks=ranks)
        self._known, self._unknown = {}, {}
        for snapshot in self.monitor.history:
            self._remember(snapshot)
        if self.model.built:
            self._observe(step, whole=True)
        self._announce()

    def _observe(self, step: int, *, whole: bool = False) -> None:
        """Look now; with `whole` wait for a snapshot of this step, unless there is one."""
        with self.monitor.timed():
            if whole:
                self._take(self.monitor.finish())
            if not (whole and self.monitor.is_seen(step)):  # `self.model` attaches the weights to the model on JAX
                self._take(self._snapshot(self.model, step=step, epoch=self._epoch, whole=whole))

    def _take(self, snapshots: Sequence[Snapshot]) -> None:
        """Remember what is known, stop if asked."""
        for snapshot in snapshots:
            self._remember(snapshot)
        reason = self.monitor.stop_reason
        if snapshots and reason and not self.model.stop_training:
            self.model.stop_training = True
            self._say(f"stopping at step {self._updates_done}: {reason}")

    def _remember(self, snapshot: Snapshot) -> None:
        """The values that go into logs, under names as Keras' own have."""
        shown = {_log_key(summary_key(metric)) for metric in snapshot.summary if self._shown.shows_of_model(metric)}
        values = {_log_key(key): value for key, value in snapshot.scalars(layers=False).items()}
        self._known.update({key: value for key, value in values.items() if key in shown | self._watched})
        self._unknown.update(dict.fromkeys(sorted(shown - self._watched), NAN))

    def _step(self) -> int:
        """Completed updates; where they cannot be read, as many as before."""
        with self.monitor.guard("reading optimizer.iterations", always=True):
            self._updates_done = completed_updates(self._model if keras.backend.backend() == "jax" else self.model)
        return self._updates_done

    def _look_around(self, callbacks: Sequence[Any]) -> None:
        """Note what later callbacks monitor; say which ones stand before this one and cannot see its values."""
        place = next((at for at, callback in enumerate(callbacks) if callback is self), 0)
        self._watched = {key for callback in callbacks[place + 1 :] if (key := _monitored(callback))}
        for callback in callbacks[:place]:
            name, key = type(callback).__name__, _monitored(callback)
            if key or isinstance(callback, _RECORDING):
                message = f"{name} stands before SpectralMonitor and cannot see {key or 'its values'}; put it after"
                self.monitor.say_once(f"order {name}", message)

    def _print_line(self, line: str) -> None:
        """A print that begins after the progress bar."""
        drawn = (self.params or {}).get("verbose") in (1, "auto")
        print(f"\n{line}" if drawn and self._within_line else line)
        self._within_line = False


def completed_updates(model: Any) -> int:
    """The updates that the optimizers of a model have done; of several, those of the one that has done most.

    Inside an epoch the JAX trainer keeps the counter in its state. It is read there, because attaching the whole
    state to the model after every batch would slow training down.

    Args:
        model: A compiled Keras model, also while it trains.
    """
    optimizers = [part for part in vars(model).values() if isinstance(part, keras.optimizers.Optimizer)]
    return max((_updates(model, optimizer) for optimizer in optimizers), default=0)


def _updates(model: Any, optimizer: Any) -> int:
    state = None if getattr(model, "_jax_state_synced", True) else getattr(model, "_jax_state", None)
    values = (state or {}).get("optimizer_variables")
    if not values or optimizer is not model.optimizer:
        return int(keras.ops.convert_to_numpy(optimizer.iterations))
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # the one that scales the loss has an idle counter too
    counter = next(variable for variable in inner.variables if variable.name == "iteration")
    place = next(at for at, variable in enumerate(optimizer.variables) if variable is counter)
    return int(values[place]) // (inner.gradient_accumulation_steps or 1)


def _log_key(key: str) -> str:
    """`ww_alpha` for `ww/alpha`."""
    return key.replace("/", "_")


def _monitored(callback: Any) -> str:
    """The value of ours that a callback monitors, or `""`."""
    key = getattr(callback, "monitor", "")
    return key if isinstance(key, str) and key.startswith(_log_key(summary_key(""))) else ""


def _processes() -> tuple[int, int]:
    """The number of this one among the processes that train, and how many of them torch.distributed joins.

    Processes of JAX each analyse their equal weights: torch cannot share the work among them.
    """
    if keras.backend.backend() == "jax":
        return int(sys.modules["jax"].process_index()), 1
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

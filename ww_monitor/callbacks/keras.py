"""The Keras 3 callback, for its torch, JAX and TensorFlow backends."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ww_monitor.callbacks._adapter import Adapter, calling_object, hook
from ww_monitor.callbacks._watched import Watched, fields_of
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

from ww_monitor.callbacks._keras_steps import StepChanges

_RECORDING = tuple(
    getattr(keras.callbacks, name) for name in ("CSVLogger", "History", "ProgbarLogger", "RemoteMonitor", "TensorBoard")
)
"""They write down the logs as they find them."""


class SpectralMonitor(Adapter, keras.callbacks.Callback):  # type: ignore[misc]
    """Follows the spectra of a model's weight matrices while `fit` trains it.

    `model.fit(…, callbacks=[SpectralMonitor(), …])` is all; it must stand before the callbacks that are to see its
    values. The `logs` of an epoch have the model-level values of its latest snapshot as `ww_<metric>`, so that
    `EarlyStopping(monitor="ww_alpha", mode="min")`, `ModelCheckpoint`, `CSVLogger`, `History` and the progress bar see
    them; the logs of a batch have `ww_alpha` and whatever a later callback monitors, as last known. A value that a
    later callback monitors, or has in the names of its files, is measured at the end of every epoch, whatever the
    schedule, and always there. Every other one is NaN in an epoch that has no snapshot, and where it is not known.
    `metrics=["alpha", "num_traps"]` keeps the progress bar short.

    `stop_on="traps"` ends a run whose trap persists. Keras' `EarlyStopping` waits for improvements, and the count of
    traps of a healthy run has none: let it watch `ww_trap_free_until` with `mode="max"`, the step up to
    which no trap was seen.

    `ww_history.jsonl` in `folder` holds everything and is read by `ww_monitor.History.read`. TensorBoard needs no
    TensorFlow: `sinks=[ww_monitor.sinks.tensorboard.TensorBoard("logs")]`. The metrics with unit, source and meaning
    are in `docs/metrics.md`.

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
    _saving: Sequence[Any] = ()
    _changes: StepChanges | None = None
    _is_taken = False

    @method_taking(KerasOptions)
    def __init__(self, given: KerasOptions) -> None:
        """Check every argument now, not at the first step.

        Raises:
            InvalidArgument: naming the argument, its value and the choices.
        """
        super().__init__(**CallbackOptions.of(given).keywords())
        self._folder = Path(given.folder)
        self._known: dict[str, float] = {}
        self._this_epoch: dict[str, float] = {}

    @hook
    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Close what a run that died has left open, and look who else is there."""
        self._close()
        self._begun = False
        with self.monitor.guard("looking at the other callbacks", always=True):
            calling = calling_object(keras.callbacks.CallbackList)
            self._look_around([] if calling is None else list(calling.callbacks))
            self._changes = StepChanges(self.monitor, lambda: self.model, self._step, self._how.get("split"))
            self._changes.stand_around(None if calling is None else calling.callbacks, taken=self._is_taken)

    @hook
    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """First snapshot; not when training begins, because a later callback may restore weights then."""
        self._epoch, self._within_line = epoch, False
        self._this_epoch = dict.fromkeys(self._this_epoch, NAN)
        if not self._begun:
            self._begin()

    @hook
    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """The weights before a step after which a snapshot is due, where updates are measured."""
        step, epoch, known = self._updates_done, self._epoch or 0, self.params or {}
        last = epoch + 1 == known.get("epochs") or self._watched or self.monitor.due_at_epoch_end(epoch, step + 1)
        self._before_step(lambda: self.model, step=step, last=bool(last) and batch + 1 == known.get("steps"))

    @hook
    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """A snapshot where one is due."""
        self._within_line = True
        due, read = self.monitor.due(step := self._step()), any(_saves_after(batch, one) for one in self._saving)
        if due or read:
            self._observe(step, whole=read)
        else:
            self._take(self.monitor.collect())
        if logs is not None:
            alpha = _log_key(self._name + summary_key("alpha"))
            logs.update({key: value for key, value in self._known.items() if key == alpha})
            logs.update(self._watched_values(step) if read else _as_logged(self._watched.values(self.monitor.history)))

    @hook
    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """A snapshot where the epoch schedule or a later callback asks for one, and after the last step."""
        step = self._step()
        last = epoch + 1 == (self.params or {}).get("epochs") or self.model.stop_training
        if last or self._watched:
            self._observe(step, whole=True)
        elif self.monitor.due_at_epoch_end(epoch, step):
            self._observe(step)
        if logs is not None:
            logs.update({**self._this_epoch, **self._watched_values(step)})

    @hook
    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        """Last snapshot, where no hook above knew that the step was the last; the end, behind the other callbacks."""
        self._within_line = False
        calling = calling_object(keras.callbacks.CallbackList)
        if self._begun:
            self._observe(self._step(), whole=True)
        if calling is None or calling.callbacks[-1] is self:
            self._end()
        else:
            calling.callbacks.append(_AtTheEnd(self))

    def _end(self) -> None:
        """A snapshot of the weights that somebody has put in place of the last step's; the table; close the sinks."""
        if self._begun and self._are_exchanged(self.model, step := self._step()):
            self._observe(step, whole=True, again=True)
        self._show_table()
        self._close()

    @hook
    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, as JSON needs."""
        return self._state()

    @hook
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run: the next `fit` appends to its history file in `folder`."""
        self._load_state(state_dict)

    def _begin(self) -> None:
        """Open the files; first snapshot, unless a continued run has it or the model has no weights yet."""
        self._begun, step = True, self._step()
        rank, ranks = _processes()
        self._open(step=step, folder=lambda: self._folder, print_line=self._print_line, rank=rank, ranks=ranks)
        self._known = {}
        for snapshot in self.monitor.history:
            self._remember(snapshot)
        if self.model.built:
            self._observe(step, whole=True)
        self._announce()

    def _act_on(self, optimizers: Sequence[Any]) -> None:
        with self.monitor.guard("actions", always=True):
            if self._changes is not None:
                self._changes.start()

    def _close(self) -> None:
        with self.monitor.guard("actions", always=True):
            if self._changes is not None:
                self._changes.close()
        super()._close()

    def _observe(self, step: int, *, whole: bool = False, again: bool = False) -> None:
        """Look now; with `whole` wait for a snapshot of this step, unless there is one."""
        with self.monitor.timed():
            if whole:
                self._take(self.monitor.finish())
            # `self.model` attaches the weights to the model on JAX
            if again or not (whole and self.monitor.is_seen(step)):
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
        """The values that go into logs, under names as Keras' own have; one that is not known is NaN in an epoch's."""
        metrics = [name for name in snapshot.summary if self._shown.shows_of_model(name) or name in self._watched.worst]
        keys = sorted(_log_key(self._name + summary_key(metric)) for metric in metrics)
        values = _as_logged(self._values(snapshot, layers=False))
        self._known = {key: value for key, value in values.items() if key in keys}
        self._this_epoch = dict.fromkeys([*self._this_epoch, *keys], NAN)
        if snapshot.epoch == self._epoch:
            self._this_epoch.update(self._known)

    def _watched_values(self, step: int) -> dict[str, float]:
        """What later callbacks act on, of the weights of this step."""
        values = self._watched.values(self.monitor.history, step)
        if message := self._watched.lost(self.monitor.history, step, values, _log_key):
            self.monitor.say_once("lost values", message)
        return _as_logged(values)

    def _step(self) -> int:
        """Completed updates; where they cannot be read, as many as before."""
        with self.monitor.guard("reading optimizer.iterations", always=True):
            self._updates_done = completed_updates(self._model if keras.backend.backend() == "jax" else self.model)
        return self._updates_done

    def _look_around(self, callbacks: Sequence[Any]) -> None:
        """Note what later callbacks watch; say which ones stand before this one and cannot see its values."""
        self._keep_apart(callbacks)
        place = next((at for at, callback in enumerate(callbacks) if callback is self), 0)
        others = [one for one in callbacks[:place] if isinstance(one, SpectralMonitor)]
        self._is_taken = any(other.monitor.acting.acts for other in others)
        names = self._model_metrics
        ours = {_log_key(key): key for key in (self._name + summary_key(name) for name in names)}
        found = [(one, key) for one in callbacks for key in _watched_by(one) if key in ours]
        later = [(one, key) for one, key in found if one in callbacks[place + 1 :]]
        self._watched = Watched(self._name, {ours[key]: _worst(one) for one, key in later}, names)
        self._saving = [one for one, _ in later if isinstance(getattr(one, "save_freq", None), int)]
        stoppers = [(one, key) for one, key in later if isinstance(one, keras.callbacks.EarlyStopping)]
        for advice in self._watched.advice(stoppers, _log_key):
            self.monitor.say_once(advice, advice)
        for callback in callbacks[:place]:
            name, seen = type(callback).__name__, next((key for one, key in found if one is callback), "")
            if seen or isinstance(callback, _RECORDING):
                message = f"{name} stands before SpectralMonitor and cannot see {seen or 'its values'}; put it after"
                self.monitor.say_once(f"order {name}", message)

    def _print_line(self, line: str) -> None:
        """A print that begins after the progress bar."""
        drawn = (self.params or {}).get("verbose") in (1, "auto")
        print(f"\n{line}" if drawn and self._within_line else line)
        self._within_line = False


class _AtTheEnd(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends a monitor once every callback of the run has ended: `EarlyStopping` restores the best weights only then.

    Args:
        watching: The monitor.
    """

    def __init__(self, watching: SpectralMonitor) -> None:
        super().__init__()
        self._watching: SpectralMonitor | None = watching

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        """Once: the list of callbacks may serve another run."""
        watching, self._watching = self._watching, None
        if watching is not None:
            with watching.monitor.guard("on_train_end"):
                watching._end()


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


def _as_logged(values: Mapping[str, float]) -> dict[str, float]:
    return {_log_key(key): value for key, value in values.items()}


def _watched_by(callback: Any) -> list[str]:
    """The keys that a callback acts on: what it monitors, and what the names of its files have in them."""
    monitor = getattr(callback, "monitor", None)
    return ([monitor] if isinstance(monitor, str) else []) + fields_of(getattr(callback, "filepath", None))


def _saves_after(batch: int, checkpoint: Any) -> bool:
    """Whether a checkpoint that is saved every so many batches is saved after this one."""
    seen, last = (getattr(checkpoint, name, 0) for name in ("_batches_seen_since_last_saving", "_last_batch_seen"))
    return bool(seen + batch - (last if last is not None and last < batch else -1) >= checkpoint.save_freq)


def _worst(watcher: Any) -> float:
    """The worst there is for a watcher: no improvement."""
    return -math.inf if getattr(watcher, "mode", "min") == "max" else math.inf


def _processes() -> tuple[int, int]:
    """The number of this one among the processes that train, and how many of them torch.distributed joins.

    Processes of JAX each analyse their equal weights: torch cannot share the work among them.
    """
    if keras.backend.backend() == "jax":
        return int(sys.modules["jax"].process_index()), 1
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

"""The Hugging Face callback: for `transformers.Trainer` and its subclasses, such as TRL's."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from ww_monitor.callbacks._adapter import Adapter, calling_object, hook
from ww_monitor.callbacks._watched import Watched
from ww_monitor.errors import MissingDependency
from ww_monitor.record import NAN, Snapshot, summary_key
from ww_monitor.sinks.trackers import dashboard_of, uncounted_by_trackio

try:
    from transformers.trainer_callback import (
        CallbackHandler,
        EarlyStoppingCallback,
        PrinterCallback,
        ProgressCallback,
        TrainerCallback,
    )
except ImportError as error:
    raise MissingDependency(
        "ww_monitor.callbacks.huggingface: needs transformers; pip install 'ww-monitor[huggingface]'"
    ) from error

_PRINTING = (PrinterCallback, ProgressCallback)
"""They print every value of every log as one line: right for a loss, not for every metric of every layer."""


class SpectralMonitor(Adapter, TrainerCallback):
    """Follows the spectra of a model's weight matrices while a Trainer trains it.

    `Trainer(callbacks=[SpectralMonitor()])` is all. Model-level values go to the Trainer's trackers (`report_to`) as
    `ww/<metric>` and layers as `ww_<metric>/<layer>`, under the prefix `train/` that the trackers give to everything
    that is not an evaluation; TensorBoard and W&B get more than numbers (see `ww_monitor.sinks.tensorboard.Dashboard`
    and `ww_monitor.sinks.wandb.Dashboard`).
    `trainer.state.log_history` has the model-level values. `ww_history.jsonl` in `args.output_dir` holds everything
    and is read by `ww_monitor.History.read`. The metrics with unit, source and meaning are in `docs/metrics.md`.

    While it trains, every evaluation has the latest model-level values as `eval_ww_<metric>`, so that
    `metric_for_best_model="ww_alpha"` works for the best checkpoint and for `EarlyStoppingCallback`, which must stand
    after this callback. Say `greater_is_better` too: the Trainer takes `True` unless told. A metric that is watched so
    is measured at every evaluation, whatever the schedule, because a checkpoint is chosen by it.

    `stop_on="traps"` ends a run whose trap persists. `EarlyStoppingCallback` waits for improvements, and the count of
    traps of a healthy run has none: let it watch `ww_trap_free_until` (greater is better), the step up to
    which no trap was seen.

    A step is an optimizer step. `stop_on` ends the run after a step, the first one at the earliest. A resumed run
    continues its history, with `restore_callback_states_from_checkpoint` or without.

    Training is bit-identical with and without it. A failure inside becomes a status or one `SpectralWarning`.

    The arguments are described with `__init__`.
    """

    _prefix = "train/"
    _handler: CallbackHandler | None = None
    _training = False
    _begun = False

    def attach(self, trainer: Any) -> SpectralMonitor:
        """Watch `trainer`: joins its callbacks if it is not among them.

        Needed only for a trainer that was made without this callback.

        Args:
            trainer: A `transformers.Trainer`.

        Returns:
            This callback.
        """
        self._handler = trainer.callback_handler
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        return self

    @hook
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the files; what a run that died has left open is closed first."""
        self._close()
        self._known: dict[str, float] = {}
        self._training, self._begun = True, False
        self._handler = calling_object(CallbackHandler) or self._handler
        callbacks = self._handler.callbacks if self._handler else ()
        self._keep_apart(callbacks)
        self._number_among(callbacks)
        if (key := self._key_among(state.stateful_callbacks, callbacks)) in state.stateful_callbacks:
            self._load_state(state.stateful_callbacks.pop(key).get("attributes", {}))
            # Under the key of today: it may have stood under that of the last release.
            state.stateful_callbacks[self._key] = _WhenSaved(self._state)
        self._open(
            step=state.global_step,
            folder=lambda: Path(args.output_dir),
            print_line=_print_line,
            rank=args.process_index,
            ranks=args.world_size,
            optimizers=[kwargs.get("optimizer")],
        )
        self._check_surroundings(args)

    @hook
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """First snapshot; not when training begins, because trackers that stand later have not begun then."""
        if not self._begun:
            self._begin(args, state, control, **kwargs)

    @hook
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights before a step after which a snapshot is due, where updates are measured."""
        # The epoch is a rounded fraction: after 5 of 6 steps, 3 an epoch, 5/3 + 1/3 may be less than 2.
        step, done = state.global_step, (state.epoch or 0.0) + 1e-6
        ends = step > 0 and int(done + done / step) > int(done)  # of an epoch: the steps before it were of one size
        last = step + 1 >= state.max_steps or (ends and self.monitor.due_at_epoch_end(int(done), step + 1))
        self._before_step(lambda: kwargs["model"], step=step, last=last, optimizers=(kwargs.get("optimizer"),))

    @hook
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A snapshot where one is due, and after the last step, before its evaluation and its checkpoint."""
        # `DefaultFlowCallback`, which is the first of all, has set it at the last step.
        last = control.should_training_stop and not self._is_seen(state)
        if self.monitor.due(state.global_step) or last:
            self._observe(args, state, control, whole=last, **kwargs)
        else:
            self._publish(args, state, control, self.monitor.collect(), **kwargs)
        return self._stop_if_asked(state, control)

    @hook
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A snapshot where the epoch schedule asks for one."""
        if self.monitor.due_at_epoch_end(_epoch(state), state.global_step):
            self._observe(args, state, control, **kwargs)
        return self._stop_if_asked(state, control)

    @hook
    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Add the model-level values to the evaluation's."""
        if not self._training or metrics is None:
            return
        if not self._begun:
            self._begin(args, state, control, **kwargs)
        watched = self._watched_key(args)
        if watched and not self._is_seen(state):
            self._observe(args, state, control, whole=True, **kwargs)
        known = {**self._known, **self._watched.values(self.monitor.history, state.global_step)}
        values = {_evaluation_key(key): value for key, value in known.items() if value == value}
        if watched and watched not in values:
            values[watched] = self._worst(args, watched)
        if state.is_hyper_param_search:  # the default objective is the sum of all metrics
            values = {watched: values[watched]} if watched else {}
        metrics.update(values)

    @hook
    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Last snapshot, where `on_step_end` did not know that the step was the last.

        The Trainer's closing log comes before it loads the best model and before the trackers close.
        """
        if self._training and "train_runtime" in (logs or {}) and not self._is_seen(state):
            self._observe(args, state, control, whole=True, **kwargs)

    @hook
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A snapshot where the weights are not those of the last step, but no better checkpoint's; close the sinks."""
        if not args.load_best_model_at_end and self._are_exchanged(kwargs["model"], state.global_step):
            self._observe(args, state, control, whole=True, **kwargs)
        self._show_table()
        self._close()

    def _close(self) -> None:
        self._training = False
        super()._close()

    def _is_seen(self, state: Any) -> bool:
        return self.monitor.is_seen(state.global_step)

    def _begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """First snapshot, unless a resumed run has it."""
        self._begun = True
        if self._is_seen(state):
            self._known = self._values(self.monitor.history.last, layers=False)
        else:
            self._observe(args, state, control, whole=True, **kwargs)
        self._announce()

    def _observe(self, args: Any, state: Any, control: Any, *, whole: bool = False, **kwargs: Any) -> None:
        """Look now, in every process alike, and publish what is complete."""
        with self.monitor.timed():
            step = state.global_step
            snapshots = self._snapshot(kwargs["model"], step=step, epoch=_epoch(state), whole=whole)
            self._publish(args, state, control, snapshots, **kwargs)

    def _publish(self, args: Any, state: Any, control: Any, snapshots: Sequence[Snapshot], **kwargs: Any) -> None:
        """Into the evaluation's values, the log and the trackers, each snapshot at its own step."""
        with self.monitor.timed():
            for snapshot in snapshots:
                values = self._shown_values(snapshot, layers=False)
                self._known = self._values(snapshot, layers=False)
                if values:
                    state.log_history.append({**values, "epoch": state.epoch or 0, "step": snapshot.step})
                self._log(args, state, control, snapshot, **kwargs)
            if snapshots:
                # no class name in the key: the Trainer replaces callbacks whose class it finds there by new ones
                state.stateful_callbacks[self._key] = _WhenSaved(self._state)

    def _log(self, args: Any, state: Any, control: Any, snapshot: Snapshot, **kwargs: Any) -> None:
        """Hand the values to every tracker, in every process, as the Trainer does with its loss.

        Not by `trainer.log`: that would count as the loss log of the step, which then were lost, and TRL's trainers
        flush their running means with every log. Here a tracker that raises costs itself only.
        """
        logs, then = self._shown_values(snapshot), copy(state)  # trackers take the step from the state
        then.global_step = snapshot.step
        for callback in self._handler.callbacks if self._handler and logs else ():
            if isinstance(callback, _PRINTING):
                continue
            what, board = f"callback {type(callback).__name__}", None
            if state.is_world_process_zero:
                with self.monitor.guard(f"dashboard of {what}", key=f"dashboard {id(callback)}", always=True):
                    board = dashboard_of(tracker := _tracker(callback))
                    keyed = {self._prefix + key: value for key, value in logs.items()}
                    self._dashboards.update(tracker, snapshot, then.global_step, keyed)
            if board is not None and board.carries_values:
                continue
            with self.monitor.guard(what, key=f"callback {id(callback)}", always=True), uncounted_by_trackio():
                callback.on_log(args, then, control, logs=dict(logs), **kwargs)  # some take values out of theirs

    def _stop_if_asked(self, state: Any, control: Any) -> Any:
        reason = self.monitor.stop_reason
        if reason and not control.should_training_stop:
            control.should_training_stop = True
            self._say(f"stopping at step {state.global_step}: {reason}")
        return control

    def _watched_key(self, args: Any) -> str:
        """The evaluation key that `metric_for_best_model` names, if it is one of ours."""
        wanted = args.metric_for_best_model or ""
        key = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
        ours = [self._name + summary_key(name) for name in self._model_metrics]
        found = next((one for one in ours if _evaluation_key(one) == key), "")
        watched = Watched(self._name, {found: NAN} if found else {}, self._model_metrics)
        if watched.worst.keys() != self._watched.worst.keys():  # else the old one goes on to count its readings
            self._watched = watched
        return key if found else ""

    def _worst(self, args: Any, key: str) -> float:
        """What stands for a watched value that is not known yet: no improvement, as in the Trainer's own start value.

        Without the key the Trainer ends the run by a KeyError.
        """
        name = key.removeprefix("eval_")
        self.monitor.say_once(f"unknown {key}", f"{name} is not known for this model so far; it counts as the worst")
        return -math.inf if args.greater_is_better else math.inf

    def _check_surroundings(self, args: Any) -> None:
        """Say what would otherwise go wrong without a word."""
        if self._handler is None:
            message = "found no Trainer around this callback: no tracker gets its values; call attach(trainer)"
            self.monitor.say_once("no trainer", message)
            return
        callbacks = self._handler.callbacks
        before = callbacks[: next((at for at, callback in enumerate(callbacks) if callback is self), 0)]
        watched = self._watched_key(args)
        stoppers = [(callback, watched) for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
        for advice in self._watched.advice(stoppers, _evaluation_key):
            self.monitor.say_once(advice, advice)
        if watched and any(isinstance(callback, EarlyStoppingCallback) for callback in before):
            message = f"EarlyStoppingCallback stands before SpectralMonitor and cannot see {watched}; put it after"
            self.monitor.say_once("order", message)


class _WhenSaved(Mapping[str, Any]):
    """A callback's state as the Trainer saves it, made at the moment when it is: a checkpoint copies it deeply.

    Not an `ExportableState` of the Trainer's: it fails with a checkpoint from before the callback joined, and puts a
    new callback, which nobody holds, in the place of ours.

    Args:
        make: Makes the attributes.
    """

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self._make = make

    def __getitem__(self, key: str) -> Any:
        return self._made()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("args", "attributes"))

    def __len__(self) -> int:
        return 2

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return self._made()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._made(),)

    def _made(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self._make()}  # as an `ExportableState` has them


def _tracker(callback: Any) -> Any:
    """What a callback of the Trainer writes to and a dashboard knows: an attribute, or the `run` of one (W&B)."""
    held = list(vars(callback).values())
    candidates = (*held, *(getattr(one, "run", None) for one in held))
    return next((tracker for tracker in candidates if dashboard_of(tracker)), None)


def _epoch(state: Any) -> int:
    """The number of the last step's epoch, from 0; the Trainer counts in epochs done, with fractions."""
    return max(0, math.ceil(state.epoch or 0) - 1)


def _evaluation_key(key: str) -> str:
    """`eval_ww_alpha` for `ww/alpha`: a name that `metric_for_best_model` can hold."""
    return f"eval_{key.replace('/', '_')}"


def _print_line(line: str) -> None:
    """A print that leaves the Trainer's progress bar whole."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line)
    else:
        print(line)

"""Rates and decays by layer in Keras, whose optimizers have one of each for all variables, compiled into the step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import torch

from ww_monitor.monitor import Monitor
from ww_monitor.walk.keras import Holder, holders
from ww_monitor.walk.parts import Split

_LINEAR = ("SGD", "Adam", "AdamW", "Nadam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Lion", "Muon")
"""Optimizers whose step is their rate times a direction in which it has no part; those of Adafactor, Lamb, Ftrl and
ScheduleFreeAdamW are not, and of MultiOptimizer it depends on the others."""


@dataclass(frozen=True)
class _Before:
    """A variable before a step, and what the step is to be multiplied by.

    Attributes:
        variable: Of the model.
        value: A copy of its value W.
        rate: The factor r on the learning rate.
        pull: The share of the optimizer's decay that is to be taken off, 1 − d; 0 for a variable that has none.
    """

    variable: Any
    value: Any
    rate: float
    pull: float


class ScaledSteps:
    """Makes of each update W → W′ in `fit` the one of an optimizer with a rate and a decay for each matrix.

    With the factors r on the rate η and d on the decay w it is W + r·(W′ − W + (1 − d)·η·w·W): the optimizers in
    `_LINEAR` move by η times a direction and decay by η·w·W. The weights are copied before a step and changed after it,
    so that rates, schedules and checkpoints are those of the optimizer. A weight that the step has left alone stays,
    and so does, at the base, one with a constraint: what W′ was before it was projected is not known.

    Args:
        model: Returns the compiled model, with its weights attached to it, while it trains.
        factor: Names of the matrices of a variable → factors by option.
        options: Those that are heard: `lr`, `weight_decay`.
        split: As the monitor has it.
    """

    unheard: ClassVar[str] = "they have LoRA or a constraint"

    def __init__(
        self,
        model: Callable[[], Any],
        factor: Callable[[Sequence[str]], Mapping[str, float]],
        options: Collection[str],
        split: Split | None = None,
    ) -> None:
        self._model, self._factor, self._options, self._split = model, factor, options, split
        self._optimizer = _inner(model().optimizer)
        # private: what a schedule gives depends on when it is asked, what a number is may be changed by any callback
        self._scheduled = isinstance(self._optimizer._learning_rate, keras.optimizers.schedules.LearningRateSchedule)
        self._before: list[_Before] = []
        self._step, self._rate = 0, 0.0
        self._asked = self._changed = False
        self._look()

    def _look(self) -> None:
        """Find the variables of the model."""
        self._holders = holders(self._model(), split=self._split)

    @property
    def _stepped(self) -> list[Holder]:
        return [one for one in self._holders if one.trained and one.variable.constraint is None]

    @property
    def names(self) -> list[str]:
        """The matrices that are stepped, or need not be because they are frozen."""
        # asked when factors have changed: layers may have got their weights since, in their first call
        self._look()
        return [name for one in (*self._stepped, *(one for one in self._holders if one.frozen)) for name in one.names]

    @property
    def is_idle(self) -> bool:
        """Whether steps were to be changed, and none was."""
        return self._asked and not self._changed

    def _heard(self, names: Sequence[str]) -> tuple[float, float]:
        """The factors on the rate and on the decay of a variable."""
        factors = self._factor(names)
        rate, decay = (
            factors.get(option, 1.0) if option in self._options else 1.0 for option in ("lr", "weight_decay")
        )
        return rate, decay

    def remove(self) -> None:
        """Forget a step that is under way."""
        self._before = []

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Copy what will be changed after the step.

        Args:
            step: Completed updates.
        """
        self._before, self._step = [], step
        asked = [(one.variable, *self._heard(one.names)) for one in self._stepped]
        asked = [(variable, rate, decay) for variable, rate, decay in asked if (rate, decay) != (1, 1)]
        if not asked:
            return
        self._model()  # on JAX the values are elsewhere until it is asked for
        if self._scheduled:
            self._rate = _number(self._optimizer.learning_rate)
        for variable, rate, decay in asked:
            # private: which variables have no decay is known to the optimizer alone
            pull = 1 - decay if decay != 1 and self._optimizer._use_weight_decay(variable) else 0.0
            # a copy: the step of JAX deletes what it was given, that of torch writes over it
            self._before.append(_Before(variable, keras.ops.copy(variable.value), rate, pull))
        self._asked = True

    @torch.no_grad()
    def after(self, step: int) -> str:
        """Change the step that was made, if it was one.

        Args:
            step: Completed updates.

        Returns:
            Why nothing was changed, or `""`.
        """
        before, self._before = self._before, []
        if not before or step == self._step:  # gradients were accumulated, or not finite
            return ""
        if step != self._step + 1:
            return f"expected one update of the weights a batch, got {step - self._step}"
        self._model()
        decay = 0.0
        if any(one.pull for one in before):  # else a rate that is a function of the user's is left alone
            rate = self._rate if self._scheduled else _number(self._optimizer.learning_rate)
            decay = rate * float(self._optimizer.weight_decay)
        for one in before:
            wide = "float64" if one.variable.dtype == "float64" else "float32"
            old, new = (keras.ops.cast(value, wide) for value in (one.value, one.variable.value))
            step_made = new - old
            if one.pull:  # nothing decays what has no gradient
                moved = keras.ops.cast(keras.ops.any(step_made != 0), wide)
                step_made = step_made + one.pull * decay * moved * old
            one.variable.assign(keras.ops.cast(old + one.rate * step_made, one.variable.dtype))
        self._changed = True
        return ""


class _Around(keras.callbacks.Callback):  # type: ignore[misc]
    """Stands before or behind all callbacks of a run, so that what they do to weights and rates is no part of a step.

    Args:
        begin: What to do before each step, at the end of the list.
        end: What to do after it, at its beginning.
    """

    def __init__(self, *, begin: Callable[[], None] | None = None, end: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Behind the others."""
        if self.begin is not None:
            self.begin()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Before the others."""
        if self.end is not None:
            self.end()


class StepChanges:
    """What a callback does in one run for `actions`: nothing where they are dry runs.

    Args:
        monitor: That of the callback.
        model: Returns the compiled model, with its weights attached to it.
        updates: Returns the number of completed updates.
        split: As the monitor has it.
    """

    def __init__(
        self, monitor: Monitor, model: Callable[[], Any], updates: Callable[[], int], split: Split | None
    ) -> None:
        self._monitor, self._model, self._updates, self._split = monitor, model, updates, split
        self._steps: ScaledSteps | None = None
        self._around: list[_Around] = []
        self._callbacks: list[Any] | None = None
        self._taken = ""

    def stand_around(self, callbacks: list[Any] | None, *, taken: bool) -> None:
        """Be the last to be called before a step, and the first after it.

        Args:
            callbacks: The list that is gone through at each step, if there is one.
            taken: Whether another monitor acts on the model.
        """
        self._callbacks = callbacks
        self._taken = "another monitor acts on this model; give it the actions of both" if taken else ""
        if self._monitor.acting.acts and callbacks is not None and not taken:
            self._around = [_Around(begin=self._begin), _Around(end=self._end)]
            callbacks.append(self._around[0])

    def start(self) -> None:
        """Say what cannot be done, and do the rest from now on."""
        acting = self._monitor.acting
        if acting.acts:
            taken = self._taken or ("" if self._around else "expected callbacks that `fit` calls, got none")
            against = {option: taken or reason for option, reason in reasons_against(self._model()).items()}
            heard = [option for option, reason in against.items() if not reason]
            self._steps = ScaledSteps(self._model, acting.factor, heard, self._split) if heard else None
            acting.attach_to(self._steps, against)

    def close(self) -> None:
        """The run is over: a list of callbacks may serve another."""
        for one in self._around:
            one.begin = one.end = None
        if self._steps is not None and self._steps.is_idle:
            self._monitor.say_once("idle", "actions have changed no step: the model's own optimizer has made none")
        self._steps = None

    def _begin(self) -> None:
        if self._steps is not None:
            with self._monitor.guard("actions", always=True):
                # not when training began: whoever stands in a list that grows before it is called twice
                if self._callbacks is not None and self._callbacks[0] is not self._around[1]:
                    self._callbacks.insert(0, self._around[1])
                self._steps.before(self._updates())

    def _end(self) -> None:
        if self._steps is not None:
            with self._monitor.guard("actions", always=True):
                reason = self._steps.after(self._updates())
                if reason:
                    self._monitor.say_once("no steps", f"actions leave a step as it is: {reason}")


def reasons_against(model: Any) -> dict[str, str]:
    """Why steps of a compiled model cannot be scaled so: `lr` and `weight_decay` → the reason, or `""`.

    Args:
        model: The model.
    """
    optimizer = _inner(model.optimizer)
    several = {id(part) for part in vars(model).values() if isinstance(part, keras.optimizers.Optimizer)}
    kind, reason, decay = type(optimizer), "", ""
    if optimizer is None or len(several) > 1:
        reason = f"expected one optimizer, got {'none' if optimizer is None else len(several)}"
    elif not (kind.__name__ in _LINEAR and kind.__module__.startswith("keras.")):  # each backend has its own classes
        reason = f"expected an optimizer whose step is its rate times a direction, got {kind.__name__}"
    elif optimizer.use_ema:
        reason = "expected an optimizer without averages of the weights, got use_ema=True"
    elif getattr(model, "steps_per_execution", 1) != 1:
        reason = f"expected steps_per_execution=1, got {model.steps_per_execution}"
    elif hasattr(optimizer, "adam_weight_decay"):
        decay = f"expected one weight_decay for all variables, got two in {kind.__name__}"
    elif not optimizer.weight_decay:
        decay = f"expected an optimizer with weight_decay, got {kind.__name__} without"
    elif _is_function(optimizer):
        decay = "expected a learning_rate that is a number or a schedule, got a function"
    return {"lr": reason, "weight_decay": reason or decay}


def _inner(optimizer: Any) -> Any:
    """The optimizer, without what scales the loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _is_function(optimizer: Any) -> bool:
    """Whether the rate is a function of the user's, which may count how often it is asked."""
    # private: the public property calls it
    rate = optimizer._learning_rate
    schedules = keras.optimizers.schedules.LearningRateSchedule
    return callable(rate) and not isinstance(rate, (keras.Variable, schedules))


def _number(value: Any) -> float:
    return float(keras.ops.convert_to_numpy(value))

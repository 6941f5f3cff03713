"""Rates and decays by layer in Keras, whose optimizers have one of each for all variables, compiled into the step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch

from ww_monitor.walk.keras import trainable_matrices
from ww_monitor.walk.parts import Split


@dataclass(frozen=True)
class _Before:
    """A variable before a step, and what the step is to be multiplied by.

    Attributes:
        variable: Of the model.
        value: A copy of its value W.
        rate: The factor r on the learning rate.
        pull: What the decay that is asked for takes more than the optimizer's own, in units of W: (1 − d) η w.
    """

    variable: Any
    value: Any
    rate: float
    pull: float


class ScaledSteps:
    """Makes of each update W → W′ in `fit` the one of an optimizer with a rate and a decay for each matrix.

    With the factors r on the rate η and d on the decay w it is W + r·(W′ − W + (1 − d)·η·w·W): Keras' optimizers move
    by η times a direction that does not depend on η, and decay by η·w·W. The weights are copied before a step and
    changed after it, so that rates, schedules and checkpoints are those of the optimizer.

    Args:
        model: The compiled model, while it trains.
        factor: Names of the matrices of a variable → factors by option.
        options: Those that are heard: `lr`, `weight_decay`.
        split: As the monitor has it.
    """

    def __init__(
        self,
        model: Any,
        factor: Callable[[Sequence[str]], Mapping[str, float]],
        options: Collection[str],
        split: Split | None = None,
    ) -> None:
        self._optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # of one that scales the loss
        self._model, self._split, self._factor, self._options = model, split, factor, options
        self._known: list[tuple[Any, list[str]]] = []
        self._before: list[_Before] = []
        self._step = 0

    @property
    def _variables(self) -> list[tuple[Any, list[str]]]:
        self._known = self._known or trainable_matrices(self._model, split=self._split)  # a model may have none yet
        return self._known

    @property
    def names(self) -> list[str]:
        """The matrices whose variables are stepped."""
        return [name for _, names in self._variables for name in names]

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
    def before(self, model: Callable[[], Any], step: int) -> None:
        """Copy what will be changed after the step.

        Args:
            model: Returns the model, with its weights attached to it.
            step: Completed updates.
        """
        self._before, self._step = [], step
        asked = [(variable, self._heard(names)) for variable, names in self._variables]
        if all(factors == (1, 1) for _, factors in asked):
            return
        model()  # on JAX the values are elsewhere until it is asked for
        decay = 0.0
        if any(kept != 1 for _, (_, kept) in asked):  # a schedule is read before the step, which counts on
            decay = _number(self._optimizer.learning_rate) * _number(self._optimizer.weight_decay)
        for variable, (rate, kept) in asked:
            # private: which variables have no decay is known to the optimizer alone
            pull = (1 - kept) * decay if decay and self._optimizer._use_weight_decay(variable) else 0.0
            if rate != 1 or pull:
                # a copy: the step of JAX deletes what it was given, that of torch writes over it
                self._before.append(_Before(variable, keras.ops.copy(variable.value), rate, pull))

    @torch.no_grad()
    def after(self, model: Callable[[], Any], step: int) -> str:
        """Change the step that was made, if it was one.

        Args:
            model: Returns the model, with its weights attached to it.
            step: Completed updates.

        Returns:
            Why nothing was changed, or `""`.
        """
        before, self._before = self._before, []
        if not before or step == self._step:  # gradients were accumulated, or not finite
            return ""
        if step != self._step + 1:
            return f"expected one update of the weights a batch, got {step - self._step}"
        model()
        for one in before:
            wide = "float64" if one.variable.dtype == "float64" else "float32"
            old, new = (keras.ops.cast(value, wide) for value in (one.value, one.variable.value))
            value = old + one.rate * (new - old + one.pull * old)
            one.variable.assign(keras.ops.cast(value, one.variable.dtype))
            if one.variable.constraint is not None:
                one.variable.assign(one.variable.constraint(one.variable))
        return ""


def reasons_against(model: Any) -> dict[str, str]:
    """Why steps of a compiled model cannot be scaled so: `lr` and `weight_decay` → the reason, or `""`.

    Args:
        model: The model.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    several = sum(isinstance(part, keras.optimizers.Optimizer) for part in vars(model).values()) > 1
    reason, decay = "", ""
    if optimizer is None or several:
        reason = f"expected one optimizer, got {'several' if several else 'none'}"
    elif optimizer.use_ema:
        reason = "expected an optimizer without averages of the weights, got use_ema=True"
    elif isinstance(optimizer, keras.optimizers.Ftrl):
        reason = "expected an optimizer whose step is its rate times a direction, got Ftrl"
    elif getattr(model, "steps_per_execution", 1) != 1:
        reason = f"expected steps_per_execution=1, got {model.steps_per_execution}"
    elif hasattr(optimizer, "adam_weight_decay"):
        decay = f"expected one weight_decay for all variables, got two in {type(optimizer).__name__}"
    elif not optimizer.weight_decay:
        decay = f"expected an optimizer with weight_decay, got {type(optimizer).__name__} without"
    return {"lr": reason, "weight_decay": reason or decay}


def _number(value: Any) -> float:
    return float(keras.ops.convert_to_numpy(value))

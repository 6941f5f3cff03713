"""The actions of a run: their factors, and the optimizers that step by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import wraps
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch

from ww_monitor.actions.groups import NAMES
from ww_monitor.record import Action, Snapshot

Say = Callable[[str, str], None]
"""Takes a key and a message, which is said once a key."""


class Steps(Protocol):
    """What makes the steps of a run by the factors of its matrices.

    Attributes:
        unheard: What is said of layers that are not among its names.
    """

    unheard: ClassVar[str]

    @property
    def names(self) -> list[str]:
        """The matrices that it steps."""

    def remove(self) -> None:
        """The run is over."""


class Acting:
    """What `Monitor` knows of its actions.

    The factors change with a snapshot at which a multiple of `every` has been reached, and with no other: not with one
    that a resumed run begins with, nor with one for an evaluation. So a run that was cut goes on as it would have.

    Args:
        actions: Of the run.
        every: Steps between two changes; `None`, which only a dry run may have, for every snapshot.
        say: See `Say`.
        note: Takes a word, a message and a step for the history.
    """

    def __init__(
        self, actions: Sequence[Action], *, every: int | None, say: Say, note: Callable[[str, str, int | None], None]
    ) -> None:
        self.actions, self._every, self._say, self._note = tuple(actions), every, say, note
        self._steppers: list[Steps] = []
        self._asked = False
        self.restart()

    def of(self, say: Say, note: Callable[[str, str, int | None], None]) -> Acting:
        """A copy for another monitor, which says what there is to say."""
        made = copy(self)
        made._say, made._note = say, note
        return made

    def restart(self) -> None:
        """Another run begins."""
        self._factors: list[dict[str, float]] = [{} for _ in self.actions]
        self._changed_at: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_steppers": []}

    def see(self, snapshot: Snapshot) -> Snapshot:
        """Change the factors if it is time, and give the snapshot with those in force from now on."""
        if not self.actions:
            return snapshot
        if self._is_due(snapshot.step or 0):
            for at, action in enumerate(self.actions):
                found = {name: float(factor) for name, factor in action.factors(snapshot).items()}
                self._factors[at] = {name: factor for name, factor in found.items() if 0 <= factor < math.inf}
            self._warn_of_unheard()
            if self._changed_at is None:
                how = [f"{action!r} {'is logged only' if action.dry_run else 'acts'}" for action in self.actions]
                self._note("actions", "; ".join(how), snapshot.step)
            self._changed_at = snapshot.step or 0
        rows: dict[str, dict[str, float]] = {}
        for action, factors in zip(self.actions, self._factors, strict=True):
            for name, factor in factors.items():
                row = rows.setdefault(name, {})
                row[action.metric] = row.get(action.metric, 1.0) * factor
        return snapshot.with_metrics(rows)

    def _is_due(self, step: int) -> bool:
        if self._changed_at is None or self._every is None:
            return True
        return step // self._every > self._changed_at // self._every

    @property
    def acts(self) -> bool:
        """Whether anything but a dry run is asked for."""
        return not all(action.dry_run for action in self.actions)

    def attach(self, optimizers: Sequence[Any]) -> None:
        """Let optimizers step by the factors, those of before no longer."""
        self.detach()
        self._asked = True
        for action in self.actions if self.acts else ():
            usable = [one for one in map(_hookable, optimizers) if one is not None]
            groups = [group for one in usable for group in one.param_groups if group.get(NAMES)]
            if not action.dry_run and not any(action.option in group for group in groups):
                kinds = ", ".join(sorted({type(one).__name__ for one in optimizers})) or "none"
                self._say(
                    f"groups {action.option}",
                    f"{type(action).__name__} does nothing: expected an optimizer with {action.option} and a group for"
                    f" each matrix, got {kinds}; make its groups with ww_monitor.actions.param_groups(model)",
                )
        if self.acts:
            known = list({id(one): one for one in map(_hookable, optimizers) if one is not None}.values())
            others = [other for one in known for other in Stepper.of(one)]
            for other in others:
                other.remove()
            if others:
                said = "actions take an optimizer over from another monitor: one acts on it at a time"
                self._say("took over", f"{said}; give it the actions of both")
            self._steppers = [Stepper(one, self.factor) for one in known]

    def attach_to(self, stepper: Steps | None, against: Mapping[str, str]) -> None:
        """Let what is no optimizer of torch step by the factors.

        Args:
            stepper: What does; `None` where no option can be changed.
            against: Option → why it cannot be changed, or `""`.
        """
        self.detach()
        self._asked = True
        self._steppers = [] if stepper is None else [stepper]
        for action in self.actions:
            reason = against.get(action.option, f"expected factors on one of {', '.join(against)}")
            if reason and not action.dry_run:
                self._say(f"no {action.option}", f"{type(action).__name__} does nothing: {reason}")

    def detach(self) -> None:
        """The run is over: optimizers are as they were."""
        for stepper in self._steppers:
            stepper.remove()
        self._steppers = []

    def factor(self, names: Sequence[str]) -> dict[str, float]:
        """Option → factor of a group: of the mean of its matrices' factors, the product over the actions."""
        found: dict[str, float] = {}
        for action, factors in zip(self.actions, self._factors, strict=True):
            known = [factors[name] for name in names if name in factors]
            if known and not action.dry_run:
                found[action.option] = found.get(action.option, 1.0) * sum(known) / len(known)
        return found

    def _warn_of_unheard(self) -> None:
        """Say once which layers have a factor that no optimizer steps by."""
        if self.acts and not self._asked and self._changed_at is not None:
            self._say("no optimizer", "actions do nothing: expected an optimizer, got none; call act_on(optimizer)")
        heard = {name for stepper in self._steppers for name in stepper.names}
        pairs = zip(self.actions, self._factors, strict=True)
        deaf = sorted({name for one, factors in pairs if not one.dry_run for name in factors} - heard)
        if deaf and (heard or not any(isinstance(one, Stepper) for one in self._steppers)):
            for stepper in self._steppers[:1]:
                self._say("unheard", f"{len(deaf)} layers keep the base, such as {deaf[0]!r}: {stepper.unheard}")

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; empty where there is nothing to go on with."""
        if self._changed_at is None or not self.actions:
            return {}
        named = [type(action).__name__ for action in self.actions]
        return {"changed_at": self._changed_at, "factors": list(zip(named, self._factors, strict=True))}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with the factors of a checkpoint, of the actions that stand where they stood."""
        self.restart()
        for at, (name, factors) in enumerate(state.get("factors", ())[: len(self.actions)]):
            if type(self.actions[at]).__name__ == name:
                self._factors[at], self._changed_at = dict(factors), state["changed_at"]


class Stepper:
    """Multiplies options of the groups of one optimizer while it steps, but not while it runs its closure.

    What stands in a group outside of a step is what a scheduler has put there, also after a step that raised: hooks do
    not run then, so that `step` of this one optimizer is wrapped too.

    Args:
        optimizer: One of torch's.
        factor: Names of the matrices of a group → factors by option.
    """

    unheard: ClassVar[str] = (
        "they have no parameter group of their own; param_groups must be given the model that the monitor sees"
    )

    def __init__(self, optimizer: Any, factor: Callable[[Sequence[str]], Mapping[str, float]]) -> None:
        self._optimizer, self._factor = optimizer, factor
        self._put: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(lambda *_: self._lift()),
        ]
        self._before_us, self._ours = vars(optimizer).get("step"), self._wrapped(optimizer.step)
        optimizer.step = self._ours

    @classmethod
    def of(cls, optimizer: Any) -> list[Stepper]:
        """Those that an optimizer has."""
        owners = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
        return [owner for owner in owners if isinstance(owner, cls)]

    @property
    def names(self) -> list[str]:
        """The matrices that have a group."""
        return [name for group in self._optimizer.param_groups for name in group.get(NAMES, ())]

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self._lift()
        for handle in self._handles:
            handle.remove()
        if vars(self._optimizer).get("step") is self._ours:  # else a scheduler has wrapped it, and it does nothing now
            del self._optimizer.step
            if self._before_us is not None:
                self._optimizer.step = self._before_us

    def _wrapped(self, step: Callable[..., Any]) -> Any:
        """A method, as a scheduler expects it, with the marks that it has put on the other."""

        @wraps(step)
        def run(_: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            finally:
                self._lift()

        return MethodType(run, self._optimizer)

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._multiply()
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._around(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._around(kwargs["closure"])}
        return None

    def _around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._lift()
            result = closure(*args, **kwargs)
            self._multiply()
            return result

        return run

    def _multiply(self) -> None:
        self._lift()
        for group in self._optimizer.param_groups:
            for option, factor in self._factor(group[NAMES]).items() if group.get(NAMES) else ():
                if isinstance(group.get(option), int | float | torch.Tensor):
                    base, group[option] = group[option], group[option] * factor
                    self._put.append((group, option, base, group[option]))

    def _lift(self) -> None:
        for group, option, base, value in self._put:
            if group[option] is value:
                group[option] = base
        self._put = []


def _hookable(optimizer: Any) -> Any:
    """The optimizer of torch inside a trainer's wrappers, or `None`."""
    seen = set()
    while optimizer is not None and not hasattr(optimizer, "_optimizer_step_pre_hooks") and id(optimizer) not in seen:
        seen.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer if hasattr(optimizer, "_optimizer_step_pre_hooks") else None

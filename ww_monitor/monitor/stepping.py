"""What a monitor does around a step: `track_updates` copies the weights before it, `actions` change its rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ww_monitor.actions.acting import Acting
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.monitor.pacing import Pacing
from ww_monitor.monitor.queued import wait_for_queued
from ww_monitor.monitor.update import Before
from ww_monitor.settings import Select


class Stepping(Pacing):
    """The part of a `Monitor` that is called before updates."""

    select: Select
    acting: Acting

    def act_on(self, *optimizers: Any) -> None:
        """Let the optimizers of a loop of your own step by what `actions` say, until `close`; without, does nothing.

        Args:
            *optimizers: All of the run, with groups made by `ww_monitor.actions.param_groups`.

        >>> import torch
        >>> from ww_monitor import Monitor
        >>> from ww_monitor.actions import LayerwiseRate, param_groups
        >>> from ww_monitor.walk.torch import walk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
        >>> with Monitor(every_n_steps=100, actions=[LayerwiseRate(dry_run=False)]) as monitor:
        ...     monitor.act_on(optimizer)
        ...     for step in range(3):
        ...         snapshot = monitor.observe(walk(model), step=step) if monitor.due(step) else snapshot
        ...         model(torch.ones(1, 64)).sum().backward()
        ...         optimizer.step()
        >>> sorted(layer.value("rate_factor") for layer in snapshot.layers)
        [0.5, 1.5]
        """
        with self.guard("actions", always=True):
            self.acting.attach(optimizers)

    @contextmanager
    def step(
        self,
        matrices: Iterable[Matrix | Skipped],
        *,
        step: int,
        optimizers: Sequence[Any] = (),
        due: bool | None = None,
    ) -> Iterator[None]:
        """Around the updates of one step in a loop of your own: what `track_updates` measures at its snapshot.

        Args:
            matrices: What a walker yields; read only if a snapshot is due.
            step: The step that the updates complete, which `observe` is told.
            optimizers: Those that make them, asked for float32 masters of weights in half precision.
            due: Whether `observe` will be called after it; `None` asks the schedule.

        >>> import torch
        >>> from ww_monitor import Monitor
        >>> from ww_monitor.walk.torch import walk
        >>> model = torch.nn.Linear(16, 16, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = Monitor(every_n_steps=2, track_updates=True)
        >>> for step in range(1, 5):
        ...     model(torch.ones(1, 16)).square().sum().backward()
        ...     with monitor.step(walk(model), step=step):
        ...         optimizer.step()
        ...     snapshot = monitor.observe(walk(model), step=step) if monitor.due(step) else None
        >>> snapshot.summary["update_ratio"] > 0
        True
        """
        self.before_step(matrices, step=step - 1, optimizers=optimizers, due=due)
        try:
            yield
        except BaseException:
            self.analyzer.before = None  # who goes on from here may do so with other weights
            raise

    def before_step(
        self,
        matrices: Iterable[Matrix | Skipped],
        *,
        step: int,
        updates: int = 1,
        optimizers: Sequence[Any] = (),
        due: bool | None = None,
    ) -> None:
        """With `track_updates`, copy the weights if a snapshot follows the next updates; asked again, only once.

        Args:
            matrices: What a walker yields; read only then.
            step: Completed updates.
            updates: How many more may be completed by the snapshot, and are one step.
            optimizers: Those that make the updates.
            due: Whether a snapshot follows; `None` asks the schedule.
        """
        analyzer = self.analyzer
        if not analyzer.track_updates or (analyzer.before is not None and analyzer.before.step == step):
            return
        analyzer.before = None  # of a step at which there was no snapshot
        if not (self.awaits(step + updates) if due is None else due):
            return
        with self.timed(), self.guard("copying the weights before a step"):
            items = self.select.apply(matrices, say=lambda _: None)
            self._waited += wait_for_queued()
            until = step + updates
            analyzer.before = before = Before.capture(items, step=step, until=until, optimizers=optimizers)
            if before.unknown and step:  # many optimizers make their masters in the first step
                said = next(iter(before.unknown.values()))
                message = f"the update of {len(before.unknown)} matrices is not known, such as {said}"
                self.say_once("unknown updates", message)

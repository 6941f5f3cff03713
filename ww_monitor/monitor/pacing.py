"""When a monitor analyses, and the time that training loses to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from ww_monitor.monitor.analyzer import Analyzer
from ww_monitor.monitor.guarded import Guarded
from ww_monitor.schedule import Budget, Schedule, never
from ww_monitor.schedule import every_n_steps as schedule_every_n_steps
from ww_monitor.settings import RunOptions

WARN_AFTER_SECONDS = 60.0
"""Time of a run before it is told that an explicit cadence costs more than its budget."""


def cell_number() -> int:
    """Which cell of a notebook runs, counted by their runs; 0 in a script."""
    # not imported: in a notebook it is there, elsewhere there is no cell
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return int(getattr(shell, "execution_count", 0))


class Pacing(Guarded):
    """The part of a `Monitor` that knows steps and seconds.

    Args:
        given: Its cadence and budget.
        analyzer: Busy or not, and of one mind with other ranks.
        strict: See `Guarded`.
    """

    def __init__(self, given: RunOptions, analyzer: Analyzer, *, strict: bool) -> None:
        super().__init__(strict=strict)
        self.analyzer = analyzer
        self.every_n_steps, self.every_n_epochs = given.every_n_steps, given.every_n_epochs
        self.within_budget = self.every_n_steps is None and self.every_n_epochs is None
        self.schedule: Schedule = never if self.every_n_steps is None else schedule_every_n_steps(self.every_n_steps)
        self.budget = Budget(given.max_overhead)
        self.last_step: int | None = None
        self._passed: int | None = None
        self._cell: int | None = None
        self._next_step: int | None = None
        self._timing = False
        self._waited = 0.0
        self._published = 0

    @property
    def cadence(self) -> str:
        """How often it analyses, in words."""
        if self.within_budget:
            return f"as often as {100 * self.budget.share:.3g} % of the run's time allows"
        every = ((self.every_n_steps, "step"), (self.every_n_epochs, "epoch"))
        return " and ".join(f"every {f'{n} {what}s' if n > 1 else what}" for n, what in every if n is not None)

    def due(self, step: int) -> bool:
        """Whether an analysis is due at optimizer step `step`; ask once a step."""
        if step == self.last_step:
            return False
        self.budget.tick(step, busy=self.analyzer.busy)
        due = self._due_within_budget(step) if self.within_budget else self.schedule(step, self.last_step)
        self._passed = self._passed if due else step  # one that is due counts when it has been looked at
        return due

    def awaits(self, step: int) -> bool:
        """Whether an analysis will be due at a coming step, as far as is known; changes nothing, unlike `due`."""
        if self.within_budget:
            return self.last_step is None or (self._next_step is not None and step >= self._next_step)
        return self.schedule(step, self.last_step)

    def _due_within_budget(self, step: int) -> bool:
        if self.last_step is None:
            return True
        if self._next_step is None and self.budget.can_plan(step):
            with self.guard("planning"):
                planned = self.analyzer.agreed(self.budget.plan(step))
                if planned is not None and self.analyzer.track_updates:  # the weights before it are to be copied
                    planned = max(planned, step + 1)
                self._next_step = planned
        return self._next_step is not None and step >= self._next_step

    def due_at_epoch_end(self, epoch: int, step: int) -> bool:
        """Whether to analyse after epoch number `epoch` (from 0), which ended at optimizer step `step`."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0 and step != self.last_step

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time that training stands still, whatever is done in it; the outermost counts.

        What training had queued on its accelerator before an analysis is training's time, though the analysis waits.
        """
        if self._timing:
            yield
            return
        self._timing, self._waited, start, before = True, 0.0, perf_counter(), self._published
        try:
            yield
        finally:
            self._timing = False
            self.budget.spent(perf_counter() - start - self._waited, complete=self._published > before)
            self._warn_of_overhead()

    def _warn_of_overhead(self) -> None:
        budget = self.budget
        if self.within_budget or budget.elapsed < WARN_AFTER_SECONDS or budget.overhead <= budget.share:
            return
        self.say_once(
            "overhead",
            f"training has lost {budget.overhead:.1%} of its time to {self.cadence}, more than max_overhead="
            f"{budget.share:.3g}; leave the cadence out and it will keep within it",
        )

"""Trackers that show more than numbers: the table of their dashboards."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from ww_monitor.record import Snapshot
from ww_monitor.sinks import tensorboard, wandb
from ww_monitor.sinks.dashboard import Dashboard

DASHBOARDS: dict[str, type[Dashboard]] = {
    "add_histogram_raw": tensorboard.Dashboard,  # a SummaryWriter, torch's or tensorboardX'
    "define_metric": wandb.Dashboard,  # a Run
}
"""A method that the class of a tracker has and no other → its dashboard."""


def dashboard_of(tracker: object) -> type[Dashboard] | None:
    """The dashboard for a tracker, or `None` for what shows nothing but curves."""
    # asked of the class: the stand-ins of loggers on other ranks have any attribute, and so has the module `wandb`
    return next((board for method, board in DASHBOARDS.items() if hasattr(type(tracker), method)), None)


class Dashboards:
    """The dashboards of the trackers that a run has, made when a tracker is first shown something.

    Args:
        **options: Arguments of each `Dashboard`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._by_tracker: WeakKeyDictionary[Any, Dashboard] = WeakKeyDictionary()

    def update(self, tracker: Any, snapshot: Snapshot, step: int, values: Mapping[str, float] | None = None) -> None:
        """Show one snapshot; nothing where the tracker has no dashboard.

        Args:
            tracker: Whatever a framework logs to.
            snapshot: What was seen.
            step: Where on the x axis its owner's curves have it.
            values: By the keys that the tracker shows, for a dashboard that carries them.
        """
        if kind := dashboard_of(tracker):
            board = self._by_tracker.setdefault(tracker, kind(**self._options))
            board.update(tracker, snapshot, step, values=values if kind.carries_values else None)

    def finish(self) -> None:
        """Show what waited, in every tracker that is still there."""
        for tracker, board in list(self._by_tracker.items()):
            board.finish(tracker)


@contextmanager
def uncounted_by_trackio() -> Iterator[None]:
    """Leave the row counter of trackio's active run where it is, if what is done inside logs one row.

    The counter is the x axis of what the run's owner logs without a step.
    """
    # Private: nothing public of trackio gives the counter, or sets it back.
    variables: Any = getattr(sys.modules.get("trackio"), "context_vars", None)
    run: Any = variables and variables.current_run.get()
    before = getattr(run, "_next_step", None)
    try:
        yield
    finally:
        if before is not None and getattr(run, "_next_step", None) == before + 1:
            run._next_step = before

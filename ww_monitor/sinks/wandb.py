"""Snapshots into the Weights & Biases run that is active: scalars, histograms, a table, a picture, alerts."""

from __future__ import annotations

import atexit
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, ref

from ww_monitor.errors import MissingDependency, WWMonitorError
from ww_monitor.record import Finding, Snapshot, summary_key
from ww_monitor.sinks import dashboard
from ww_monitor.sinks.heatmap import Figures, is_milestone
from ww_monitor.sinks.published import Publish

STEP_KEY = summary_key("step")
"""The x axis where no trainer has one."""

GLOBS = (summary_key("*"), "ww_*")
"""All our keys, as `define_metric` wants them: an asterisk at the end only."""

OWNERS = ("trainer/global_step", "train/global_step")
"""The x axes of Lightning's and of the Hugging Face Trainer's logger, each with a glob `*` over all keys."""

ALERT_SECONDS = 300.0
"""Least time between two alerts of one rule: our choice, so that a rule that fires layer by layer is one mail."""

QUEUED_ROWS = 1024
"""Most rows that wait for a place in a run, at some 30 KB each; every second goes when they are more (our choice)."""

QUEUED_MEDIA = 64
"""Of these, the rows that keep their pictures, tables and histograms, at some 200 KB each for 50 layers."""

_TABLE = ("layer", "kind", "shape", "status", "verdict", "phase")


class WandB:
    """Logs into a run that somebody else began and will finish; works offline.

    The x axis is `ww/step`, declared for our keys. The run's own row counter stays its owner's, who may log with
    `step=` as if we were not there: a snapshot joins the row that is open and is saved with it, at most one a row.
    Where analyses outnumber the rows of the run, the others wait and are written when it finishes. Where a logger of
    the trainer owns the run and has declared its own axis for all keys, found in the run's summary or told by
    `step_key`, a snapshot is one row on that axis.

    Args:
        run: A run; `None` for the one that is active at the write.
        step_key: Key of the x axis of the run's owner, which then has declared it.
        scalars: Log the values too; `False` where a logger of the trainer does.
        publish: Which ones, and which histograms: as the callbacks' option of that name.
        prefix: What stands before every key, where several monitors write into one run.
        own_rows: Write each snapshot as a row of its own at once, for a run that nobody else logs to with `step=`.
        figures: Draws further pictures, for example `ww_monitor.plots.SpectralFigures()`.

    Raises:
        MissingDependency: if wandb is not installed.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        step_key: str | None = None,
        scalars: bool = True,
        publish: Publish = "key",
        prefix: str = "",
        own_rows: bool = False,
        figures: Figures | None = None,
    ) -> None:
        _wandb()
        self.run = run
        self.scalars = scalars
        self._options: dict[str, Any] = {
            "step_key": step_key,
            "publish": publish,
            "name": prefix,
            "own_rows": own_rows,
            "figures": figures,
        }
        self._dashboards: WeakKeyDictionary[Any, Dashboard] = WeakKeyDictionary()

    def write(self, snapshot: Snapshot) -> None:
        """One row, and alerts for what begins.

        Raises:
            WWMonitorError: if no run was given and none is active.
        """
        run = self.run if self.run is not None else _wandb().run
        if run is None:
            raise WWMonitorError("WandB: expected an active run, got none; call wandb.init() first, or pass run=")
        board = self._dashboards.setdefault(run, Dashboard(**self._options))
        values = board.values(snapshot) if self.scalars else {}
        board.update(run, snapshot, snapshot.step or 0, values=values)

    def close(self) -> None:
        """Send the alerts that waited; rows wait for the end of the run, which is its owner's to finish."""
        for run, board in list(self._dashboards.items()):
            board.finish(run)


class Dashboard(dashboard.Dashboard):
    """What Weights & Biases shows beside curves.

    - `ww_esd/<layer>`: a histogram of log10 λ, in every row.
    - `ww/layers`: a table, a line a layer with status, verdict and metrics, and `ww/alpha_map`: alpha of every layer
      over time as a picture, which needs matplotlib; both in each of the first 64 rows and in 32 of every doubling.
    - `ww_spectrum/<name>`: what `figures` draws.
    - an alert for a finding that begins, informational ones left out: once a rule and layer, all layers of a rule in
      one, and no rule more than once in `alert_seconds`; what comes in between waits. W&B itself drops a title that
      comes again within a minute.

    Without `step_key` the x axis is one of `OWNERS` that the run's summary has, else `ww/step`, declared for our keys.

    Args:
        own_rows: Write each snapshot as a row of its own at once, on the axis `ww/step` too.
        **arguments: Those of every dashboard.
    """

    alert_seconds = ALERT_SECONDS

    def __init__(self, *, own_rows: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._owner_follows = self.step_key is not None
        self._own_rows = own_rows
        self._rows: _QueuedRows | None = None
        self._alerted: set[tuple[str, str]] = set()
        self._waiting: dict[str, list[Finding]] = {}
        self._last_alert: dict[str, float] = {}

    def finish(self, tracker: Any) -> None:
        """Send the alerts that waited."""
        self._last_alert.clear()  # nothing comes later that it could wait for
        self._alert(tracker, ())

    def _show(self, tracker: Any, snapshot: Snapshot, step: int, values: Mapping[str, float]) -> None:
        # asked once, at the first row: the run is not known before
        self.step_key = self.step_key or _step_key(tracker, self.name)
        row = {**values, **self._media(snapshot), self.step_key: step}
        with self.apart():
            if self._owner_follows and not values:
                _log(tracker, row, commit=False)  # the owner's logger writes the values next, into this row
            elif self._own_rows or self.step_key != self.name + STEP_KEY:
                _log(tracker, row)
            else:
                self._rows = self._rows or _QueuedRows(tracker)
                self._rows.write(tracker, row)
        with self.apart():
            self._alert(tracker, snapshot.findings)

    def _media(self, snapshot: Snapshot) -> dict[str, Any]:
        wandb, media = _wandb(), dict[str, Any]()
        for key, esd in self._histograms(snapshot):
            with self.apart():
                media[key] = wandb.Histogram(np_histogram=(list(esd.counts), list(esd.edges)))
        if snapshot.layers and is_milestone(self.count):
            with self.apart():
                media[self.name + summary_key("layers")] = _table(wandb, snapshot)
            with self.apart():
                if (drawn := self.alpha_map.draw()) is not None:
                    media[self.name + summary_key("alpha_map")] = wandb.Image(drawn, caption="alpha by layer and step")
        for key, picture in self._pictures(snapshot).items():
            with self.apart():
                media[key] = wandb.Image(picture)
        return media

    def _alert(self, run: Any, findings: tuple[Finding, ...]) -> None:
        for finding in findings:
            key = finding.rule, finding.layer
            if finding.state == "begin" and finding.severity != "info" and key not in self._alerted:
                self._alerted.add(key)
                self._waiting.setdefault(finding.rule, []).append(finding)
        now = time.monotonic()
        for rule in list(self._waiting):
            if now - self._last_alert.get(rule, -self.alert_seconds) >= self.alert_seconds:
                self._last_alert[rule] = now
                _send(run, self.name + rule, self._waiting.pop(rule))


class _QueuedRows:
    """Rows for a run whose counter they must not move: one at a time in the row that is open, the rest at its end.

    Of rows that are not committed W&B keeps the one that is open; what is logged there twice is overwritten.
    """

    def __init__(self, run: Any) -> None:
        self._queue: list[dict[str, Any]] = []
        self._taken: int | None = None
        self._sees_the_end = False
        with suppress(ImportError, AttributeError):  # no public way to be told: another version may have none
            from wandb.sdk.wandb_run import TeardownHook, TeardownStage

            self._at_the_end = partial(self._finish, ref(run))
            run._teardown_hooks.append(TeardownHook(self._at_the_end, TeardownStage.EARLY))
            atexit.register(self._at_the_end)  # a run that is left to the end of the process calls no hook
            self._sees_the_end = True

    def write(self, run: Any, row: dict[str, Any]) -> None:
        """Put the row that has waited longest into the row that is open, unless one of ours is there."""
        self._queue.append(row)
        try:
            place = int(run.step)
        except Exception:  # noqa: BLE001 - a run of several processes has no counter that a row could move
            place = None
        if place is None or not self._sees_the_end:
            self.write_all(run)
        elif place != self._taken:
            self._taken = place
            _log(run, self._queue.pop(0), commit=False)
        if len(self._queue) > QUEUED_MEDIA:
            row = self._queue[-1 - QUEUED_MEDIA]
            self._queue[-1 - QUEUED_MEDIA] = _numbers(row)
        if len(self._queue) > QUEUED_ROWS:
            del self._queue[1::2]

    def write_all(self, run: Any) -> None:
        """Write what waits, each as a row of its own."""
        if self._queue and self._taken is not None and run.step == self._taken:
            run.log({}, commit=True)
        while self._queue:
            _log(run, self._queue.pop(0))

    def _finish(self, known: ref[Any]) -> None:
        """The run ends, in its own `finish` or with the process: whatever happens, that must go on."""
        atexit.unregister(self._at_the_end)
        with suppress(Exception):
            if (run := known()) is not None:
                self.write_all(run)


def _log(run: Any, row: dict[str, Any], *, commit: bool = True) -> None:
    """Log a row; if something in it cannot be logged, all else, and then raise what failed."""
    try:
        run.log(row, commit=commit)
    except Exception:
        numbers = _numbers(row)
        run.log(numbers, commit=False)
        for key in row.keys() - numbers.keys():
            with suppress(Exception):
                run.log({key: row[key]}, commit=False)
        if commit:
            run.log({}, commit=True)
        raise


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}


def _send(run: Any, what: str, findings: list[Finding]) -> None:
    level = _wandb().AlertLevel
    run.alert(
        title=f"ww_monitor: {what}"[:63],
        text="\n".join(str(finding) for finding in findings),
        level=level.ERROR if any(finding.severity == "critical" for finding in findings) else level.WARN,
    )


def _step_key(run: Any, name: str) -> str:
    """The x axis of the run's owner, or ours, declared.

    Of overlapping globs wandb takes either, so ours is declared only where no owner has declared `*`.
    """
    known = set(run.summary.keys())
    for key in OWNERS:
        if key in known:
            return key
    ours = name + STEP_KEY
    run.define_metric(ours, hidden=True)
    for glob in GLOBS:
        run.define_metric(name + glob, step_metric=ours)
    return ours


def _table(wandb: ModuleType, snapshot: Snapshot) -> Any:
    metrics = list(dict.fromkeys(name for layer in snapshot.layers for name in layer.metrics))
    rows = []
    for layer in snapshot.layers:
        shape = "×".join(str(size) for size in layer.shape)
        values = [None if (value := layer.value(name)) != value else float(value) for name in metrics]
        rows.append([layer.name, layer.kind, shape, layer.status, layer.verdict, layer.phase, *values])
    return wandb.Table(columns=[*_TABLE, *metrics], data=rows)


def _wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise MissingDependency("WandB: needs wandb; pip install 'ww-monitor[wandb]'") from error
    return wandb

"""Snapshots into the Weights & Biases run that is active: scalars, histograms, a table, a picture, alerts."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterable, Mapping
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

MOST_DECLARED = 1000
"""Keys up to which each is declared by its name, at 0.1 ms a key (our choice)."""

ALERT_SECONDS = 300.0
"""Least time between two alerts of one rule: our choice, so that a rule that fires layer by layer is one mail."""

QUEUED_ROWS = 1024
"""Most rows that wait for a place in a run, at some 30 KB each; every second goes when they are more (our choice)."""

QUEUED_MEDIA = 64
"""The latest of these, which keep their pictures, tables and histograms, at some 200 KB each for 50 layers."""

_TABLE = ("layer", "kind", "shape", "status", "verdict", "phase")


class WandB(dashboard.Named):
    """Logs into a run that somebody else began and will finish; works offline.

    The x axis is `ww/step`, declared for our keys. The run's own row counter stays its owner's, who may log with
    `step=` as if we were not there: a snapshot joins the row that is open and is saved with it, at most one a row.
    Where analyses outnumber the rows of the run, the others wait and are written when it finishes.

    Args:
        run: A run; `None` for the one that is active at the write.
        step_key: Key of another x axis, which the run's owner has declared; each snapshot is then a row of its own.
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
        self.scalars, self.prefix = scalars, prefix
        self._options: dict[str, Any] = {
            "step_key": step_key,
            "publish": publish,
            "own_rows": own_rows,
            "figures": figures,
        }
        self._dashboards: WeakKeyDictionary[Any, Dashboard] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "run": None, "_dashboards": None}  # a run and weak references stay with their process

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _dashboards=WeakKeyDictionary())

    def write(self, snapshot: Snapshot) -> None:
        """One row, and alerts for what begins.

        Raises:
            WWMonitorError: if no run was given and none is active.
        """
        run = self.run if self.run is not None else _wandb().run
        if run is None:
            raise WWMonitorError("WandB: expected an active run, got none; call wandb.init() first, or pass run=")
        board = self._dashboards.setdefault(run, Dashboard(**self._options))
        board.name = self._name_on(id(run))
        values = board.values(snapshot) if self.scalars else {}
        board.update(run, snapshot, snapshot.step or 0, values=values)

    def close(self) -> None:
        """Send the alerts that waited; rows wait for the end of the run, which is its owner's to finish."""
        self._leave()
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

    The x axis is `ww/step`. It is declared for each key by its name, which goes before an owner's glob over all keys,
    and up to a thousand keys; for more by a glob, of which W&B takes either.

    Args:
        step_key: Key of another x axis, which the run's owner has declared.
        own_rows: Write each snapshot as a row of its own at once, on the axis `ww/step` too.
        **arguments: Those of every dashboard.
    """

    alert_seconds = ALERT_SECONDS
    carries_values = True

    def __init__(self, *, step_key: str | None = None, own_rows: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.step_key = step_key
        self._declared: set[str] = set()
        self._own_rows = own_rows or step_key is not None
        self._alerted: set[tuple[str, str]] = set()
        self._waiting: dict[str, list[Finding]] = {}
        self._last_alert: dict[str, float] = {}

    @property
    def _axis(self) -> str:
        return self.name + STEP_KEY

    def finish(self, tracker: Any) -> None:
        """Send the alerts that waited."""
        self._last_alert.clear()  # nothing comes later that it could wait for
        self._alert(tracker, ())

    def _show(self, tracker: Any, snapshot: Snapshot, step: int, values: Mapping[str, float]) -> None:
        row = {**values, **self._media(snapshot)}
        if self.step_key is None:
            with self.apart():
                self._declare(tracker, row)
        row |= {self._axis: snapshot.step or 0} if self.step_key is None else {self.step_key: step}
        with self.apart():
            if self._own_rows:
                _log(tracker, row)
            else:
                _QueuedRows.of(tracker, self._axis).write(tracker, row)
        with self.apart():
            self._alert(tracker, snapshot.findings)

    def _declare(self, run: Any, keys: Iterable[str]) -> None:
        """Say that new keys are shown over our axis."""
        new = [key for key in keys if key not in self._declared]
        if not self._declared:
            run.define_metric(self._axis, hidden=True)  # an axis needs no chart
        if len(new) > MOST_DECLARED:
            new = [start + glob for start in {self.prefix, self.name} for glob in GLOBS]
        for key in new:
            if "*" not in key[:-1]:  # as a layer's name may have it
                run.define_metric(key, step_metric=self._axis)
        self._declared.update(keys)

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
            # The first goes at once, wherever the clock begins.
            if now - self._last_alert.get(rule, -self.alert_seconds) >= self.alert_seconds:
                self._last_alert[rule] = now
                _send(run, self.name + rule, self._waiting.pop(rule))


_QUEUES: WeakKeyDictionary[Any, dict[str, _QueuedRows]] = WeakKeyDictionary()


class _QueuedRows:
    """Rows for a run whose counter they must not move: one at a time in the row that is open, the rest at its end.

    Of rows that are not committed W&B keeps the one that is open; what is logged there twice is overwritten.
    """

    def __init__(self, run: Any) -> None:
        self._queue: list[dict[str, Any]] = []
        self._taken: int | None = None  # the row of the run in which one of ours is
        self._process = os.getpid()
        self._sees_the_end = False
        with suppress(ImportError, AttributeError):  # no public way to be told: another version may have none
            from wandb.sdk.wandb_run import TeardownHook, TeardownStage

            self._at_the_end = partial(self._finish, ref(run))
            run._teardown_hooks.append(TeardownHook(self._at_the_end, TeardownStage.EARLY))
            atexit.register(self._at_the_end)  # a run that is left to the end of the process calls no hook
            self._sees_the_end = True

    @classmethod
    def of(cls, run: Any, axis: str) -> _QueuedRows:
        """The one of all dashboards of a run that share an axis, and so keys."""
        queues = _QUEUES.setdefault(run, {})
        return queues.get(axis) or queues.setdefault(axis, cls(run))

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
            run.log({}, commit=True)  # it ends the row in which one of ours is
        while self._queue:
            _log(run, self._queue.pop(0))

    def _finish(self, known: ref[Any]) -> None:
        """The run ends, in its own `finish` or with the process: whatever happens, that must go on."""
        atexit.unregister(self._at_the_end)
        with suppress(Exception):  # a forked child that ends would write into its parent's run
            if (run := known()) is not None and self._process == os.getpid():
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
        title=f"ww_monitor: {what}"[:63],  # W&B takes less than 64 letters
        text="\n".join(str(finding) for finding in findings),
        level=level.ERROR if any(finding.severity == "critical" for finding in findings) else level.WARN,
    )


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

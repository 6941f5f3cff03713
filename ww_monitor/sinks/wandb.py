"""Snapshots into the Weights & Biases run that is active: scalars, histograms, a table, a picture, alerts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from ww_monitor.errors import MissingDependency, WWMonitorError
from ww_monitor.record import Finding, Snapshot, layer_key, summary_key
from ww_monitor.sinks.heatmap import AlphaMap, Figures, is_milestone

STEP_KEY = summary_key("step")
"""The x axis where no trainer has one."""

GLOBS = (summary_key("*"), "ww_*")
"""All our keys, as `define_metric` wants them: an asterisk at the end only."""

OWNERS = ("trainer/global_step", "train/global_step")
"""The x axes of Lightning's and of the Hugging Face Trainer's logger, each with a glob `*` over all keys."""

ALERT_SECONDS = 300.0
"""Least time between two alerts of one rule: our choice, so that a rule that fires layer by layer is one mail."""

_TABLE = ("layer", "kind", "shape", "status", "verdict", "phase")


class WandB:
    """Logs into a run that somebody else began and will finish; works offline.

    A snapshot is one row, with its step under a key of its own (`run.log` gets no `step=`, which would have to grow
    with the trainer's). That key is `ww/step`, declared as the x axis of our keys; where a logger of the trainer owns
    the run and has declared its own axis for all keys, it is that axis' key, found in the run's summary or told by
    `step_key`.

    Args:
        run: A run; `None` for the one that is active at the write.
        step_key: Key of the x axis of the run's owner, which then has declared it.
        scalars: Log the values too; `False` where a logger of the trainer does.
        figures: Draws further pictures, for example `ww_monitor.plots.SpectralFigures()`.

    Raises:
        MissingDependency: if wandb is not installed.
    """

    def __init__(
        self, run: Any = None, *, step_key: str | None = None, scalars: bool = True, figures: Figures | None = None
    ) -> None:
        _wandb()
        self.run = run
        self.scalars = scalars
        self._dashboard = Dashboard(step_key=step_key, figures=figures)

    def write(self, snapshot: Snapshot) -> None:
        """One row, and alerts for what begins.

        Raises:
            WWMonitorError: if no run was given and none is active.
        """
        run = self.run if self.run is not None else _wandb().run
        if run is None:
            raise WWMonitorError("WandB: expected an active run, got none; call wandb.init() first, or pass run=")
        values = snapshot.scalars() if self.scalars else {}
        self._dashboard.update(run, snapshot, snapshot.step or 0, values=values)

    def close(self) -> None:
        """Send the alerts that waited; the run is its owner's to finish."""
        self._dashboard.finish()


@dataclass
class _Page:
    """What has been logged into one run."""

    step_key: str
    count: int = 0
    alpha_map: AlphaMap = field(default_factory=AlphaMap)
    alerted: set[tuple[str, str]] = field(default_factory=set)
    waiting: dict[str, list[Finding]] = field(default_factory=dict)
    last_alert: dict[str, float] = field(default_factory=dict)


class Dashboard:
    """What Weights & Biases shows beside curves, in any number of runs, whoever owns them and logs the curves.

    - `ww_esd/<layer>`: a histogram of log10 λ, in every row.
    - `ww/layers`: a table, a line a layer with status, verdict and metrics, and `ww/alpha_map`: alpha of every layer
      over time as a picture, which needs matplotlib; both in each of the first 64 rows and in 32 of every doubling.
    - `ww_spectrum/<name>`: what `figures` draws.
    - an alert for a finding that begins, informational ones left out: once a rule and layer, all layers of a rule in
      one, and no rule more than once in `alert_seconds`; what comes in between waits. W&B itself drops a title that
      comes again within a minute.

    Args:
        step_key: Key of the x axis of the run's owner; `None` looks for one in the run's summary, else declares
            `ww/step` for our keys.
        figures: Draws further pictures.
        alert_seconds: Least time between two alerts of one rule, in seconds.
    """

    def __init__(
        self, *, step_key: str | None = None, figures: Figures | None = None, alert_seconds: float = ALERT_SECONDS
    ) -> None:
        self.step_key = step_key
        self.figures = figures
        self.alert_seconds = alert_seconds
        self._pages: WeakKeyDictionary[Any, _Page] = WeakKeyDictionary()

    def update(self, run: Any, snapshot: Snapshot, step: int, *, values: Mapping[str, float] | None = None) -> None:
        """Log one row, and alert.

        Args:
            run: A `wandb.Run` that is not finished.
            snapshot: What was seen.
            step: Where on the x axis its owner's curves have it.
            values: Scalars that go into the same row.
        """
        page = self._pages.get(run)
        if page is None:
            page = self._pages[run] = _Page(self.step_key or _step_key(run))
        page.count += 1
        page.alpha_map.add(snapshot, step)
        run.log({**(values or {}), **self._media(page, snapshot), page.step_key: step})
        self._alert(run, page, snapshot.findings)

    def finish(self) -> None:
        """Send the alerts that waited."""
        for run, page in list(self._pages.items()):
            page.last_alert.clear()
            self._alert(run, page, ())

    def _media(self, page: _Page, snapshot: Snapshot) -> dict[str, Any]:
        wandb = _wandb()
        media: dict[str, Any] = {
            layer_key("esd", layer.name): wandb.Histogram(np_histogram=(list(layer.esd.counts), list(layer.esd.edges)))
            for layer in snapshot.layers
            if layer.esd is not None
        }
        if snapshot.layers and is_milestone(page.count):
            media[summary_key("layers")] = _table(wandb, snapshot)
            if (picture := page.alpha_map.draw()) is not None:
                media[summary_key("alpha_map")] = wandb.Image(picture, caption="alpha by layer and step")
        pictures = {} if self.figures is None else self.figures(snapshot)
        media.update({layer_key("spectrum", name): wandb.Image(picture) for name, picture in pictures.items()})
        return media

    def _alert(self, run: Any, page: _Page, findings: tuple[Finding, ...]) -> None:
        for finding in findings:
            key = finding.rule, finding.layer
            if finding.state == "begin" and finding.severity != "info" and key not in page.alerted:
                page.alerted.add(key)
                page.waiting.setdefault(finding.rule, []).append(finding)
        now = time.monotonic()
        for rule in list(page.waiting):
            if now - page.last_alert.get(rule, -self.alert_seconds) >= self.alert_seconds:
                page.last_alert[rule] = now
                _send(run, rule, page.waiting.pop(rule))


def _send(run: Any, rule: str, findings: list[Finding]) -> None:
    level = _wandb().AlertLevel
    run.alert(
        title=f"ww_monitor: {rule}"[:63],
        text="\n".join(str(finding) for finding in findings),
        level=level.ERROR if any(finding.severity == "critical" for finding in findings) else level.WARN,
    )


def _step_key(run: Any) -> str:
    """The x axis of the run's owner, or ours, declared.

    Of overlapping globs wandb takes either, so ours is declared only where no owner has declared `*`.
    """
    known = set(run.summary.keys())
    for key in OWNERS:
        if key in known:
            return key
    run.define_metric(STEP_KEY, hidden=True)
    for glob in GLOBS:
        run.define_metric(glob, step_metric=STEP_KEY)
    return STEP_KEY


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

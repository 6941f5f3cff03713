"""Snapshots into TensorBoard: scalars under the shared keys, and beside them charts, histograms, pictures and text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ww_monitor.errors import MissingDependency, WWMonitorError
from ww_monitor.record import Finding, Histogram, Snapshot, layer_key, summary_key
from ww_monitor.sinks import dashboard
from ww_monitor.sinks.event_file import EventFile
from ww_monitor.sinks.heatmap import Figures, is_milestone
from ww_monitor.sinks.published import Publish, Published, spread_of

ALPHA_BAND = (2.0, 6.0)
"""Alpha of trained layers (Martin & Mahoney 2021)."""

MAP_KEY = summary_key("alpha_map")
FINDINGS_KEY = summary_key("findings")
BAND_KEYS = (layer_key("band", "alpha_low"), layer_key("band", "alpha_high"))
EDGE_KEY = layer_key("band", "headroom")

FEW_CURVES = 18
"""Curves beside which both edges of the band are in sight: TensorBoard leaves the outermost 5 % of all points out."""

_LAYOUTS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""The charts of all monitors of a writer: TensorBoard shows the layout that was written last."""


class TensorBoard(dashboard.Named):
    """Writes event files, without TensorFlow; or with a `torch.utils.tensorboard.SummaryWriter` of yours.

    Args:
        target: A log folder, for which a writer is made and closed; or a writer, which stays its owner's.
        scalars: Write the values too; `False` where a logger of the trainer does.
        publish: Which ones, and which histograms: as the callbacks' option of that name.
        prefix: What stands before every key, where several monitors write into one log.
        layout: Make the charts of the custom-scalars page; `False` keeps a layout of your own.
        figures: Draws further pictures, for example `ww_monitor.plots.SpectralFigures()`.

    Raises:
        MissingDependency: if tensorboard is not installed.
    """

    def __init__(
        self,
        target: str | Path | Any,
        *,
        scalars: bool = True,
        publish: Publish = "key",
        prefix: str = "",
        layout: bool = True,
        figures: Figures | None = None,
    ) -> None:
        self._owned = isinstance(target, (str, Path))
        self.writer: Any = _writer_of(target) if self._owned else target
        self.scalars, self.prefix = scalars, prefix
        self._dashboard = Dashboard(figures=figures, publish=publish)
        self._dashboard.layout = layout

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "writer": self.writer if self._owned else None}

    def write(self, snapshot: Snapshot) -> None:
        """Scalars, then what stands beside them, at the snapshot's step.

        Raises:
            WWMonitorError: in a copy, which has not the writer that was given.
        """
        if self.writer is None:
            raise WWMonitorError("TensorBoard: expected a writer, got a copy without it; give a log folder instead")
        folder = getattr(self.writer, "log_dir", "")  # of a writer that writes anywhere
        self._dashboard.name = self._name_on(str(Path(folder).absolute()) if folder else id(self.writer))
        values = self._dashboard.values(snapshot) if self.scalars else {}
        try:
            self._dashboard.update(self.writer, snapshot, snapshot.step or 0, values=values)
        finally:
            if self._owned:
                self.writer.flush()

    def close(self) -> None:
        """Draw what the last picture lacks and flush; a writer made here is closed."""
        if self.writer is None:
            return
        try:
            self._dashboard.complete(self.writer)
        finally:
            self._leave()
            self.writer.flush()
            if self._owned:
                self.writer.close()


class Dashboard(dashboard.Dashboard):
    """What TensorBoard shows beside curves.

    - `#custom_scalars`: alpha with the band from 2 to 6, of the model and of every layer; of roles, or of the mean and
      10 % to 90 % of layers, where these are too many for one chart; traps; headroom with its edge at 1. The layout is
      written once; the edges are the constants `ww_band/alpha_low`, `ww_band/alpha_high` and `ww_band/headroom`.
      TensorBoard shows one layout a run: `layout = False` leaves both out.
    - `ww_esd/<layer>`: a histogram of log10 λ, of models of up to 32 layers or where it is asked for.
    - `ww/findings`: as text, what begins, what ends, and what holds.
    - `ww/alpha_map`: alpha of every layer over time as a picture, its legend as text; needs matplotlib. Drawn
      anew at each of the first 64 snapshots and 32 times in every doubling of their number from then on.
    - `ww_spectrum/<name>`: what `figures` draws.
    """

    layout = True
    _has_layout = False
    _drawn = 0
    _legend = ""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._holding: dict[tuple[str, str], Finding] = {}

    def complete(self, writer: Any) -> None:
        """Draw the snapshots that the last picture of alpha lacks, in a writer that is open still."""
        if self._drawn < self.count:
            self._show_map(writer, self.alpha_map.steps[-1])

    def _show(self, tracker: Any, snapshot: Snapshot, step: int, values: Mapping[str, float]) -> None:
        with self.apart():
            for key, value in {**values, **self._charts(tracker, snapshot)}.items():
                tracker.add_scalar(key, value, step)
        for key, esd in self._histograms(snapshot):
            with self.apart():
                _add_histogram(tracker, key, esd, step)
        with self.apart():
            self._show_findings(tracker, snapshot, step)
        if is_milestone(self.count):
            with self.apart():
                self._show_map(tracker, step)
        for key, picture in self._pictures(snapshot).items():
            with self.apart():
                tracker.add_image(key, picture, step, dataformats="HWC")

    def _charts(self, tracker: Any, snapshot: Snapshot) -> dict[str, float]:
        """The layout, if it is not written yet; the values that its charts need beside what is published."""
        if not self.layout or not snapshot.layers:
            return {}
        if not self._has_layout:
            self._has_layout = True  # before the call: one that fails is not tried at every snapshot
            with self.apart():
                all_charts = _LAYOUTS.setdefault(tracker, {})
                all_charts[f"{self.name}ww_monitor"] = _charts_of(snapshot, self.prefix, self.published)
                tracker.add_custom_scalars(all_charts)
        beside = dict(zip(BAND_KEYS, ALPHA_BAND, strict=True))
        if "trap_headroom" in snapshot.summary:
            beside[EDGE_KEY] = 1.0
        if len(snapshot.layers) > FEW_CURVES:
            beside.update(spread_of(snapshot, "alpha"))
        return {self.prefix + key: value for key, value in beside.items()}

    def _show_findings(self, writer: Any, snapshot: Snapshot, step: int) -> None:
        for finding in snapshot.findings:
            self._holding.pop((finding.rule, finding.layer), None)
            if finding.state == "begin":
                self._holding[finding.rule, finding.layer] = finding
        if snapshot.findings:
            writer.add_text(self.name + FINDINGS_KEY, _findings_text(snapshot, list(self._holding.values())), step)

    def _show_map(self, writer: Any, step: int) -> None:
        self._drawn = self.count
        if not self.alpha_map.layer_names:
            return
        picture = self.alpha_map.draw()
        if picture is None:
            return
        writer.add_image(self.name + MAP_KEY, picture, step, dataformats="HWC")
        legend = self.alpha_map.legend()
        if legend != self._legend:  # a text is shown at every step it was written at
            self._legend = legend
            writer.add_text(self.name + MAP_KEY, legend, step)


def _charts_of(snapshot: Snapshot, prefix: str, published: Published) -> dict[str, list[Any]]:
    """The charts of the metrics that the snapshot has, as `SummaryWriter.add_custom_scalars` wants them."""
    metrics = {metric for layer in snapshot.layers for metric in layer.metrics}
    start = re.escape(prefix)
    every = {metric: f"{start}{layer_key(metric, 'x')[:-1]}.+" for metric in (*metrics, "band")}
    keys = published.scalars(snapshot)
    ones = "layer" if published.layer_metrics(snapshot) or not published.key else "role"
    charts: dict[str, list[Any]] = {}
    if "alpha" in metrics:
        model = [prefix + key for key in (summary_key("alpha"), *BAND_KEYS)]
        edges = every["band"].replace(".+", "alpha_.+")
        if ones == "role":
            means = every["alpha"] + "_mean"
            charts["alpha by role, mean of its layers, and the band from 2 to 6"] = ["Multiline", [means, edges]]
            charts |= _spread_charts(keys, prefix)
        elif len(snapshot.layers) <= FEW_CURVES:
            charts["alpha of every layer and the band from 2 to 6"] = ["Multiline", [every["alpha"], edges]]
        else:
            spread = f"{start}{summary_key('alpha_p')}.0"  # alpha_p10 and alpha_p90
            charts["alpha: mean, 10 % and 90 % of all layers, and the band from 2 to 6"] = [
                "Multiline",
                [re.escape(model[0]) + "$", spread, edges],  # without an end it were `alpha_hat`, too
            ]
            charts["alpha of every layer"] = ["Multiline", [every["alpha"]]]
        charts["alpha of the model in the band from 2 to 6"] = ["Margin", model]
    if "num_traps" in metrics:
        charts[f"correlation traps of every {ones}"] = ["Multiline", [every["num_traps"]]]
    if "trap_headroom" in snapshot.summary:
        highest = prefix + summary_key("trap_headroom")
        # A margin is drawn from the second value to the third, around the first.
        charts["highest trap headroom (above 1 a trap is expected)"] = ["Margin", [highest, prefix + EDGE_KEY, highest]]
    if "trap_headroom" in metrics:
        title = f"trap headroom of every {ones} (above 1 a trap is expected)"
        # the highest and the edge beside them, or a single layer that rises above 1 is an outlier that is left out
        beside = [f"{start}{key}$" for key in (summary_key("trap_headroom"), EDGE_KEY)]
        charts[title] = ["Multiline", [every["trap_headroom"], *beside]]
    return charts


def _spread_charts(keys: Mapping[str, float], prefix: str) -> dict[str, list[Any]]:
    """A chart a role that has a 10 % and a 90 %."""
    section = layer_key("alpha", "x")[:-1]
    roles = [key.removeprefix(section).removesuffix("_p10") for key in keys if re.match(f"{section}.+_p10$", key)]
    return {
        f"alpha of {role}: mean, 10 % and 90 % of its layers": [
            "Margin",
            [f"{prefix}{section}{role}_{end}" for end in ("mean", "p10", "p90")],
        ]
        for role in roles
    }


def _findings_text(snapshot: Snapshot, holding: list[Finding]) -> str:
    lines = [f"- **{finding.severity}** {_escape(str(finding))}" for finding in snapshot.findings]
    still = [f"- {finding.rule} since step {finding.step}: {_escape(finding.message)}" for finding in holding]
    return "\n".join([*lines, "", "Holding now:" if still else "Nothing holds now.", "", *still])


def _escape(text: str) -> str:
    """Markdown that shows the text as it is: layer names have underscores, brackets and asterisks."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", text)


def _add_histogram(writer: Any, tag: str, esd: Histogram, step: int) -> None:
    edges, counts = np.array(esd.edges), np.array(esd.counts)
    centres = (edges[:-1] + edges[1:]) / 2
    writer.add_histogram_raw(
        tag,
        min=esd.low,
        max=esd.high,
        num=int(counts.sum()),
        sum=float(counts @ centres),  # as the bins tell it: a snapshot need not keep eigenvalues
        sum_squares=float(counts @ centres**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def _writer_of(folder: str | Path) -> Any:
    if "://" not in str(folder):
        return EventFile(folder)
    try:
        from torch.utils.tensorboard import SummaryWriter  # writes to what TensorFlow or fsspec reaches
    except ImportError as error:
        raise MissingDependency("TensorBoard: needs tensorboard; pip install 'ww-monitor[tensorboard]'") from error
    return SummaryWriter(str(folder))

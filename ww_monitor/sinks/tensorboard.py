"""Snapshots into TensorBoard: scalars under the shared keys, and beside them charts, histograms, pictures and text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ww_monitor.errors import MissingDependency
from ww_monitor.record import Finding, Histogram, Snapshot, layer_key, summary_key
from ww_monitor.sinks import dashboard
from ww_monitor.sinks.heatmap import Figures, is_milestone

ALPHA_BAND = (2.0, 6.0)
"""Alpha of trained layers (Martin & Mahoney 2021)."""

MAP_KEY = summary_key("alpha_map")
FINDINGS_KEY = summary_key("findings")
BAND_KEYS = (layer_key("band", "alpha_low"), layer_key("band", "alpha_high"))


class TensorBoard:
    """Writes with a `torch.utils.tensorboard.SummaryWriter`.

    Args:
        target: A log folder, for which a writer is made and closed; or a writer, which stays its owner's.
        scalars: Write the values too; `False` where a logger of the trainer does.
        layout: Make the charts of the custom-scalars page; `False` keeps a layout of your own.
        figures: Draws further pictures, for example `ww_monitor.plots.SpectralFigures()`.

    Raises:
        MissingDependency: if tensorboard is not installed.
    """

    def __init__(
        self, target: str | Path | Any, *, scalars: bool = True, layout: bool = True, figures: Figures | None = None
    ) -> None:
        self._owned = isinstance(target, (str, Path))
        self.writer: Any = _summary_writer(str(target)) if self._owned else target
        self.scalars = scalars
        self._dashboard = Dashboard(figures=figures)
        self._dashboard.layout = layout

    def write(self, snapshot: Snapshot) -> None:
        """Scalars, then what stands beside them, at the snapshot's step."""
        values = snapshot.scalars() if self.scalars else {}
        self._dashboard.update(self.writer, snapshot, snapshot.step or 0, values=values)

    def close(self) -> None:
        """Draw what the last picture lacks and flush; a writer made here is closed."""
        self._dashboard.complete(self.writer)
        self.writer.flush()
        if self._owned:
            self.writer.close()


class Dashboard(dashboard.Dashboard):
    """What TensorBoard shows beside curves.

    - `#custom_scalars`: alpha of every layer in one chart and of the model in another, with the band from 2 to 6;
      traps; headroom. The layout is written once; the band's edges are the constants `ww_band/alpha_low` and
      `ww_band/alpha_high`. TensorBoard shows one layout a run: `layout = False` leaves both out.
    - `ww_esd/<layer>`: a histogram of log10 λ.
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
        band = dict(zip(BAND_KEYS, ALPHA_BAND, strict=True)) if self.layout and snapshot.layers else {}
        if band and not self._has_layout:
            self._has_layout = True  # before the call: one that fails is not tried at every snapshot
            tracker.add_custom_scalars(_layout(snapshot, self.prefix))
        for key, value in {**values, **{self.prefix + key: edge for key, edge in band.items()}}.items():
            tracker.add_scalar(key, value, step)
        for layer in snapshot.layers:
            if layer.esd is not None:
                _add_histogram(tracker, layer_key("esd", layer.name), layer.esd, step)
        self._show_findings(tracker, snapshot, step)
        if is_milestone(self.count):
            self._show_map(tracker, step)
        for key, picture in self._pictures(snapshot).items():
            tracker.add_image(key, picture, step, dataformats="HWC")

    def _show_findings(self, writer: Any, snapshot: Snapshot, step: int) -> None:
        for finding in snapshot.findings:
            self._holding.pop((finding.rule, finding.layer), None)
            if finding.state == "begin":
                self._holding[finding.rule, finding.layer] = finding
        if snapshot.findings:
            writer.add_text(FINDINGS_KEY, _findings_text(snapshot, list(self._holding.values())), step)

    def _show_map(self, writer: Any, step: int) -> None:
        self._drawn = self.count
        if not self.alpha_map.layer_names:
            return
        picture = self.alpha_map.draw()
        if picture is None:
            return
        writer.add_image(MAP_KEY, picture, step, dataformats="HWC")
        legend = self.alpha_map.legend()
        if legend != self._legend:  # a text is shown at every step it was written at
            self._legend = legend
            writer.add_text(MAP_KEY, legend, step)


def _layout(snapshot: Snapshot, prefix: str) -> dict[str, dict[str, list[Any]]]:
    """The charts of the metrics that the snapshot has, as `SummaryWriter.add_custom_scalars` wants them."""
    metrics = {metric for layer in snapshot.layers for metric in layer.metrics}
    start = re.escape(prefix)
    charts: dict[str, list[Any]] = {}
    if "alpha" in metrics:
        layers, edges = f"{start}{layer_key('alpha', '.+')}", f"{start}{layer_key('band', 'alpha_.+')}"
        charts["alpha of every layer and the band from 2 to 6"] = ["Multiline", [layers, edges]]
        model = [prefix + key for key in (summary_key("alpha"), *BAND_KEYS)]
        charts["alpha of the model in the band from 2 to 6"] = ["Margin", model]
    if "num_traps" in metrics:
        charts["correlation traps of every layer"] = ["Multiline", [f"{start}{layer_key('num_traps', '.+')}"]]
    if "trap_headroom" in metrics:
        title = "trap headroom of every layer (above 1 a trap is expected)"
        charts[title] = ["Multiline", [f"{start}{layer_key('trap_headroom', '.+')}"]]
    return {"ww_monitor": charts}


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
        sum=float(counts @ centres),
        sum_squares=float(counts @ centres**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependency("TensorBoard: needs tensorboard; pip install 'ww-monitor[tensorboard]'") from error
    return SummaryWriter(folder)

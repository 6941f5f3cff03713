"""Snapshots into TensorBoard: scalars under the shared keys, and beside them charts, histograms, pictures and text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ww_monitor.errors import MissingDependency
from ww_monitor.record import Finding, Histogram, Snapshot, layer_key, summary_key
from ww_monitor.sinks.heatmap import AlphaMap, Figures, is_milestone

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
        self._dashboard = Dashboard(layout=layout, figures=figures)

    def write(self, snapshot: Snapshot) -> None:
        """Scalars, then what stands beside them, at the snapshot's step."""
        step = snapshot.step or 0
        if self.scalars:
            for key, value in snapshot.scalars().items():
                self.writer.add_scalar(key, value, step)
        self._dashboard.update(self.writer, snapshot, step)

    def close(self) -> None:
        """Draw what the last picture lacks and flush; a writer made here is closed."""
        self._dashboard.finish(self.writer)
        self.writer.flush()
        if self._owned:
            self.writer.close()


@dataclass
class _Page:
    """What has been shown in one writer."""

    has_layout: bool = False
    count: int = 0
    alpha_map: AlphaMap = field(default_factory=AlphaMap)
    drawn: int = 0
    legend: str = ""
    holding: dict[tuple[str, str], Finding] = field(default_factory=dict)


class Dashboard:
    """What TensorBoard shows beside curves, in any number of writers, whoever owns them and writes the curves.

    - `#custom_scalars`: alpha of every layer in one chart and of the model in another, with the band from 2 to 6;
      traps; headroom. The layout is written once a writer; the band's edges are the constants `ww_band/alpha_low`
      and `ww_band/alpha_high`.
    - `ww_esd/<layer>`: a histogram of log10 λ.
    - `ww/findings`: as text, what begins, what ends, and what holds.
    - `ww/alpha_map`: alpha of every layer over time as a picture, its legend as text; needs matplotlib. Drawn
      anew at each of the first 64 snapshots and 32 times in every doubling of their number from then on.
    - `ww_spectrum/<name>`: what `figures` draws.

    Args:
        prefix: What the owner of the writer puts before our keys (`"train/"` for the Hugging Face Trainer).
        layout: Write the layout and the constants. TensorBoard shows one layout a run.
        figures: Draws further pictures.
    """

    def __init__(self, *, prefix: str = "", layout: bool = True, figures: Figures | None = None) -> None:
        self.prefix = prefix
        self.layout = layout
        self.figures = figures
        self._pages: WeakKeyDictionary[Any, _Page] = WeakKeyDictionary()

    def update(self, writer: Any, snapshot: Snapshot, step: int) -> None:
        """Show one snapshot.

        Args:
            writer: A `SummaryWriter`.
            snapshot: What was seen.
            step: Where on the x axis its owner's curves have it.
        """
        page = self._pages.setdefault(writer, _Page())
        if self.layout:
            self._show_band(writer, page, snapshot, step)
        write_histograms(writer, snapshot, step)
        self._show_findings(writer, page, snapshot, step)
        page.count += 1
        page.alpha_map.add(snapshot, step)
        if is_milestone(page.count):
            self._show_map(writer, page, step)
        if self.figures is not None:
            for name, picture in self.figures(snapshot).items():
                writer.add_image(layer_key("spectrum", name), picture, step, dataformats="HWC")

    def finish(self, writer: Any) -> None:
        """Draw the snapshots that the last picture of alpha lacks."""
        page = self._pages.get(writer)
        if page is not None and page.drawn < page.count:
            self._show_map(writer, page, page.alpha_map.steps[-1])

    def _show_band(self, writer: Any, page: _Page, snapshot: Snapshot, step: int) -> None:
        if not snapshot.layers:
            return
        if not page.has_layout:
            page.has_layout = True
            writer.add_custom_scalars(_layout(snapshot, self.prefix))
        for key, value in zip(BAND_KEYS, ALPHA_BAND, strict=True):
            writer.add_scalar(self.prefix + key, value, step)

    def _show_findings(self, writer: Any, page: _Page, snapshot: Snapshot, step: int) -> None:
        for finding in snapshot.findings:
            if finding.state == "begin":
                page.holding[finding.rule, finding.layer] = finding
            else:
                page.holding.pop((finding.rule, finding.layer), None)
        if snapshot.findings:
            writer.add_text(FINDINGS_KEY, _findings_text(snapshot, list(page.holding.values())), step)

    def _show_map(self, writer: Any, page: _Page, step: int) -> None:
        page.drawn = page.count
        if not page.alpha_map.layer_names:
            return
        picture = page.alpha_map.draw()
        if picture is None:
            return
        writer.add_image(MAP_KEY, picture, step, dataformats="HWC")
        legend = page.alpha_map.legend()
        if legend != page.legend:
            page.legend = legend
            writer.add_text(MAP_KEY, legend, step)


def write_histograms(writer: Any, snapshot: Snapshot, step: int) -> None:
    """One histogram of log10 λ a layer, tag `ww_esd/<layer>`."""
    for layer in snapshot.layers:
        if layer.esd is not None:
            _add_histogram(writer, layer_key("esd", layer.name), layer.esd, step)


def _layout(snapshot: Snapshot, prefix: str) -> dict[str, dict[str, list[Any]]]:
    """The charts of the metrics that the snapshot has, as `SummaryWriter.add_custom_scalars` wants them."""
    metrics = {metric for layer in snapshot.layers for metric in layer.metrics}
    start = re.escape(prefix)
    charts: dict[str, list[Any]] = {}
    if "alpha" in metrics:
        charts["alpha of every layer and the band from 2 to 6"] = [
            "Multiline",
            [f"{start}{layer_key('alpha', '.+')}", f"{start}{layer_key('band', 'alpha_.+')}"],
        ]
        charts["alpha of the model in the band from 2 to 6"] = [
            "Margin",
            [prefix + key for key in (summary_key("alpha"), *BAND_KEYS)],
        ]
    for metric, title in (
        ("num_traps", "correlation traps of every layer"),
        ("trap_headroom", "trap headroom of every layer (above 1 a trap is expected)"),
    ):
        if metric in metrics:
            charts[title] = ["Multiline", [f"{start}{layer_key(metric, '.+')}"]]
    return {"ww_monitor": charts}


def _findings_text(snapshot: Snapshot, holding: list[Finding]) -> str:
    lines = [f"- **{finding.severity}** {_escape(str(finding))}" for finding in snapshot.findings]
    still = [f"- {finding.rule} since step {finding.step}: {_escape(finding.message)}" for finding in holding]
    return "\n".join([*lines, "", "Holding now:" if still else "Nothing holds now.", "", *still])


def _escape(text: str) -> str:
    """Markdown that shows the text as it is: layer names have underscores, brackets and asterisks."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", text)


def _add_histogram(writer: Any, tag: str, esd: Histogram, step: int) -> None:
    edges = esd.edges
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    total = sum(esd.counts)
    writer.add_histogram_raw(
        tag,
        min=esd.low,
        max=esd.high,
        num=total,
        sum=sum(c * x for c, x in zip(esd.counts, centres, strict=True)),
        sum_squares=sum(c * x * x for c, x in zip(esd.counts, centres, strict=True)),
        bucket_limits=list(edges[1:]),
        bucket_counts=list(esd.counts),
        global_step=step,
    )


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependency("TensorBoard: needs tensorboard; pip install 'ww-monitor[tensorboard]'") from error
    return SummaryWriter(folder)

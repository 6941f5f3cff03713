"""Records → figures, one function a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ww_monitor.errors import MissingDependency, check_positive_int
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import History, Layer, Snapshot
from ww_monitor.settings import matching
from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.elements import elements
from ww_monitor.spectra.shuffle import permutation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BANDS = {"alpha": (2.0, 6.0), "trap_headroom": (0.0, 1.0)}
"""Where a metric is at ease, shaded: alpha from 2 to 6 (Martin & Mahoney 2021), a headroom below 1."""

_BINS_PER_DECADE = 12
_DPI = 110


def curves(history: History, metric: str = "alpha", *, ax: Axes | None = None) -> Axes:
    """A metric of every layer against the optimizer step, with its band shaded and the begin of traps marked.

    Args:
        history: The snapshots of one run.
        metric: Name of a metric.
        ax: Axes to draw into; made if missing.

    Raises:
        MissingDependency: if matplotlib is not installed.
    """
    ax = ax or _axes("plots.curves")
    if metric in BANDS:
        ax.axhspan(*BANDS[metric], color="tab:green", alpha=0.08, lw=0)
    for layer in history.layer_names:
        steps, values = history.series(metric, layer=layer)
        ax.plot(steps, values, marker=".", ms=4, lw=1.2, label=layer)
    for finding in history.findings:
        if finding.rule == "trap" and finding.state == "begin" and finding.step is not None:
            ax.axvline(finding.step, color="tab:red", lw=1, ls=":")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(metric)
    ax.legend(fontsize="small", frameon=False)
    return ax


def spectrum(layer: Layer, *, shuffled: Sequence[float] | np.ndarray | None = None, ax: Axes | None = None) -> Axes:
    """The density of a layer's eigenvalues, p(λ) against λ on logarithmic axes, with what was fitted to it.

    Dots are the eigenvalues in bins equal in log λ; the line is the power law p(λ) ∝ λ^-alpha from xmin on, as high as
    its share of the eigenvalues; the curve the Marchenko–Pastur law of the random bulk up to its edge. Drawn from
    `layer.eigenvalues` where they are kept (`ww_monitor.analyze`, `Options(keep_eigenvalues=True)`), else from the
    histogram `layer.esd`, which every snapshot and every saved history has.

    Args:
        layer: One row of a snapshot.
        shuffled: Eigenvalues of the layer with its entries shuffled, drawn as a second density: `shuffled_eigenvalues`
            gives them. They end where those of a random matrix do unless there is a correlation trap.
        ax: Axes to draw into; made if missing.

    Raises:
        MissingDependency: if matplotlib is not installed.

    >>> import torch, ww_monitor
    >>> axes = spectrum(ww_monitor.analyze(torch.nn.Linear(200, 100)).layers[0])
    >>> axes.get_xlabel(), axes.get_xscale()
    ('eigenvalue λ', 'log')
    """
    ax = ax or _axes("plots.spectrum")
    ax.set_xscale("log")
    ax.set_yscale("log")
    edges, counts = _binned(layer)
    drawn = _draw_density(ax, edges, counts, marker="o", color="tab:blue", label="eigenvalues")
    if shuffled is not None:
        _draw_density(ax, *_bins(np.asarray(shuffled, dtype=float)), marker="x", color="0.55", label="shuffled")
    limits = ax.get_ylim()
    _draw_bulk(ax, layer, total=float(counts.sum()))
    if drawn:
        _draw_tail(ax, layer, edges, counts)
        ax.set_ylim(limits)  # the laws go on where there are no eigenvalues
    ax.set_title(f"{layer.name}: {layer.verdict or layer.status}", fontsize="medium")
    ax.set_xlabel("eigenvalue λ")
    ax.set_ylabel("density p(λ)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small", frameon=False)
    return ax


@torch.no_grad()
def shuffled_eigenvalues(matrix: Matrix, *, seed: int = 0) -> np.ndarray:
    """Eigenvalues of a matrix less its mean, its entries in random order: what is left of it without correlations.

    Snapshots do not hold them: they cost an eigensolve a layer. Every slice is shuffled as replica 0 of the trap count.

    Args:
        matrix: What a walker yields; its weights are read now.
        seed: Seed of a private generator.

    Returns:
        `[slices · M]` ascending, on the scale of `Layer.eigenvalues`.

    >>> from ww_monitor.walk.torch import walk
    >>> matrix, = walk(torch.nn.Linear(200, 100))
    >>> shuffled_eigenvalues(matrix).shape
    (100,)
    """
    weights = matrix.load()
    if weights.element_size() < 2:  # torch hardly computes with float8
        weights = weights.float()
    flat = (weights.double() - elements(weights).mean[:, None, None]).flatten(1)
    order = permutation(flat.shape[1], seed=seed, replica=0).to(flat.device).long()
    values = eigenvalues(flat[:, order].view(weights.shape)).values.flatten() * matrix.eigenvalue_factor
    return np.sort(values.cpu().numpy())


def worst(snapshot: Snapshot, *, count: int = 3) -> list[Layer]:
    """The layers with the most traps, then those whose alpha is furthest outside 2 to 6; only layers with a spectrum.

    Args:
        snapshot: The snapshot of one analysis.
        count: At most this many.
    """

    def badness(layer: Layer) -> tuple[float, float]:
        traps, alpha = layer.value("num_traps"), layer.value("alpha")
        outside = max(BANDS["alpha"][0] - alpha, alpha - BANDS["alpha"][1])
        return (0.0 if math.isnan(traps) else traps), (-math.inf if math.isnan(outside) else outside)

    return sorted((layer for layer in snapshot.layers if layer.esd is not None), key=badness, reverse=True)[:count]


class SpectralFigures:
    """Pictures of `spectrum` for a sink: of chosen layers, or of the worst, at every so many snapshots.

    A sink takes it as `figures=`; it is called with each snapshot and gives pictures by layer name.

    Args:
        layers: Globs on layer names; none draws the `worst`.
        count: How many of the worst.
        every: Draw at the first snapshot and every so many from then on; a picture takes about 0.1 s.
        matrices: Gives the matrices, as `lambda: walk(model)`; with it the shuffled spectrum is drawn too, from the
            weights as they are at that moment.
        seed: Of the shuffle.

    Raises:
        InvalidArgument: naming the argument and its value.
        MissingDependency: at the call, if matplotlib is not installed.

    >>> import ww_monitor
    >>> snapshot = ww_monitor.analyze(torch.nn.Linear(64, 32))
    >>> {name: picture.dtype for name, picture in SpectralFigures(count=1)(snapshot).items()}
    {'Linear': dtype('uint8')}
    """

    def __init__(
        self,
        layers: Sequence[str] = (),
        *,
        count: int = 2,
        every: int = 10,
        matrices: Callable[[], Iterable[Matrix | Skipped]] | None = None,
        seed: int = 0,
    ) -> None:
        check_positive_int("SpectralFigures", "count", count)
        check_positive_int("SpectralFigures", "every", every)
        self.layers = tuple(layers)
        self.count = count
        self.every = every
        self.matrices = matrices
        self.seed = seed
        self._seen = 0

    def __call__(self, snapshot: Snapshot) -> Mapping[str, np.ndarray]:
        """The pictures by layer name, uint8 `[height, width, 3]`; none where it is not their turn."""
        self._seen += 1
        if (self._seen - 1) % self.every:
            return {}
        if self.layers:
            names = {name for glob in self.layers for name in matching(glob, [layer.name for layer in snapshot.layers])}
            chosen = [layer for layer in snapshot.layers if layer.esd is not None and layer.name in names]
        else:
            chosen = worst(snapshot, count=self.count)
        names = {layer.name for layer in chosen}
        items = self.matrices() if self.matrices is not None else ()
        matrices = (item for item in items if isinstance(item, Matrix) and item.name in names)
        shuffled = {matrix.name: shuffled_eigenvalues(matrix, seed=self.seed) for matrix in matrices}
        return {layer.name: render(spectrum(layer, shuffled=shuffled.get(layer.name))) for layer in chosen}


def render(ax: Axes) -> np.ndarray:
    """The figure of some axes as pixels, uint8 `[height, width, 3]`; pyplot and its state stay out of it."""
    # a canvas of its own: pyplot would choose a backend and keep the figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(ax.get_figure(root=True))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _axes(where: str) -> Axes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(f"{where}: needs matplotlib; pip install 'ww-monitor[plots]'") from error
    return Figure(figsize=(6, 4), dpi=_DPI, layout="constrained").add_subplot()


def _binned(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Edges (in λ) and counts of the known eigenvalues; both empty where there are none."""
    if layer.eigenvalues is not None:
        values = np.asarray(layer.eigenvalues, dtype=float)
        low = 10.0**layer.esd.low if layer.esd is not None else 0.0
        return _bins(values[values >= low * (1 - 1e-6)])
    if layer.esd is None:
        return np.empty(0), np.empty(0)
    return 10.0 ** np.array(layer.esd.edges), np.array(layer.esd.counts, dtype=float)


def _bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of positive values in bins equal in log λ."""
    logs = np.log10(values[values > 0])
    if not len(logs):
        return np.empty(0), np.empty(0)
    count = max(4, min(64, round(float(np.ptp(logs)) * _BINS_PER_DECADE)))
    counts, edges = np.histogram(logs, count)
    return 10.0**edges, counts.astype(float)


def _draw_density(ax: Axes, edges: np.ndarray, counts: np.ndarray, **style: Any) -> bool:
    """Dots at the geometric middle of the bins that are not empty; whether there are any."""
    full = counts > 0
    if full.any():
        centres, widths = np.sqrt(edges[:-1] * edges[1:]), np.diff(edges)
        ax.plot(centres[full], (counts / (counts.sum() * widths))[full], ms=4, ls="", **style)
    return bool(full.any())


def _draw_tail(ax: Axes, layer: Layer, edges: np.ndarray, counts: np.ndarray) -> None:
    """p(λ) = s (alpha − 1)/xmin (λ/xmin)^-alpha with s = the share of the eigenvalues from xmin on."""
    alpha, xmin = layer.value("alpha"), layer.value("xmin")
    if not (math.isfinite(alpha) and xmin > 0 and alpha > 1):
        return
    if layer.eigenvalues is not None:
        above = float((np.asarray(layer.eigenvalues) >= xmin * (1 - 1e-9)).sum())
    else:  # of the bin that xmin cuts, the part above it
        above = float((counts * np.clip((np.log(edges[1:]) - math.log(xmin)) / np.diff(np.log(edges)), 0, 1)).sum())
    share = above / counts.sum()
    x = np.geomspace(xmin, max(edges[-1], xmin * 1.01), 50)
    sigma = layer.value("sigma")
    label = f"power law, alpha = {alpha:.2f}" + (f" ± {sigma:.2f}" if math.isfinite(sigma) else "")
    ax.plot(x, share * (alpha - 1) / xmin * (x / xmin) ** -alpha, color="tab:orange", lw=1.8, label=label)
    ax.axvline(xmin, color="tab:orange", lw=0.9, ls="--")


def _draw_bulk(ax: Axes, layer: Layer, *, total: float) -> None:
    """p(λ) = √((λ₊ − λ)(λ − λ₋)) / (2π σ² M λ) (Marchenko & Pastur 1967), for WᵀW not divided by N.

    It stands for all but the spikes of `total` eigenvalues.
    """
    low, high, std = (layer.value(name) for name in ("bulk_min", "bulk_max", "bulk_std"))
    if not (high > 0 and std > 0):
        return
    spikes = layer.value("num_spikes")
    share = 1.0 if not total or math.isnan(spikes) else max(0.0, 1 - spikes / total)
    x = np.geomspace(max(low, 1e-4 * high), high, 400)[1:-1]
    density = np.sqrt((high - x) * (x - low)) / (2 * math.pi * std**2 * min(layer.shape[1:]) * x)
    ax.plot(x, share * density, color="tab:green", lw=1.3, label="Marchenko–Pastur bulk")
    ax.axvline(high, color="tab:green", lw=0.9, ls="--")

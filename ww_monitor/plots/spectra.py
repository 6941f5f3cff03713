"""The spectrum of a layer as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from ww_monitor.errors import InvalidArgument, check_choice
from ww_monitor.matrix import Matrix
from ww_monitor.plots.axes import BLUE, DETX, GREEN, GREY, ORANGE, XMIN, legend_below, new_axes, new_figure
from ww_monitor.record import Layer
from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.elements import elements
from ww_monitor.spectra.erg import correlation_space
from ww_monitor.spectra.powerlaw import SMALL_SAMPLE, tail_exponents
from ww_monitor.spectra.scan import ks_distances
from ww_monitor.spectra.shuffle import permutation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale = Literal["log-log", "log-lin", "lin-lin"]
"""Scales of the eigenvalues and of the density: logarithmic or linear."""

_BINS_PER_DECADE = 12  # our choice, as the next
_LINEAR_BINS = 60


def spectrum(
    layer: Layer,
    *,
    shuffled: Sequence[float] | np.ndarray | None = None,
    scale: Scale = "log-log",
    ax: Axes | None = None,
) -> Axes:
    """The density of a layer's eigenvalues, p(λ) against λ, with what was fitted to it.

    Dots are the eigenvalues in bins equal in log λ; the line is the power law p(λ) ∝ λ^-alpha from xmin on, as high as
    its share of the eigenvalues; the curve the Marchenko–Pastur law of the random bulk up to its edge. Drawn from
    `layer.eigenvalues` where they are kept (`ww_monitor.analyze`, `Options(keep_eigenvalues=True)`), else from the
    histogram `layer.esd`, which every snapshot and every saved history has.

    Args:
        layer: One row of a snapshot.
        shuffled: Eigenvalues of the layer with its entries shuffled, drawn as a second density: `shuffled_eigenvalues`
            gives them. They end where those of a random matrix do unless there is a correlation trap.
        scale: Of λ and of the density; `"log-lin"` shows the density of log10 λ, whose areas are shares.
        ax: Axes to draw into; made if missing.

    Raises:
        InvalidArgument: if there is no such scale.
        MissingDependency: if matplotlib is not installed.

    >>> import torch, ww_monitor
    >>> axes = spectrum(ww_monitor.analyze(torch.nn.Linear(200, 100)).layers[0])
    >>> axes.get_xlabel(), axes.get_xscale()
    ('eigenvalue λ (weight²)', 'log')
    """
    ax = _scaled(ax or new_axes("plots.spectrum"), layer, scale)
    edges, counts = _binned(layer, linear=scale == "lin-lin")
    drawn = _draw_density(ax, edges, counts, scale, marker="o", color=BLUE, label="eigenvalues")
    if shuffled is not None:
        values = _bins(np.asarray(shuffled, dtype=float), linear=scale == "lin-lin")
        _draw_density(ax, *values, scale, marker="x", color=GREY, label="shuffled")
    limits = ax.get_ylim() if scale == "log-log" else (0.0, ax.get_ylim()[1])
    _draw_bulk(ax, layer, scale, total=float(counts.sum()))
    if drawn:
        _draw_tail(ax, layer, edges, counts, scale)
        ax.set_ylim(limits)  # the laws go on where there are no eigenvalues
    legend_below(ax)
    return ax


def real_and_shuffled(layer: Layer, shuffled: Sequence[float] | np.ndarray, *, ax: Axes | None = None) -> Axes:
    """The density of log10 λ of a layer and of the same entries in random order, and where the shuffled ones end.

    What of the layer lies to the right of that line are correlations. A line far to the right of the Marchenko–Pastur
    edge, which is drawn too, is a correlation trap.

    Args:
        layer: One row of a snapshot.
        shuffled: What `shuffled_eigenvalues` gives.
        ax: Axes to draw into; made if missing.

    Raises:
        InvalidArgument: if there are no shuffled eigenvalues.
        MissingDependency: if matplotlib is not installed.
    """
    values = np.asarray(shuffled, dtype=float)
    if not (values > 0).any():
        raise InvalidArgument(
            f"plots.real_and_shuffled: expected shuffled eigenvalues above 0; got {len(values)} others"
        )
    ax = _scaled(ax or new_axes("plots.real_and_shuffled"), layer, "log-lin")
    both = (_binned(layer), BLUE, "eigenvalues"), (_bins(values), ORANGE, "shuffled")
    for (edges, counts), color, label in both:
        if counts.sum():
            heights = counts / (counts.sum() * np.diff(np.log10(edges)))
            ax.stairs(heights, edges, fill=True, alpha=0.3, color=color)
            ax.stairs(heights, edges, color=color, label=label)
    ax.axvline(float(values.max()), color=ORANGE, lw=1.2, ls="--", label="largest shuffled")
    edge = layer.value("bulk_max")
    if edge > 0:
        ax.axvline(edge, color=GREEN, lw=1.2, ls=":", label="Marchenko–Pastur edge")
    legend_below(ax)
    return ax


def correlation_boundary(layer: Layer, *, ax: Axes | None = None) -> Axes:
    """The density of log10 λ with both beginnings: of the power-law tail (xmin, red) and of detX (purple).

    detX bounds the correlation space of the exact renormalisation group condition (`erg_lambda`); at its ideal both
    lines coincide. Source: Martin & Hinrichs 2025 (SETOL, arXiv 2507.17912).

    Args:
        layer: One row of a snapshot; without `erg_lambda` its eigenvalues must be kept, or no purple line is drawn.
        ax: Axes to draw into; made if missing.

    Raises:
        MissingDependency: if matplotlib is not installed.
    """
    ax = _scaled(ax or new_axes("plots.correlation_boundary"), layer, "log-lin")
    _draw_density(ax, *_binned(layer), "log-lin", marker="o", color=BLUE, label="eigenvalues")
    ax.set_ylim(bottom=0)
    detx = layer.value("erg_lambda")
    if math.isnan(detx) and len(known := _known(layer)):
        detx = float(correlation_space(torch.tensor(known[None], dtype=torch.float64, device="cpu")).boundary)
    for name, at, color, style in (("xmin", layer.value("xmin"), XMIN, "--"), ("detX", detx, DETX, "-.")):
        if at > 0:
            ax.axvline(at, color=color, lw=1.4, ls=style, label=f"{name} = {at:.3g}")
    legend_below(ax)
    return ax


def xmin_scan(layer: Layer) -> Figure:
    """The Kolmogorov–Smirnov distance D and alpha of the tail from every eigenvalue on, and the xmin that was chosen.

    The fit takes the xmin of the smallest D; a broad or second valley says that alpha is not settled.

    Args:
        layer: One row of a snapshot with its eigenvalues (`ww_monitor.analyze`, `Options(keep_eigenvalues=True)`).

    Raises:
        InvalidArgument: if the row has no eigenvalues to fit.
        MissingDependency: if matplotlib is not installed.
    """
    values = _known(layer)
    if len(values) < 3:
        raise InvalidArgument(
            f"plots.xmin_scan: expected eigenvalues in the row of {layer.name!r}, got {len(values)}; use"
            " ww_monitor.analyze, or Options(keep_eigenvalues=True)"
        )
    given = torch.tensor(values[None], dtype=torch.float64, device="cpu")
    _, log_x, log_sum = tail_exponents(given, 0.0)
    size = torch.arange(len(values), 0, -1, dtype=torch.float64, device="cpu")
    alpha = (1 + (size - int(len(values) < SMALL_SAMPLE)) / log_sum)[0, :-1].numpy()  # as in the fit
    # Eigenvalues as large as the largest have a sum of logarithms of 0; the largest itself has no tail.
    exponent = torch.nan_to_num(
        torch.tensor(np.append(alpha, 1.0)[None], dtype=torch.float64, device="cpu") - 1, posinf=0.0
    )
    distance = ks_distances(log_x, exponent)[0, :-1].numpy()
    figure = new_figure("plots.xmin_scan", height=5.0)
    above, below = figure.subplots(2, 1, sharex=True)
    xmin = layer.value("xmin")
    for ax, y, label in ((above, distance, "distance D (1)"), (below, alpha, "alpha (1)")):
        ax.plot(values[:-1], y, color=BLUE, lw=1.2)
        ax.set_xscale("log")
        ax.set_ylabel(label)
        if xmin > 0:
            ax.axvline(xmin, color=XMIN, lw=1.2, ls="--", label=f"xmin = {xmin:.3g}")
    # The few largest eigenvalues have an alpha of any size, which would flatten all others.
    likely = alpha[: -max(2, len(alpha) // 50)]
    below.set_ylim(1, max(2.0, 1.1 * float(np.nanmax(likely[np.isfinite(likely)], initial=2.0))))
    above.set_title(layer.name, fontsize="medium", parse_math=False)
    below.set_xlabel("xmin (weight²)")
    legend_below(below)
    return figure


def _scaled(ax: Axes, layer: Layer, scale: Scale) -> Axes:
    """Axes with scales, labels and the layer's name."""
    check_choice("plots.spectrum", "scale", scale, get_args(Scale))
    ax.set_xscale("linear" if scale == "lin-lin" else "log")
    ax.set_yscale("log" if scale == "log-log" else "linear")
    ax.set_title(f"{layer.name}: {layer.verdict or layer.status}", fontsize="medium", parse_math=False)
    ax.set_xlabel("eigenvalue λ (weight²)")
    ax.set_ylabel("density p(log10 λ) (1/decade)" if scale == "log-lin" else "density p(λ) (1/weight²)")
    return ax


def _measure(x: np.ndarray, scale: Scale) -> np.ndarray | float:
    """dλ/d log10 λ where densities are of log10 λ, else 1."""
    return x * math.log(10) if scale == "log-lin" else 1.0


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


def _known(layer: Layer) -> np.ndarray:
    """The eigenvalues that are not numerically zero, ascending; none where they are not kept."""
    values = np.asarray(layer.eigenvalues or (), dtype=float)
    low = 10.0**layer.esd.low if layer.esd is not None else 0.0
    return values[(values >= low * (1 - 1e-6)) & (values > 0)]  # `low` is 10 to a rounded logarithm


def _binned(layer: Layer, *, linear: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Edges (in λ) and counts of the known eigenvalues; both empty where there are none."""
    if layer.eigenvalues is not None:
        return _bins(_known(layer), linear=linear)
    if layer.esd is None:
        return np.empty(0), np.empty(0)
    return 10.0 ** np.array(layer.esd.edges), np.array(layer.esd.counts, dtype=float)


def _bins(values: np.ndarray, *, linear: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Counts of positive values in bins equal in log λ, or in λ."""
    logs = np.log10(values[values > 0])
    if linear and len(logs):
        counts, edges = np.histogram(values[values > 0], _LINEAR_BINS)
        return edges, counts.astype(float)
    if not len(logs):
        return np.empty(0), np.empty(0)
    count = max(4, min(64, round(float(np.ptp(logs)) * _BINS_PER_DECADE)))
    counts, edges = np.histogram(logs, count)
    return 10.0**edges, counts.astype(float)


def _draw_density(ax: Axes, edges: np.ndarray, counts: np.ndarray, scale: Scale, **style: Any) -> bool:
    """Dots at the geometric middle of the bins that are not empty; whether there are any."""
    full = counts > 0
    if full.any():
        widths = np.diff(np.log10(edges) if scale == "log-lin" else edges)
        centres = (edges[:-1] + edges[1:]) / 2 if scale == "lin-lin" else np.sqrt(edges[:-1] * edges[1:])
        ax.plot(centres[full], (counts / (counts.sum() * widths))[full], ms=4, ls="", **style)
    return bool(full.any())


def _draw_tail(ax: Axes, layer: Layer, edges: np.ndarray, counts: np.ndarray, scale: Scale) -> None:
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
    density = share * (alpha - 1) / xmin * (x / xmin) ** -alpha
    ax.plot(x, density * _measure(x, scale), color=ORANGE, lw=1.8, label=label)
    ax.axvline(xmin, color=ORANGE, lw=0.9, ls="--", label=f"xmin = {xmin:.3g}")


def _draw_bulk(ax: Axes, layer: Layer, scale: Scale, *, total: float) -> None:
    """p(λ) = √((λ₊ − λ)(λ − λ₋)) / (2π σ² M λ) (Marchenko & Pastur 1967), for WᵀW not divided by N.

    It stands for all but the spikes of `total` eigenvalues.
    """
    low, high, std = (layer.value(name) for name in ("bulk_min", "bulk_max", "bulk_std"))
    if not (high > 0 and std > 0):
        return
    spikes = layer.value("num_spikes")
    share = 1.0 if not total or math.isnan(spikes) else max(0.0, 1 - spikes / total)
    # Of a square matrix the law begins at 0. At its ends it is 0, which has no logarithm.
    x = np.geomspace(max(low, 1e-4 * high), high, 400)[1:-1]
    density = np.sqrt((high - x) * (x - low)) / (2 * math.pi * std**2 * min(layer.shape[1:]) * x)
    ax.plot(x, share * density * _measure(x, scale), color=GREEN, lw=1.3, label="Marchenko–Pastur bulk")
    ax.axvline(high, color=GREEN, lw=0.9, ls="--", label=f"its edge = {high:.3g}")

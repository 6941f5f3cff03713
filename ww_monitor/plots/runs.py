"""Runs as pictures: a metric of every layer against the step, by depth and time, and of two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ww_monitor.errors import InvalidArgument
from ww_monitor.plots.axes import (
    BANDS,
    BLUE,
    GREEN,
    ORANGE,
    PALETTE,
    labelled,
    legend_beside,
    new_axes,
    new_figure,
    shown,
)
from ww_monitor.record import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMES = 24  # at the rows of a map (our choice)


def curves(history: History, metric: str = "alpha", *, ax: Axes | None = None) -> Axes:
    """A metric of every layer against the optimizer step, with its band shaded and the begin of traps marked.

    Args:
        history: The snapshots of one run.
        metric: Name of a metric.
        ax: Axes to draw into; made if missing.

    Raises:
        MissingDependency: if matplotlib is not installed.
    """
    ax = ax or new_axes("plots.curves")
    if metric in BANDS:
        ax.axhspan(*BANDS[metric], color=GREEN, alpha=0.08, lw=0)
    names = history.layer_names
    for name, style in zip(names, _styles(len(names)), strict=True):
        steps, values = history.series(metric, layer=name)
        ax.plot(steps, values, marker=".", ms=4, lw=1.2, label=shown(name), **style)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(labelled(metric))
    traps = [one.step for one in history.findings if one.rule == "trap" and one.state == "begin"]
    begun = sorted({step for step in traps if step is not None})
    for step in begun:
        ax.axvline(step, color=ORANGE, lw=1, ls=":", label="a trap begins" if step == begun[0] else None)
    legend_beside(ax)
    return ax


def _styles(count: int) -> list[dict[str, Any]]:
    """A colour a layer and a dash a round of colours; of many layers the colour says the depth, dark first."""
    if count <= 2 * len(PALETTE):
        return [
            {"color": PALETTE[place % len(PALETTE)], "ls": ("-", "--")[place // len(PALETTE)]} for place in range(count)
        ]
    from matplotlib import colormaps

    return [{"color": colour} for colour in colormaps["viridis"](np.linspace(0, 0.92, count))]  # its end is pale


def curves_of_two(a: History, b: History, metric: str = "alpha", *, names: Sequence[str] = ("A", "B")) -> Figure:
    """`curves` of two runs side by side, on the same axes of steps and values.

    Args:
        a: The snapshots of one run.
        b: Those of the other.
        metric: Name of a metric.
        names: What the runs are called.

    Raises:
        MissingDependency: if matplotlib is not installed.
    """
    figure = new_figure("plots.curves_of_two", width=11.0)
    for ax, run, name in zip(figure.subplots(1, 2, sharex=True, sharey=True), (a, b), names, strict=True):
        curves(run, metric, ax=ax)
        ax.set_title(name, parse_math=False)
    return figure


def depth_and_time(history: History, metric: str = "alpha", *, ax: Axes | None = None) -> Axes:
    """A metric as colours: a row a layer, the first on top; a column a snapshot. White: not known.

    The colours of alpha are those of the band from 2 to 6; red is below it and grey above.

    Args:
        history: The snapshots of one run.
        metric: Name of a metric.
        ax: Axes to draw into; made if missing.

    Raises:
        InvalidArgument: if the run has no snapshot with layers.
        MissingDependency: if matplotlib is not installed.
    """
    names = history.layer_names
    if not names:
        raise InvalidArgument("plots.depth_and_time: expected a history with layers, got none")
    ax = ax or new_axes("plots.depth_and_time")
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    rows = {name: row for row, name in enumerate(names)}
    values = np.full((len(names), len(history)), np.nan)
    for column, snapshot in enumerate(history):
        for layer in snapshot.layers:
            values[rows[layer.name], column] = layer.value(metric)
    values[~np.isfinite(values)] = np.nan
    colours = colormaps["viridis"].with_extremes(bad="white")
    band = metric == "alpha"
    if band:
        colours = colours.with_extremes(under="#fb6a4a", over="#cdcdcd", bad="white")
    scale = Normalize(*BANDS["alpha"]) if band else None
    image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, norm=scale)
    ax.set_yticks(every := range(0, len(names), -(-len(names) // _MOST_NAMES)))
    ax.set_yticklabels([names[row] for row in every], fontsize="small", parse_math=False)
    ax.set_xticks(columns := range(0, len(history), -(-len(history) // 6)))
    ax.set_xticklabels([str(column if (at := history[column].step) is None else at) for column in columns])
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax, label=labelled(metric), extend="both" if band else "neither")
    return ax


def fit_over_time(history: History, *, layer: str | None = None) -> Figure:
    """Alpha and the distance D of its fit against the optimizer step, of one layer or (without a name) of the model.

    Alpha counts where D stays small.

    Args:
        history: The snapshots of one run, also from its checkpoints (`ww_monitor.replay_checkpoints`).
        layer: Name of a layer.

    Raises:
        InvalidArgument: if no snapshot has a layer of that name.
        MissingDependency: if matplotlib is not installed.
    """
    if layer is not None and layer not in history.layer_names:
        few = ", ".join(map(repr, history.layer_names[:4]))
        raise InvalidArgument(f"plots.fit_over_time: layer must be one of the history; got {layer!r}; it has {few}")
    figure = new_figure("plots.fit_over_time", height=5.0)
    above, below = figure.subplots(2, 1, sharex=True)
    above.axhspan(*BANDS["alpha"], color=GREEN, alpha=0.08, lw=0)
    distance = "D" if len(history) and history.last.preset == "weightwatcher" else "ks"
    for ax, metric, label in ((above, "alpha", "alpha (1)"), (below, distance, "distance D (1)")):
        ax.plot(*history.series(metric, layer=layer), marker=".", color=BLUE, lw=1.2)
        ax.set_ylabel(label)
    below.set_ylim(bottom=0)
    above.set_title("mean of the layers" if layer is None else layer, fontsize="medium", parse_math=False)
    below.set_xlabel("optimizer step")
    return figure

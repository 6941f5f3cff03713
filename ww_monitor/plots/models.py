"""Several models as pictures: the values of two, and a quality metric against the error of a series."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ww_monitor.errors import InvalidArgument
from ww_monitor.plots.axes import BANDS, BLUE, GREEN, ORANGE, labelled, legend_below, new_axes, shown
from ww_monitor.record import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def histogram_of_two(
    a: Snapshot, b: Snapshot, metric: str = "alpha", *, names: Sequence[str] = ("A", "B"), ax: Axes | None = None
) -> Axes:
    """How many layers of two models have which value of a metric, in the same bins; dotted: the mean of each.

    Args:
        a: The snapshot of one model.
        b: That of the other.
        metric: Name of a metric.
        names: What the models are called.
        ax: Axes to draw into; made if missing.

    Raises:
        InvalidArgument: if neither model knows the metric.
        MissingDependency: if matplotlib is not installed.
    """
    both = [[layer.value(metric) for layer in snapshot.layers] for snapshot in (a, b)]
    known = [np.array([value for value in values if math.isfinite(value)]) for values in both]
    together = np.concatenate(known)
    if not len(together):
        raise InvalidArgument(f"plots.histogram_of_two: expected layers with {metric!r}, got none")
    ax = ax or new_axes("plots.histogram_of_two")
    if metric in BANDS:
        ax.axvspan(*BANDS[metric], color=GREEN, alpha=0.08, lw=0)
    edges = np.histogram_bin_edges(together, min(40, max(8, len(together) // 4))).tolist()  # our choice
    for values, name, color, style in zip(known, names, (BLUE, ORANGE), ("-", "--"), strict=True):
        ax.hist(values, edges, histtype="stepfilled", color=color, alpha=0.3)
        ax.hist(values, edges, histtype="step", color=color, ls=style, label=shown(f"{name} ({len(values)} layers)"))
        if len(values):
            ax.axvline(float(values.mean()), color=color, lw=1, ls=":")
    ax.set_xlabel(labelled(metric))
    ax.set_ylabel("layers (count)")
    legend_below(ax)
    return ax


def metric_and_error(
    models: Mapping[str, Snapshot], errors: Mapping[str, float], metric: str = "alpha_hat", *, ax: Axes | None = None
) -> Axes:
    """A model-level metric against the test error of a series of models, each with its name, and Kendall's τ.

    Within one series (one architecture, one data set) a smaller alpha-hat goes with a smaller error. Source: Martin,
    Peng & Mahoney 2021 (Nature Communications 12, 4122).

    Args:
        models: Name → snapshot.
        errors: Name → test error in percent, of the same names.
        metric: Name of a model-level metric.
        ax: Axes to draw into; made if missing.

    Raises:
        InvalidArgument: if the names differ, or a model does not know the metric.
        MissingDependency: if matplotlib is not installed.
    """
    if set(models) != set(errors) or not models:
        odd = sorted(set(models) ^ set(errors))
        raise InvalidArgument(f"plots.metric_and_error: expected the same names in models and errors; got {odd} in one")
    x = [snapshot.summary.get(metric, math.nan) for snapshot in models.values()]
    unknown = [name for name, value in zip(models, x, strict=True) if not math.isfinite(value)]
    if unknown:
        raise InvalidArgument(f"plots.metric_and_error: expected {metric!r} of every model; got none of {unknown[:4]}")
    ax = ax or new_axes("plots.metric_and_error")
    y = [errors[name] for name in models]
    ax.plot(x, y, ls="", marker="o", color=BLUE)
    for name, at, error in zip(models, x, y, strict=True):
        place: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points", "parse_math": False}
        ax.annotate(name, (at, error), fontsize="small", **place)
    ax.set_xlabel(labelled(metric))
    ax.set_ylabel("test error (%)")
    ax.margins(0.12)
    if len(x) > 2:
        from scipy.stats import kendalltau

        ax.set_title(f"Kendall's τ = {kendalltau(x, y).statistic:.2f}", fontsize="medium")
    return ax

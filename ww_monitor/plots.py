"""History → figures, one function a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ww_monitor.errors import MissingDependency
from ww_monitor.record import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BANDS = {"alpha": (2.0, 6.0), "trap_headroom": (0.0, 1.0)}
"""Where a metric is at ease, shaded: alpha from 2 to 6 (Martin & Mahoney 2021), a headroom below 1."""


def curves(history: History, metric: str = "alpha", *, ax: Axes | None = None) -> Axes:
    """A metric of every layer against the optimizer step, with its band shaded and the begin of traps marked.

    Args:
        history: A run.
        metric: Name of a metric.
        ax: Axes to draw into; made if missing.

    Raises:
        MissingDependency: if matplotlib is not installed.
    """
    if ax is None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependency("plots.curves: needs matplotlib; pip install 'ww-monitor[plots]'") from error
        ax = Figure(figsize=(6, 4), layout="constrained").add_subplot()
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

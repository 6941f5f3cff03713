"""Records → figures, one function a picture; nothing is shown, and pyplot stays out of it.

A function of one picture draws into axes and returns them, one of several panels returns the figure. In a notebook
`snapshot.plot()` and `history.plot()` are the shortest way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ww_monitor.errors import InvalidArgument
from ww_monitor.plots.axes import BANDS, new_figure
from ww_monitor.plots.models import histogram_of_two, metric_and_error
from ww_monitor.plots.pictures import SpectralFigures, render, worst
from ww_monitor.plots.runs import curves, curves_of_two, depth_and_time, fit_over_time
from ww_monitor.plots.spectra import (
    correlation_boundary,
    real_and_shuffled,
    shuffled_eigenvalues,
    spectrum,
    xmin_scan,
)
from ww_monitor.record import History, Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overview(record: Snapshot | History, what: str | None = None) -> Figure:
    """What `plot()` of a record gives.

    Args:
        record: A snapshot: the spectrum of the layer of that name, or of the worst one. A history: `curves` above
            `depth_and_time` of the metric of that name, or of alpha.
        what: That name.

    Raises:
        InvalidArgument: if there is nothing to draw.
        KeyError: if a snapshot has no layer of that name, naming those it has.
        MissingDependency: if matplotlib is not installed.
    """
    if isinstance(record, Snapshot):
        layers = worst(record, count=1) if what is None else [record[what]]
        if not layers:
            raise InvalidArgument("plots.overview: expected a snapshot with the spectrum of a layer, got none")
        figure = new_figure("plots.overview")
        spectrum(layers[0], ax=figure.add_subplot())
        return figure
    figure = new_figure("plots.overview", width=10.0, height=7.0)
    above, below = figure.subplots(2, 1)
    curves(record, what or "alpha", ax=above)
    depth_and_time(record, what or "alpha", ax=below)
    return figure


__all__ = [
    "BANDS",
    "SpectralFigures",
    "correlation_boundary",
    "curves",
    "curves_of_two",
    "depth_and_time",
    "fit_over_time",
    "histogram_of_two",
    "metric_and_error",
    "overview",
    "real_and_shuffled",
    "render",
    "shuffled_eigenvalues",
    "spectrum",
    "worst",
    "xmin_scan",
]

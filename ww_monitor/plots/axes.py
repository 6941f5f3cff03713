"""What all pictures share: axes without pyplot, colours that everyone can tell apart, legends beside the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ww_monitor.errors import MissingDependency
from ww_monitor.metric import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

BANDS = {"alpha": (2.0, 6.0), "trap_headroom": (0.0, 1.0)}
"""Where a metric is at ease, shaded: alpha from 2 to 6 (Martin & Mahoney 2021), a headroom below 1."""

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "0.5"
PALETTE = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Seven colours that are told apart without full colour vision (Okabe & Ito 2008)."""

XMIN, DETX = "red", "purple"
"""Colours of the lines at xmin and at the boundary of the correlation space, as in weightwatcher."""

MOST_IN_LEGEND = 2 * len(PALETTE) + 1
"""As many lines as there are styles, and one for traps: of more lines the colour says the depth."""

_DPI = 110


def new_figure(where: str, *, width: float = 6.0, height: float = 4.0) -> Figure:
    """A figure that no backend knows, and that a notebook shows all the same.

    Raises:
        MissingDependency: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(f"{where}: needs matplotlib; pip install 'ww-monitor[plots]'") from error

    class Picture(Figure):
        """A figure that IPython shows without pyplot."""

        def _repr_png_(self) -> bytes:
            from io import BytesIO

            data = BytesIO()
            self.savefig(data, format="png")
            return data.getvalue()

    return Picture(figsize=(width, height), dpi=_DPI, layout="constrained")


def new_axes(where: str) -> Axes:
    """The axes of a figure with one picture."""
    return new_figure(where).add_subplot()


def labelled(metric: str) -> str:
    """The name of a metric with its unit, if it has one.

    >>> labelled("alpha"), labelled("xmin")
    ('alpha', 'xmin (weight²)')
    """
    unit = next(
        (one.unit for preset in ("default", "weightwatcher") for one in metrics(preset) if one.name == metric), "1"
    )
    return metric if unit == "1" else f"{metric} ({unit})"


_SHOWN = "\u200b"  # a space of no width


def shown(name: str) -> str:
    """A label for matplotlib, which leaves those that begin with an underscore out of legends."""
    return _SHOWN + name if name.startswith("_") else name


def _as_given(legend: Legend) -> None:
    for text in legend.get_texts():
        text.set_text(text.get_text().removeprefix(_SHOWN))
        text.set_parse_math(False)


def legend_beside(ax: Axes) -> None:
    """A legend to the right of the axes; of many lines every so many."""
    handles, labels = ax.get_legend_handles_labels()
    every = -(-len(handles) // MOST_IN_LEGEND)
    if handles:
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.5}
        _as_given(ax.legend(handles[::every], labels[::every], fontsize="small", frameon=False, **place))


def legend_below(ax: Axes) -> None:
    """A legend under the axis label, in two columns."""
    if not ax.get_legend_handles_labels()[0]:
        return
    from matplotlib.transforms import ScaledTranslation

    # 34 points down: below the numbers and the label of the axis.
    under = ax.transAxes + ScaledTranslation(0, -34 / 72, ax.figure.dpi_scale_trans)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": under}
    _as_given(ax.legend(fontsize="small", frameon=False, ncols=2, borderaxespad=0, **place))

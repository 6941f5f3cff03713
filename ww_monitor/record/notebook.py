"""How a notebook shows a record: a table, whose texts are escaped, and pictures on request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 60
_SHOWN = ("alpha", "alpha_hat", "num_spikes", "trap_headroom", "num_traps")


class Shown:
    """A snapshot, or a record with a table of its own, that a notebook shows."""

    def _repr_html_(self: Any) -> str:
        step = "" if self.step is None else f", step {self.step}"
        return table(f"{len(self.layers)} layers, {len(self.skipped)} skipped{step}", self.layers, self.findings)

    def plot(self, what: str | None = None) -> Figure:
        """A picture: of a snapshot the spectrum of a layer, of a history a metric over depth and time.

        Args:
            what: Name of the layer, else the worst one; of a history the name of the metric, else alpha.

        Returns:
            A figure of matplotlib, which a notebook shows; see `ww_monitor.plots`.
        """
        figure: Figure = import_module("ww_monitor.plots").overview(self, what)  # records know no pictures
        return figure


def table(caption: str, layers: Sequence[Any], findings: Iterable[object]) -> str:
    """HTML: a row a layer with its main numbers, the first 60, and the findings below."""
    head = "".join(f"<th>{name}</th>" for name in ("layer", "verdict", *_SHOWN))
    rows = []
    for layer in layers[:MOST_ROWS]:
        values = (layer.value(name) for name in _SHOWN)
        cells = [layer.name, layer.verdict or layer.status, *(f"{v:.3g}" if v == v else "–" for v in values)]
        rows.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    more = f"<p>{len(layers) - MOST_ROWS} more layers</p>" if len(layers) > MOST_ROWS else ""
    said = "".join(f"<li>{escape(str(finding))}</li>" for finding in findings)
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"</table>{more}" + (f"<ul>{said}</ul>" if said else "")
    )

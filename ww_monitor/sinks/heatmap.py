"""Alpha by depth and time as one picture, whose cost does not grow with the run; drawn if matplotlib is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ww_monitor.record import NAN, Snapshot

Figures = Callable[[Snapshot], Mapping[str, np.ndarray]]
"""A snapshot → pictures by name, uint8 `[height, width, 3]`; see `ww_monitor.plots.SpectralFigures`."""

_BELOW, _ABOVE, _UNKNOWN = "#fb6a4a", "#cdcdcd", "#ffffff"
_DPI = 100
_FONT_POINTS = 8.5
_LINE, _LETTER = 16, 7.6
"""Pixels of a line of text, and of a wide letter, at that size."""
_MAX_LABEL = 16
_MAX_WIDTH, _MAX_HEIGHT = 240, 220
"""Pixels of the map where there are many columns or rows: so the whole picture is little wider than TensorBoard's card
of 350 pixels, which it is scaled down to, and its text stays readable there. A cell is at least a pixel."""


def is_milestone(count: int) -> bool:
    """Whether the `count`-th snapshot is one of those that get what is costly: all of 64, then 32 every doubling.

    >>> [sum(is_milestone(count) for count in range(1, n + 1)) for n in (64, 128, 1_000_000)]
    [64, 96, 509]
    """
    return count % (1 << max(0, count.bit_length() - 6)) == 0


class AlphaMap:
    """Alpha of every layer (a row each, the first layer on top) at every step (a column each).

    A run of any length is kept in at most `max_columns` columns and the latest: when they are full, every second goes.

    Args:
        max_columns: Most snapshots that the picture shows.

    >>> from ww_monitor.record import Layer
    >>> picture = AlphaMap()
    >>> for step in (0, 100):
    ...     layer = Layer("fc", "dense", (1, 64, 64), metrics={"alpha": 4.0 - step / 100})
    ...     picture.add(Snapshot((layer,)), step)
    >>> picture.steps, picture.values.tolist()
    ([0, 100], [[4.0, 3.0]])
    """

    def __init__(self, *, max_columns: int = 240) -> None:
        self.max_columns = max_columns
        self.layer_names: list[str] = []
        self._columns: list[tuple[int, dict[str, float]]] = []
        self._latest: tuple[int, dict[str, float]] | None = None
        self._stride = 1
        self._count = 0

    def add(self, snapshot: Snapshot, step: int) -> None:
        """Append a column; where a run went back (a resume, a second fit), what it repeats replaces what was there."""
        if self._latest is not None and step <= self._latest[0]:
            self._columns = [column for column in self._columns if column[0] < step]
        self._latest = step, {layer.name: layer.value("alpha") for layer in snapshot.layers}
        known = set(self.layer_names)
        self.layer_names += [layer.name for layer in snapshot.layers if layer.name not in known]
        if self._count % self._stride == 0:
            self._columns.append(self._latest)
        self._count += 1
        if len(self._columns) > self.max_columns:
            self._columns = self._columns[::2]
            self._stride *= 2

    @property
    def columns(self) -> list[tuple[int, dict[str, float]]]:
        """Step and alpha by layer of the snapshots kept, the latest always among them."""
        if self._latest is None or (self._columns and self._columns[-1] is self._latest):
            return self._columns
        return [*self._columns, self._latest]

    @property
    def steps(self) -> list[int]:
        """The step of each column."""
        return [step for step, _ in self.columns]

    @property
    def values(self) -> np.ndarray:
        """`[layers, columns]` alpha, NaN where it is not known."""
        rows = [[values.get(name, NAN) for _, values in self.columns] for name in self.layer_names]
        return np.array(rows, dtype=float).reshape(len(self.layer_names), len(self.columns))

    def draw(self) -> np.ndarray | None:
        """The picture, uint8 `[height, width, 3]`: layers down, steps across, the scale of colours at the right.

        `None` where matplotlib is not installed.
        """
        if find_spec("matplotlib") is None:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        values, steps = self.values, self.steps
        rows, columns = max(1, values.shape[0]), max(1, values.shape[1])
        cell = min(18, max(1, _MAX_HEIGHT // rows))
        height, width = cell * rows, min(36, max(1, _MAX_WIDTH // columns)) * columns
        names = [_label(name) for name in self.layer_names]
        left = 12 + _LETTER * max(map(len, names), default=0)
        full_width, full_height = left + max(width, 160) + 50, 3 * _LINE + max(height, 6 * _LINE)
        figure = Figure((full_width / _DPI, full_height / _DPI), _DPI, facecolor="white")

        def axes(x: float, wide: float, high: float) -> Any:
            top = 1 - (1.5 * _LINE + high) / full_height
            return figure.add_axes((x / full_width, top, wide / full_width, high / full_height))

        ax = axes(left, width, height)
        ax.set_axis_off()  # texts alone are drawn in half the time of an axis
        text = partial(ax.text, fontsize=_FONT_POINTS, parse_math=False)  # names may have dollar signs
        if values.size:
            ax.imshow(alpha_colours(values), aspect="auto", interpolation="nearest")
            for row in range(0, len(names), -(-_LINE // cell)):
                text(-0.5 - 6 * columns / width, row, names[row], ha="right", va="center")
            for column in {0, len(steps) - 1}:
                text(column, rows - 0.5 + 4 / cell, f"{steps[column]:,}", ha="center", va="top")
            text(-0.5, -0.5 - 4 / cell, "alpha: layers down, steps across", va="bottom")
        bar = figure.colorbar(_scale(), cax=axes(full_width - 36, 10, max(height, 6 * _LINE)), extend="both")
        bar.set_ticks([2, 4, 6])
        bar.ax.tick_params(labelsize=_FONT_POINTS, length=2)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # the memory is the canvas'

    def legend(self) -> str:
        """What the picture shows, in Markdown: rows, columns and colours."""
        rows = "\n".join(f"| {row} | `{name}` |" for row, name in enumerate(self.layer_names, start=1))
        return (
            "Alpha of every layer: a row a layer, the first on top; a column a snapshot, the step grows to the right. "
            "Dark blue (2) over green to yellow (6): the band of trained layers. Red: below. Grey: above. "
            f"White: not known.\n\n| row | layer |\n|---|---|\n{rows}"
        )


def alpha_colours(alpha: np.ndarray) -> np.ndarray:
    """The colours of values of alpha: red below 2, viridis from 2 to 6, grey above, white where it is not known.

    Viridis is readable without colour vision, and no red or grey of its ends is as dark or as bright.

    Args:
        alpha: One or two dimensions.

    Returns:
        uint8 of that shape and a last dimension of 3.

    >>> alpha_colours(np.array([2.0, 4.0, float("nan")])).tolist()
    [[68, 1, 84], [32, 144, 140], [255, 255, 255]]
    """
    return np.asarray(_scale().to_rgba(alpha, bytes=True))[..., :3]


def _scale() -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = colormaps["viridis"].with_extremes(under=_BELOW, over=_ABOVE, bad=_UNKNOWN)
    return ScalarMappable(Normalize(2, 6), colours)


def _label(name: str) -> str:
    """A name cut at the front, for the number of the block and the kind of layer stand at the end; in known letters."""
    short = name if len(name) <= _MAX_LABEL else f"..{name[2 - _MAX_LABEL :]}"
    # A letter that the font lacks would make matplotlib warn at every drawing.
    return short.encode("latin-1", "replace").decode("latin-1")

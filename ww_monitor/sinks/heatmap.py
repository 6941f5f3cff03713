"""Alpha by depth and time as one picture: a plain RGB array, whose cost does not grow with the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ww_monitor.errors import MissingDependency
from ww_monitor.record import NAN, Snapshot

Figures = Callable[[Snapshot], Mapping[str, np.ndarray]]
"""A snapshot → pictures by name, uint8 `[height, width, 3]`; see `ww_monitor.plots.SpectralFigures`."""

_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_COLOURS = (
    (1.0, (103, 0, 13)),
    (1.999, (251, 106, 74)),
    *((2.0 + step, colour) for step, colour in enumerate(_VIRIDIS)),
    (6.001, (205, 205, 205)),
    (10.0, (110, 110, 110)),
)
"""Alpha → colour: reds below 2, viridis (readable without colour vision) from 2 to 6, greys above."""

_UNKNOWN = 255
_INK = (40, 40, 40)
_MAX_LABEL = 36
_FONT_SIZE = 12
_GAP = 8


def alpha_colours(alpha: np.ndarray) -> np.ndarray:
    """The colours of values of alpha: red below 2, viridis from 2 to 6, grey above, white where it is not known.

    Args:
        alpha: Any shape.

    Returns:
        uint8 of that shape and a last dimension of 3.

    >>> alpha_colours(np.array([2.0, 4.0, float("nan")])).tolist()
    [[68, 1, 84], [33, 145, 140], [255, 255, 255]]
    """
    anchors = [value for value, _ in _COLOURS]
    channels = [np.interp(alpha, anchors, [colour[c] for _, colour in _COLOURS]) for c in range(3)]
    return np.where(np.isnan(alpha)[..., None], _UNKNOWN, np.stack(channels, -1)).round().astype(np.uint8)


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
        max_columns: Snapshots kept.

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

    def draw(self) -> np.ndarray:
        """The picture, uint8 `[height, width, 3]`: layers down, steps across, the scale of colours at the right.

        Raises:
            MissingDependency: if pillow, which draws the letters, is not installed.
        """
        values = self.values
        rows, columns = max(1, values.shape[0]), max(1, values.shape[1])
        height, width = min(18, max(2, 640 // rows)), min(36, max(3, 720 // columns))
        cells = alpha_colours(values).repeat(height, 0).repeat(width, 1)
        return _with_labels(cells, _short(self.layer_names), self.steps, row_height=height)

    def legend(self) -> str:
        """What the picture shows, in Markdown: rows, columns and colours."""
        rows = "\n".join(f"| {row} | `{name}` |" for row, name in enumerate(self.layer_names, start=1))
        return (
            "Alpha of every layer: a row a layer, the first on top; a column a snapshot, the step grows to the right. "
            "Red: below 2. Dark blue (2) over green to yellow (6): the band of trained layers. "
            f"Grey: above 6. White: not known.\n\n| row | layer |\n|---|---|\n{rows}"
        )


def _short(names: list[str]) -> list[str]:
    """Names cut at the front: the number of the block and the kind of layer stand at the end."""
    return [name if len(name) <= _MAX_LABEL else f"..{name[2 - _MAX_LABEL :]}" for name in names]


def _with_labels(cells: np.ndarray, names: list[str], steps: list[int], *, row_height: int) -> np.ndarray:
    image_kind, draw_kind, font = _letters()
    left = _GAP + max((int(font.getlength(_latin(name))) for name in names), default=0)
    line = _FONT_SIZE + 4
    bar = _colour_bar(max(len(cells), 6 * line))
    height, width = 2 * line + len(bar) + _GAP, left + _GAP + max(cells.shape[1], 160) + 2 * _GAP + 80
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    top, x, x_bar = line + _GAP // 2, left + _GAP, width - 70
    canvas[top : top + len(cells), x : x + cells.shape[1]] = cells
    canvas[top : top + len(bar), x_bar : x_bar + bar.shape[1]] = bar
    picture = image_kind.fromarray(canvas)
    draw = draw_kind.Draw(picture)
    draw.text((x, 0), "alpha by layer (down) and step (across)", fill=_INK, font=font)
    every = -(-line // row_height)
    for row in range(0, len(names), every):
        middle = top + row * row_height + row_height // 2
        draw.text((left, middle), _latin(names[row]), fill=_INK, font=font, anchor="rm")
    for step, edge, anchor in ((steps[0], x, "la"), (steps[-1], x + cells.shape[1], "ra")) if steps else ():
        if edge == x or len(steps) > 3:
            draw.text((edge, top + len(cells) + 2), f"{step:,}", fill=_INK, font=font, anchor=anchor)
    for value, label in ((10, "> 10"), (6, "6"), (4, "4"), (2, "2"), (1, "< 1")):
        y = top + int((10 - value) / 9 * (len(bar) - 1))
        draw.text((x_bar + bar.shape[1] + 4, y), label, fill=_INK, font=font, anchor="lm")
    return np.asarray(picture)


def _colour_bar(height: int) -> np.ndarray:
    return alpha_colours(np.linspace(10, 1, height))[:, None].repeat(16, 1)


def _letters() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingDependency("AlphaMap.draw: needs pillow; pip install pillow") from error
    return Image, ImageDraw, ImageFont.load_default(_FONT_SIZE)


def _latin(text: str) -> str:
    return text.encode("latin-1", "replace").decode("latin-1")

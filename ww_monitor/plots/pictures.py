"""Which layers are worth a picture, and their pictures as pixels for a sink."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ww_monitor.errors import check_positive_int
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.plots.axes import BANDS
from ww_monitor.plots.spectra import shuffled_eigenvalues, spectrum
from ww_monitor.record import Layer, Snapshot
from ww_monitor.settings import matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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

    >>> import torch, ww_monitor
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

    canvas: Any = FigureCanvasAgg(ax.figure.canvas.figure)  # the axes may be those of a subfigure
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

"""The weights at one moment, and how far a model has moved since: distance, and the turning of leading subspaces."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ww_monitor.errors import check_positive_int
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import NAN
from ww_monitor.spectra.subspaces import rotation, subspace

logger = logging.getLogger(__name__)

TOP = 8
"""Singular directions that are followed. Our choice: the learnt directions of a layer are few, and 8 is the least
number of eigenvalues that is analysed."""

DELTAS = ("delta_norm", "left_rotation", "right_rotation")
"""Names of what `Baseline.drift` gives."""


@dataclass(frozen=True)
class Baseline:
    """The weights W₀ of a model at one moment, to follow W − W₀ and the turning of its leading subspaces.

    It holds copies on the host, never the live weights: one copy of every matrix in its storage precision, and
    8·k·(rows + columns) bytes for the two bases of every slice.

    Attributes:
        matrices: The initial matrices; `ww_monitor.walk.delta.delta(items, baseline.matrices)` gives W − W₀.
        bases: Name → left `[R, N, k]` and right `[R, M, k]` basis.
        top: Directions that are followed.
    """

    matrices: tuple[Matrix, ...]
    bases: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    top: int

    @classmethod
    def capture(cls, items: Iterable[Matrix | Skipped], *, top: int = TOP) -> Baseline:
        """Copy what a walker yields, after selection; a matrix that cannot be read is left out.

        Args:
            items: The matrices to analyse, as a walker yields them.
            top: Directions to follow.

        Raises:
            InvalidArgument: if `top` is not an integer of at least 1.
        """
        check_positive_int("Baseline", "top", top)
        matrices, bases = [], {}
        for item in items:
            if isinstance(item, Matrix):
                try:
                    # copy=True: on a host `to` alone gives the live weight, from which nothing ever moves
                    stored = item.load().detach().to("cpu", copy=True)
                    bases[item.name] = _on_host(subspace(stored, top))
                except Exception as error:
                    logger.debug("no baseline of layer %s", item.name, exc_info=error)
                else:
                    matrices.append(replace(item, load=stored.detach, frozen=False, shards=None))
        return cls(tuple(matrices), bases, top)

    @torch.no_grad()
    def drift(self, items: Iterable[Matrix | Skipped]) -> dict[str, dict[str, float]]:
        """How far each matrix is from its baseline; never raises for a layer.

        Args:
            items: The matrices now.

        Returns:
            Name → `delta_norm` = ‖W − W₀‖_F/‖W₀‖_F, `left_rotation` and `right_rotation` (`rotation`, mean over
            slices). NaN for a layer that the baseline lacks, has in another shape, or that cannot be read.

        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> live = [Matrix("fc", "dense", (1, 8, 16), lambda: layer.weight.detach()[None])]
        >>> baseline = Baseline.capture(live)
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(1.5)
        >>> {key: abs(round(value, 6)) for key, value in baseline.drift(live)["fc"].items()}
        {'delta_norm': 0.5, 'left_rotation': 0.0, 'right_rotation': 0.0}
        """
        before = {matrix.name: matrix for matrix in self.matrices}
        result = {}
        for item in items:
            if isinstance(item, Matrix):
                try:
                    values = self._drift_of(item, before[item.name])
                except Exception as error:
                    logger.debug("no drift of layer %s", item.name, exc_info=error)
                    values = (NAN, NAN, NAN)
                result[item.name] = dict(zip(DELTAS, values, strict=True))
        return result

    def _drift_of(self, matrix: Matrix, before: Matrix) -> tuple[float, float, float]:
        weights = matrix.load().detach()
        initial = before.load()
        if weights.shape != initial.shape:
            raise ValueError(f"expected weights of shape {tuple(initial.shape)}, got {tuple(weights.shape)}")
        norm = float(torch.linalg.vector_norm(initial.double()))
        moved = float(torch.linalg.vector_norm(weights.double() - initial.to(weights.device).double()))
        bases = _on_host(subspace(weights, self.top))
        left, right = (rotation(*both) for both in zip(self.bases[matrix.name], bases, strict=True))
        return relative(moved, norm), float(left.nanmean()), float(right.nanmean())


def relative(distance: float, norm: float) -> float:
    """The quotient distance / norm, NaN where the norm is 0 or either is not finite."""
    return distance / norm if norm > 0 and math.isfinite(distance) and math.isfinite(norm) else NAN


def _on_host(bases: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return bases[0].cpu(), bases[1].cpu()

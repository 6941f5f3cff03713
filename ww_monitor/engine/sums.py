"""Sums over the shards of a matrix → its row, without the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ww_monitor.engine.measure import LEAST_TRAP_SIDE, Loaded, Spectra, measure
from ww_monitor.engine.options import Options
from ww_monitor.engine.rows import failed_layer, layers_of
from ww_monitor.matrices import Matrix
from ww_monitor.record import Layer
from ww_monitor.spectra.eigenvalues import eigenvalues_of_gram
from ww_monitor.spectra.elements import Moments
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE


@dataclass(frozen=True)
class Sums:
    """What is summed over the entries of a matrix with S slices.

    Attributes:
        moments: Fields `[S]` on the host.
        zeros: `[S]` how many entries are zero.
    """

    moments: Moments
    zeros: torch.Tensor


def needs_weights(matrix: Matrix, sums: Sums, options: Options) -> bool:
    """Whether a row takes more than the Gram matrix and the sums: shuffles, zeros, vectors, windows, small λ."""
    if options.preset == "weightwatcher" or options.aspect_ratio is not None:
        return True
    if options.needs & {"vectors", "randomized"}:
        return True
    finite = bool(torch.isfinite(sums.moments.squares).all())
    if not finite or not sums.moments.squares.any():
        return options.strict and not finite  # the row is blank; the complaint counts entries
    if not _alive(matrix, sums).all():
        return True
    return _asks_for_elements(matrix, options) and _near_a_trap(matrix, sums.moments)


def _alive(matrix: Matrix, sums: Sums) -> torch.Tensor:
    """`[S]` whether there are too few zeros for a row or a column of them."""
    return sums.zeros < matrix.short_side


def _asks_for_elements(matrix: Matrix, options: Options) -> bool:
    return bool(options.needs & {"elements", "shuffled"}) and matrix.short_side >= LEAST_TRAP_SIDE


def _near_a_trap(matrix: Matrix, found: Moments) -> bool:
    """Whether the histogram must be trimmed or shuffled, or its spread drowns in the mean (see `elements`)."""
    count = matrix.shape[1] * matrix.shape[2]
    mean = found.total / count
    std = (found.squares / count - mean.square()).clamp(min=0).sqrt()
    largest = torch.maximum(found.high - mean, mean - found.low)
    far = largest < HEADROOM_TO_SHUFFLE * std * count**0.25
    return not bool((far & (std > 1e-3 * mean.abs())).all())


def layer_of_sums(
    matrix: Matrix, gram: torch.Tensor, sums: Sums, dtype: torch.dtype, options: Options, *, step: int | None
) -> Layer:
    """The row of a matrix whose weights are not needed.

    Args:
        matrix: What to name it.
        gram: `[S, M, M]` float64, WᵀW of the short side; overwritten where it cannot be solved.
        sums: The others.
        dtype: Of the weights.
        options: Which metrics.
        step: Of the snapshot.

    Raises:
        LayerError: with `options.strict`, if the layer fails.
    """
    try:
        solved = eigenvalues_of_gram(gram, sums.moments.squares, long_side=matrix.long_side)
        unread = torch.ones((), dtype=dtype).expand(1, *matrix.shape)
        on_host = type(solved)(solved.values.cpu(), solved.frobenius_sq.cpu(), solved.status.cpu())
        spectra = Spectra(on_host, replace(sums.moments, dense=_alive(matrix, sums)))
        measured = measure(Loaded([matrix], unread), spectra, options)
    except Exception as error:  # noqa: BLE001 - whatever a solver throws costs this layer only
        return failed_layer(matrix, error, options, step=step)
    return next(iter(layers_of([matrix], measured, options, step=step)))

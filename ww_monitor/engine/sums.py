"""A Gram matrix and the moments that shards add up to → a row, without the weights."""

from __future__ import annotations

import torch

from ww_monitor.engine.measure import batch_of, measured
from ww_monitor.engine.options import Options
from ww_monitor.engine.rows import failed_layer, layers_of
from ww_monitor.matrix import Matrix
from ww_monitor.metric import Loaded, reads_weights
from ww_monitor.record import Layer
from ww_monitor.spectra.eigenvalues import eigenvalues_of_gram
from ww_monitor.spectra.elements import Moments
from ww_monitor.spectra.host import input_status


def needs_weights(matrix: Matrix, found: Moments, options: Options) -> bool:
    """Whether a row takes more than the Gram matrix and the moments: a measurement that reads weights, or small λ.

    Args:
        matrix: With S slices.
        found: Fields `[S]` on the host.
        options: How to analyse: which metrics, and by whose definitions.
    """
    if options.preset == "weightwatcher":
        return True
    finite = bool(torch.isfinite(found.squares).all())
    if not finite or not found.squares.any():
        return options.strict and not finite  # the row is blank; the complaint counts entries
    return reads_weights(Loaded([matrix], (), torch.float64, found), options.needs, options)


def layer_of_gram(
    matrix: Matrix, gram: torch.Tensor, found: Moments, dtype: torch.dtype, options: Options, *, step: int | None
) -> Layer:
    """The row of a matrix whose weights are not needed.

    Args:
        matrix: What to name it.
        gram: `[S, M, M]` float64, WᵀW of the short side; overwritten where it cannot be solved.
        found: The moments, on the host.
        dtype: Of the weights.
        options: How to analyse: which metrics, and by whose definitions.
        step: Of the snapshot.

    Raises:
        LayerError: with `options.strict`, if the layer fails.
    """
    try:
        loaded = Loaded([matrix], (), dtype, found, gram)
        values = measured(loaded, input_status(found.squares), options)  # the solver overwrites the Gram matrix
        solved, where = eigenvalues_of_gram(gram, found.squares, long_side=matrix.long_side), [str(gram.device)]
        return next(iter(layers_of([batch_of(loaded, solved, values, options, where=where)], options, step=step)))
    except Exception as error:  # noqa: BLE001 - whatever a solver throws costs this layer only
        return failed_layer(matrix, error, options, step=step)

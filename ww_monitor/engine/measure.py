"""Loaded weights, or what shards add up to, and their spectra → batches with what the registry has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ww_monitor.engine.options import Options
from ww_monitor.engine.rows import failed_layer, layers_of
from ww_monitor.matrix import Matrix
from ww_monitor.metric import Batch, Loaded, measure, reads_weights
from ww_monitor.metric.batch import Values
from ww_monitor.record import Layer
from ww_monitor.spectra.eigenvalues import eigenvalues_of_gram
from ww_monitor.spectra.elements import Moments
from ww_monitor.spectra.host import Eigenvalues, input_status
from ww_monitor.spectra.status import Status


def measured(loaded: Loaded, status: torch.Tensor, options: Options) -> dict[str, Values]:
    """The values of all measurements by name, where the `status` `[B·S]` of the slices (on the host) is a spectrum's.

    Raises:
        ValueError: with `options.strict`, if weights are not finite.
    """
    of_layer = _of_layers(status, loaded)
    if options.strict and loaded.weights:
        for b in (of_layer == Status.NOT_FINITE).nonzero().flatten().tolist():
            weights = loaded.layers[b]
            nan, infinite = int(weights.isnan().sum()), int(weights.isinf().sum())
            found = f"{nan} NaN and {infinite} infinite of {weights.numel()} entries"
            raise ValueError(f"expected finite weights, got {found}")
    return measure(loaded, (of_layer == Status.OK).tolist(), options.needs, options)


def batch_of(
    loaded: Loaded, solved: Eigenvalues, values: Mapping[str, Values], options: Options, *, where: Sequence[str]
) -> Batch:
    """What is known of the matrices of one chunk, where their spectra are; the weights are not kept."""
    count, first = len(loaded.matrices), loaded.matrices[0]
    status = _of_layers(solved.status, loaded)
    # a slice of zeros beside others is no failure: it brings zeros to the pool where its own spectrum is blank
    spectra = torch.where((solved.status == Status.ZERO)[:, None], 0.0, solved.values) * first.eigenvalue_factor
    spectra = spectra.view(count, first.shape[0], -1)
    spectra = torch.where((status == Status.OK)[:, None, None], spectra, torch.nan)
    long_side, eps = (
        torch.full_like(spectra[:, 0, 0], one) for one in (float(first.long_side), torch.finfo(loaded.dtype).eps)
    )
    return Batch(spectra, status, long_side, eps, loaded.matrices, where, values, options)


def _of_layers(status: torch.Tensor, loaded: Loaded) -> torch.Tensor:
    """`[B]` statuses: zero only if every slice is; otherwise that of the first slice that fails."""
    of_slice, found = status.view(len(loaded.matrices), -1), loaded.moments
    # weights of 1e160 are finite; the sum of their squares is not
    if found is not None and not np.isfinite(found.squares.numpy()).all():
        finite = torch.isfinite(found.low) & torch.isfinite(found.high)
        large = (of_slice == Status.NOT_FINITE) & finite.view_as(of_slice).to(status.device)
        of_slice = torch.where(large, int(Status.SOLVER_FAILED), of_slice)
    if of_slice.shape[1] == 1:
        return of_slice[:, 0]
    zero = of_slice == Status.ZERO
    failed = (of_slice != Status.OK) & ~zero
    first = of_slice.gather(1, failed.to(torch.int64).argmax(1, keepdim=True))[:, 0]  # argmax takes no bool
    return torch.where(zero.all(1), int(Status.ZERO), torch.where(failed.any(1), first, int(Status.OK)))


def as_solved(loaded: Loaded, options: Options) -> Sequence[torch.Tensor]:
    """The stacks of slices; under weightwatcher's preset float64 is rounded as that tool does."""
    rounded = options.preset == "weightwatcher" and loaded.dtype == torch.float64
    return [stack.float() for stack in loaded.stacks] if rounded else loaded.stacks


def needs_weights(matrix: Matrix, found: Moments, options: Options) -> bool:
    """Whether a row takes more than a Gram matrix and the moments `[S]` (on the host): weights measured, or small λ."""
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
        gram: `[S, M, M]` float64, WᵀW of the short side; overwritten.
        found: The moments `[S]`, on the host.
        dtype: In which the weights are stored.
        options: How to analyse: which metrics, and by whose definitions.
        step: The optimizer step that the row belongs to.

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

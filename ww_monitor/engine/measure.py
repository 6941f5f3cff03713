"""Loaded weights and their spectra → batches: what the registry of measurements reads, beside the eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ww_monitor.engine.options import Options
from ww_monitor.metric import Batch, Loaded, measure
from ww_monitor.metric.batch import Values
from ww_monitor.spectra.eigenvalues import Eigenvalues
from ww_monitor.spectra.status import Status


def measured(loaded: Loaded, status: torch.Tensor, options: Options) -> dict[str, Values]:
    """The values of all measurements by name, where there is a spectrum.

    Args:
        loaded: The matrices, with their moments.
        status: `[B·S]` of their slices, on the host.
        options: Which metrics need what.

    Raises:
        ValueError: with `options.strict`, if weights are not finite.
    """
    of_layer = _of_layers(status, loaded)
    if options.strict and loaded.weights:
        for b in (of_layer == Status.NOT_FINITE).nonzero().flatten().tolist():
            raise ValueError(_complaint(loaded.layers[b]))
    return measure(loaded, (of_layer == Status.OK).tolist(), options.needs, options)


def batch_of(
    loaded: Loaded,
    solved: Eigenvalues,
    values: Mapping[str, Values],
    options: Options,
    *,
    where: Sequence[str],
) -> Batch:
    """What is known of the matrices of one chunk, where their spectra are; the weights are not kept.

    Args:
        loaded: The matrices with what is known of their elements.
        solved: Spectra of their slices.
        values: What was measured.
        options: Whose definitions to follow.
        where: What solved each of them.
    """
    count, first = len(loaded.matrices), loaded.matrices[0]
    status = _of_layers(solved.status, loaded)
    spectra = torch.where((solved.status == Status.ZERO)[:, None], 0.0, solved.values) * first.eigenvalue_factor
    spectra = spectra.view(count, first.shape[0], -1)
    spectra = torch.where((status == Status.OK)[:, None, None], spectra, torch.nan)
    return Batch(
        slice_eigenvalues=spectra,
        status=status,
        long_side=torch.full_like(spectra[:, 0, 0], float(first.long_side)),
        eps=torch.full_like(spectra[:, 0, 0], torch.finfo(loaded.dtype).eps),
        matrices=loaded.matrices,
        solved_on=where,
        measured=values,
        definitions=options,
    )


def _of_layers(status: torch.Tensor, loaded: Loaded) -> torch.Tensor:
    """`[B]` zero only if every slice is; otherwise the status of the first slice that fails."""
    of_slice = status.view(len(loaded.matrices), -1)
    if loaded.moments is not None:  # weights of 1e160 are finite; the sum of their squares is not
        finite = torch.isfinite(loaded.moments.low) & torch.isfinite(loaded.moments.high)
        large = (of_slice == Status.NOT_FINITE) & finite.view_as(of_slice).to(status.device)
        of_slice = torch.where(large, int(Status.SOLVER_FAILED), of_slice)
    zero = of_slice == Status.ZERO
    failed = (of_slice != Status.OK) & ~zero
    first = of_slice.gather(1, failed.to(torch.int64).argmax(1, keepdim=True))[:, 0]
    return torch.where(zero.all(1), int(Status.ZERO), torch.where(failed.any(1), first, int(Status.OK)))


def _complaint(weights: torch.Tensor) -> str:
    nan, infinite = int(weights.isnan().sum()), int(weights.isinf().sum())
    return f"expected finite weights, got {nan} NaN and {infinite} infinite of {weights.numel()} entries"


def as_solved(loaded: Loaded, options: Options) -> Sequence[torch.Tensor]:
    """The stacks of slices; under weightwatcher's preset float64 is rounded as that tool does."""
    rounded = options.preset == "weightwatcher" and loaded.dtype == torch.float64
    return [stack.float() for stack in loaded.stacks] if rounded else loaded.stacks

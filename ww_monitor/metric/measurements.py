"""What is read from the weights: sides that are alive, the element histogram, shuffles, windows, singular vectors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ww_monitor.metric.batch import NAN, Values
from ww_monitor.metric.registry import Loaded, measurement
from ww_monitor.settings import AnalysisOptions
from ww_monitor.spectra import weightwatcher
from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.elements import Elements, elements_of, large_entries, needs_trimming
from ww_monitor.spectra.elements import elements as elements_of_weights
from ww_monitor.spectra.marchenko_pastur import per_matrix
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE
from ww_monitor.spectra.traps import shuffled as shuffled_spectra
from ww_monitor.spectra.vectors import vector_metrics
from ww_monitor.spectra.windows import windows as windows_of

LEAST_TRAP_SIDE = 8
"""Slices with a shorter side have no trap metrics: the laws behind them hold for large matrices (M from 5 to 10 on)."""


def _all_alive(loaded: Loaded, definitions: AnalysisOptions) -> bool:
    """Whether there are too few zeros for a whole row or column of them."""
    return bool((loaded.known_moments.zeros < loaded.matrices[0].short_side).all())


@measurement(gram_suffices=_all_alive, asked=lambda definitions: True)
def live_sides(loaded: Loaded, known: Mapping[str, Values], definitions: AnalysisOptions) -> dict[str, Values]:
    """`live_sides` `[B, 2]`: N and M without rows and columns of zeros, mean over slices.

    A pruned unit leaves no random bulk.
    """
    first = loaded.matrices[0]
    whole = [[float(first.long_side), float(first.short_side)]] * len(loaded.matrices)
    sides = torch.tensor(whole, dtype=torch.float64, device="cpu")
    # with fewer zeros than that no row or column is full of them: the weights are not read again
    holes = (loaded.known_moments.zeros.numpy() >= first.short_side).reshape(-1, first.shape[0]).any(1)
    for b in np.flatnonzero(holes).tolist():
        alive = loaded.layers[b] != 0
        counts = torch.stack([alive.any(dim).sum(1).double().mean() for dim in (1, 2)]).cpu()
        sides[b] = counts.sort(descending=True).values  # of what is left the rows may be the shorter
    return {"live_sides": sides}


def _too_thin(loaded: Loaded) -> bool:
    return loaded.matrices[0].short_side < LEAST_TRAP_SIDE


def _nothing_to_trim(loaded: Loaded, definitions: AnalysisOptions) -> bool:
    return _too_thin(loaded) or not bool(needs_trimming(loaded.known_moments, _size(loaded)).any())


@measurement(gram_suffices=_nothing_to_trim)
def elements(loaded: Loaded, known: Mapping[str, Values], definitions: AnalysisOptions) -> dict[str, Values]:
    """`trap_headroom` and `mean_shift` `[B]`, those of the worst slice; `slice_…` `[B, S]` what they are made of."""
    count, slices = len(loaded.matrices), loaded.matrices[0].shape[0]
    if _too_thin(loaded):
        unknown = torch.full((count,), NAN, dtype=torch.float64, device="cpu")
        return {"trap_headroom": unknown, "mean_shift": unknown}
    if loaded.weights:
        found = elements_of_weights(loaded.slices, known=loaded.known_moments)
    else:
        found = elements_of(loaded.known_moments, _size(loaded))
    by_slice = {name: value.view(count, slices) for name, value in vars(found).items()}
    return {
        "trap_headroom": _largest(by_slice["headroom"]),
        "mean_shift": _largest(by_slice["mean_shift"]),
        **{f"slice_{name}": value for name, value in by_slice.items()},
    }


def _size(loaded: Loaded) -> int:
    """The number of entries of a slice, N·M."""
    return loaded.matrices[0].shape[1] * loaded.matrices[0].shape[2]


def _largest(values: torch.Tensor) -> torch.Tensor:
    """`[B]` the largest known value of each row, NaN where none is."""
    largest = torch.where(torch.isnan(values), -torch.inf, values).amax(1)
    return torch.where(torch.isinf(largest) & (largest < 0), NAN, largest)


def _far_from_a_trap(loaded: Loaded, definitions: AnalysisOptions) -> bool:
    if _too_thin(loaded):
        return True
    headroom = elements_of(loaded.known_moments, _size(loaded)).headroom
    return _nothing_to_trim(loaded, definitions) and not bool((headroom >= HEADROOM_TO_SHUFFLE).any())


@measurement(gram_suffices=_far_from_a_trap, after=("elements",))
def shuffled(loaded: Loaded, known: Mapping[str, Values], definitions: AnalysisOptions) -> dict[str, Values]:
    """`num_traps`, `trap_severity`, `trap_p_value` `[B]`, `trap_entries`, `permuted_on`, from slices near a trap."""
    headroom = known["trap_headroom"]
    assert isinstance(headroom, torch.Tensor)
    num_traps = torch.where(headroom < HEADROOM_TO_SHUFFLE, torch.zeros_like(headroom), NAN)
    severity = p_value = torch.full_like(headroom, NAN)
    entries: list[object] = [()] * len(headroom)
    permuted_on = [""] * len(headroom)
    if bool((headroom >= HEADROOM_TO_SHUFFLE).any()):
        stats = Elements(*(_flat(known[f"slice_{name}"]) for name in ("mean", "std", "headroom", "mean_shift")))
        slices = loaded.matrices[0].shape[0]
        near = (stats.headroom >= HEADROOM_TO_SHUFFLE).nonzero().flatten()
        views, level = loaded.slices, per_matrix(definitions.significance, slices)
        found = shuffled_spectra(
            [views[k] for k in near.tolist()],
            stats.take(near),
            seed=definitions.seed,
            replicas=definitions.replicas,
            significance=level,
        )
        by_slice = torch.full((3, len(stats.headroom)), NAN, dtype=torch.float64, device="cpu")
        by_slice[:, near] = torch.stack([found.mean_count, found.mean_severity, found.median_p_value])
        counts, severities, chances = by_slice.view(3, len(headroom), slices)
        hit = headroom >= HEADROOM_TO_SHUFFLE
        num_traps[hit] = counts[hit].nansum(1)
        severity = _largest(severities)
        # that the smallest of so many chances is as small; far below 1 its digits are kept
        p_value = -torch.expm1(slices * torch.log1p(_largest(-chances)))
        for b in hit.nonzero().flatten().tolist():
            permuted_on[b] = found.permuted_on
            large = large_entries(loaded.layers[b], stats.take(slice(b * slices, (b + 1) * slices)))
            found_there = zip(large.index.tolist(), large.value.tolist(), large.headroom.tolist(), strict=True)
            entries[b] = tuple((*at, value, headroom_there) for at, value, headroom_there in found_there)
    found_of = {"num_traps": num_traps, "trap_severity": severity, "trap_p_value": p_value}
    return {**found_of, "trap_entries": entries, "permuted_on": permuted_on}


def _flat(values: Values) -> torch.Tensor:
    assert isinstance(values, torch.Tensor)
    return values.flatten()


def _one_group(loaded: Loaded, definitions: AnalysisOptions) -> bool:
    return all(matrix.groups == (1, 1) for matrix in loaded.matrices)


@measurement(gram_suffices=_one_group)
def groups(loaded: Loaded, known: Mapping[str, Values], definitions: AnalysisOptions) -> dict[str, Values]:
    """`group_eigenvalue` `[B]`, the largest λ of the groups of a convolution, each solved alone; NaN for one group."""
    largest = torch.full((len(loaded.matrices),), NAN, dtype=torch.float64, device="cpu")
    for b, matrix in enumerate(loaded.matrices):
        if matrix.groups != (1, 1):
            (rows, columns), (slices, height, width) = matrix.groups, matrix.shape
            blocks = loaded.layers[b].reshape(slices, rows, height // rows, columns, width // columns).transpose(2, 3)
            largest[b] = eigenvalues(blocks.flatten(0, 2)).values[:, -1].max()
    return {"group_eigenvalue": largest}


@measurement(asked=lambda definitions: definitions.aspect_ratio is not None)
def windows(loaded: Loaded, known: Mapping[str, Values], definitions: AnalysisOptions) -> dict[str, Values]:
    """`window_eigenvalues` `[B, n']`, ascending, of windows of one aspect ratio."""
    ratio, factor = definitions.aspect_ratio or 1.0, loaded.matrices[0].eigenvalue_factor
    cut = [eigenvalues(windows_of(layer, ratio)).values.flatten().sort().values for layer in loaded.layers]
    return {"window_eigenvalues": torch.stack(cut).cpu() * factor}


@measurement()
def randomized(loaded: Loaded, known: Mapping[str, Values], definitions: AnalysisOptions) -> dict[str, Values]:
    """`randomized`: weightwatcher's shuffled spectra, a `Randomized` a row."""
    factor, found = loaded.matrices[0].eigenvalue_factor, []
    for layer in loaded.layers:
        draw = weightwatcher.randomize(layer, seed=definitions.seed)
        found.append(weightwatcher.Randomized(draw.pooled * factor, draw.single * factor))
    return {"randomized": found}


@measurement()
def vectors(loaded: Loaded, known: Mapping[str, Values], definitions: AnalysisOptions) -> dict[str, Values]:
    """`vectors`: `[3, R, M]` a row, the metrics of the singular vectors."""
    return {"vectors": [vector_metrics(layer) for layer in loaded.layers]}

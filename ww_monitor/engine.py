"""Matrices → Snapshot: equal shapes together, one matrix in memory at a time, a failure costs its own layer only."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ww_monitor.errors import InvalidArgument, LayerError, check_choice, check_positive_int
from ww_monitor.matrices import Matrix, Skipped
from ww_monitor.metric import (
    FITS,
    FIX_FINGERS,
    PRESETS,
    Batch,
    Definitions,
    Metric,
    choose,
    phases,
    statuses,
    verdicts,
)
from ww_monitor.record import NAN, Histogram, Layer, SkippedLayer, Snapshot, TrapEntry
from ww_monitor.spectra import weightwatcher
from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.marchenko_pastur import SIGNIFICANCE, per_matrix
from ww_monitor.spectra.status import Status
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE, REPLICAS, Elements, elements, large_entries, shuffled
from ww_monitor.spectra.vectors import vector_metrics
from ww_monitor.spectra.windows import windows

logger = logging.getLogger(__name__)

LEAST_TRAP_SIDE = 8
"""Slices with a shorter side have no trap metrics: the laws behind them hold for large matrices (M from 5 to 10 on)."""

_ESD_BINS = 64


@dataclass(frozen=True)
class Options:
    """How to analyse; every field has its meaning in `ww_monitor.analyze`.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.
    """

    preset: str = "default"
    metrics: Sequence[str] | str | None = None
    seed: int = 0
    replicas: int = REPLICAS
    significance: float = SIGNIFICANCE
    fit: str = "csn"
    fit_k: int | None = None
    fix_fingers: str | None = None
    aspect_ratio: float | None = None
    strict: bool = False
    keep_eigenvalues: bool = False

    def __post_init__(self) -> None:
        check_choice("ww_monitor", "preset", self.preset, PRESETS)
        choose(self.metrics, self.preset)
        check_choice("ww_monitor", "fit", self.fit, FITS)
        check_choice("ww_monitor", "fix_fingers", self.fix_fingers, FIX_FINGERS)
        if self.fit_k is not None:
            check_positive_int("ww_monitor", "fit_k", self.fit_k)
        if (self.fit_k is not None and self.fit != "hill") or (self.fix_fingers and self.fit == "hill"):
            raise InvalidArgument(
                f"ww_monitor: fit_k goes with fit='hill', fix_fingers with the others; got fit={self.fit!r},"
                f" fit_k={self.fit_k!r}, fix_fingers={self.fix_fingers!r}"
            )
        if self.aspect_ratio is not None and not self.aspect_ratio >= 1:
            raise InvalidArgument(f"ww_monitor: aspect_ratio must be None or >= 1; got {self.aspect_ratio!r}")
        check_positive_int("ww_monitor", "replicas", self.replicas)
        if not 0 < self.significance < 1:
            raise InvalidArgument(f"ww_monitor: significance must be between 0 and 1; got {self.significance!r}")

    @property
    def chosen(self) -> list[Metric]:
        """The metrics asked for."""
        options = [
            name for name, active in (("truncated", self.fit == "truncated"), ("fingers", self.fix_fingers)) if active
        ]
        return choose(self.metrics, self.preset, options=options)

    @property
    def definitions(self) -> Definitions:
        """What a batch needs to know."""
        return Definitions(self.preset, self.fit, self.fit_k, self.fix_fingers, self.significance, self.seed)

    @property
    def needs(self) -> set[str]:
        """The measurements beyond the eigenvalues that they take."""
        return {metric.needs for metric in self.chosen}


@dataclass(frozen=True)
class _Measured:
    """One layer's numbers before the metrics; the weights are gone. Shapes as in `Batch`, without B."""

    slice_eigenvalues: torch.Tensor
    status: int
    dtype: torch.dtype
    trap_headroom: float = NAN
    mean_shift: float = NAN
    num_traps: float = NAN
    trap_severity: float = NAN
    trap_p_value: float = NAN
    trap_entries: tuple[TrapEntry, ...] = ()
    live_sides: tuple[float, float] = (NAN, NAN)
    window_eigenvalues: torch.Tensor | None = None
    randomized: weightwatcher.Randomized | None = None
    vectors: np.ndarray | None = None


@torch.no_grad()
def analyze_matrices(
    items: Iterable[Matrix | Skipped], options: Options, *, step: int | None = None, epoch: int | None = None
) -> Snapshot:
    """The snapshot of some matrices, without findings.

    Args:
        items: What a walker yields, after selection.
        options: How to analyse.
        step: Optimizer step the weights belong to.
        epoch: Epoch they belong to.

    Raises:
        LayerError: if `options.strict` and a layer fails.
    """
    start = time.perf_counter()
    matrices: list[Matrix] = []
    skipped: list[SkippedLayer] = []
    for item in items:
        if isinstance(item, Matrix):
            matrices.append(item)
        else:
            skipped.append(SkippedLayer(item.name, item.kind, tuple(item.shape), item.reason))
    layers: dict[str, Layer] = {}
    for group in _groups(matrices):
        layers.update({layer.name: layer for layer in _analyze_group(group, options, step)})
    ordered = tuple(layers[matrix.name] for matrix in matrices)
    summary = _summary(ordered, options.chosen)
    seconds = time.perf_counter() - start
    return Snapshot(ordered, tuple(skipped), summary, step=step, epoch=epoch, preset=options.preset, seconds=seconds)


def _groups(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Matrices of equal shape and scale, the most expensive matrix first."""
    by_shape: dict[tuple[int, int, int, float], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape[0], matrix.long_side, matrix.short_side, matrix.eigenvalue_factor].append(matrix)
    return sorted(by_shape.values(), key=lambda group: -group[0].cost)


def _analyze_group(group: Sequence[Matrix], options: Options, step: int | None) -> Iterator[Layer]:
    measured: list[tuple[Matrix, _Measured]] = []
    for matrix in group:
        try:
            measured.append((matrix, _measure(matrix, options)))
        except Exception as error:  # noqa: BLE001 - whatever a walker or a solver throws costs this layer only
            yield _failed_layer(matrix, error, options, step)
    by_dtype: dict[torch.dtype, list[tuple[Matrix, _Measured]]] = defaultdict(list)
    for pair in measured:
        by_dtype[pair[1].dtype].append(pair)
    for pairs in by_dtype.values():
        yield from _layers_or_failures(pairs, options, step)


def _layers_or_failures(
    pairs: Sequence[tuple[Matrix, _Measured]], options: Options, step: int | None
) -> Iterator[Layer]:
    """The rows together; where that fails one by one, so that a bad layer costs itself only."""
    try:
        yield from _layers(pairs, options)
    except Exception as error:  # noqa: BLE001 - see above
        if len(pairs) == 1:
            yield _failed_layer(pairs[0][0], error, options, step)
            return
        for pair in pairs:
            yield from _layers_or_failures([pair], options, step)


def _failed_layer(matrix: Matrix, error: Exception, options: Options, step: int | None) -> Layer:
    """A row that says what failed; with `strict` an error instead."""
    if options.strict:
        where = f"layer {matrix.name!r}" + (f" at step {step}" if step is not None else "")
        raise LayerError(f"{where}: {error}") from error
    logger.debug("analysis of layer %s failed", matrix.name, exc_info=error)
    metrics = {metric.name: NAN for metric in options.chosen}
    status = f"error: {type(error).__name__}: {error}"
    return Layer(matrix.name, matrix.kind, matrix.shape, status, "error", metrics, role=matrix.role)


def _measure(matrix: Matrix, options: Options) -> _Measured:
    weights = matrix.load()
    if tuple(weights.shape) != tuple(matrix.shape):
        raise ValueError(f"expected weights of shape {matrix.shape}, got {tuple(weights.shape)}")
    dtype = weights.dtype
    if weights.element_size() < 2 or (options.preset == "weightwatcher" and dtype == torch.float64):
        weights = weights.float()  # float8 has no reductions; weightwatcher rounds float64 weights
    solved = eigenvalues(weights, resolve_small=options.preset == "weightwatcher")
    status = _layer_status(solved.status)
    values = torch.where((solved.status == Status.ZERO)[:, None], 0.0, solved.values)
    values = values if status == Status.OK else torch.full_like(values, NAN)
    measured = _Measured((values * matrix.eigenvalue_factor).cpu(), status, dtype)
    if status != Status.OK:
        if options.strict and status != Status.ZERO:
            raise ValueError(_complaint(weights, status))
        return measured
    measured = replace(measured, live_sides=_live_sides(weights))
    if options.aspect_ratio is not None:
        cut = eigenvalues(windows(weights, options.aspect_ratio)).values.flatten().sort().values
        measured = replace(measured, window_eigenvalues=(cut * matrix.eigenvalue_factor).cpu())
    if options.needs & {"elements", "shuffled"} and matrix.short_side >= LEAST_TRAP_SIDE:
        measured = _measure_traps(measured, weights, options)
    if "vectors" in options.needs:
        measured = replace(measured, vectors=vector_metrics(weights))
    if "randomized" in options.needs:
        draw = weightwatcher.randomize(weights, seed=options.seed)
        factor = matrix.eigenvalue_factor
        draw = weightwatcher.Randomized(draw.pooled * factor, draw.single * factor)
        measured = replace(measured, randomized=draw)
    return measured


def _layer_status(slices: torch.Tensor) -> int:
    """Zero only if every slice is; otherwise that of the first slice that fails."""
    if bool((slices == Status.ZERO).all()):
        return int(Status.ZERO)
    failed = slices[(slices != Status.OK) & (slices != Status.ZERO)]
    return int(failed[0]) if len(failed) else int(Status.OK)


def _live_sides(weights: torch.Tensor) -> tuple[float, float]:
    """N and M without rows and columns of zeros, mean over slices: a pruned unit leaves no random bulk."""
    if int(torch.count_nonzero(weights)) == weights.numel():
        return float(max(weights.shape[1:])), float(min(weights.shape[1:]))
    alive = weights != 0
    sides = [float(alive.any(dim).sum(1).double().mean()) for dim in (1, 2)]
    return max(sides), min(sides)


def _measure_traps(measured: _Measured, weights: torch.Tensor, options: Options) -> _Measured:
    """Headroom, mean shift, and the shuffled spectra of those slices whose headroom allows a trap."""
    stats = elements(weights)
    measured = replace(measured, trap_headroom=_largest(stats.headroom), mean_shift=_largest(stats.mean_shift))
    if not measured.trap_headroom >= HEADROOM_TO_SHUFFLE or "shuffled" not in options.needs:
        return replace(measured, num_traps=0.0 if measured.trap_headroom < HEADROOM_TO_SHUFFLE else NAN)
    near = torch.nonzero(stats.headroom >= HEADROOM_TO_SHUFFLE).flatten()
    near_stats = Elements(*(getattr(stats, field)[near] for field in ("mean", "std", "headroom", "mean_shift")))
    result = shuffled(
        weights[near],
        near_stats,
        seed=options.seed,
        replicas=options.replicas,
        significance=per_matrix(options.significance, len(weights)),
    )
    smallest_p = result.p_value.median(1).values.amin()
    large = large_entries(weights, stats)
    entries = zip(large.index.tolist(), large.value.tolist(), large.headroom.tolist(), strict=True)
    return replace(
        measured,
        num_traps=float(result.num_traps.double().mean(1).sum()),
        trap_severity=float(result.severity.mean(1).amax()),
        trap_p_value=float(-torch.expm1(len(weights) * torch.log1p(-smallest_p))),
        trap_entries=tuple(TrapEntry(at[0], at[1], at[2], value, headroom) for at, value, headroom in entries),
    )


def _largest(values: torch.Tensor) -> float:
    known = values[~torch.isnan(values)]
    return float(known.amax()) if len(known) else NAN


def _complaint(weights: torch.Tensor, status: int) -> str:
    if status == Status.NOT_FINITE:
        nan, infinite = int(weights.isnan().sum()), int(weights.isinf().sum())
        return f"expected finite weights, got {nan} NaN and {infinite} infinite of {weights.numel()} entries"
    return f"expected a spectrum with the moments of the weights, got {Status(status).label}"


def _layers(pairs: Sequence[tuple[Matrix, _Measured]], options: Options) -> list[Layer]:
    """Metrics of layers of one shape and precision, as rows."""
    first, measured = pairs[0][0], [pair[1] for pair in pairs]

    def stacked(field: str) -> torch.Tensor:
        return torch.tensor([getattr(one, field) for one in measured], dtype=torch.float64)

    batch = Batch(
        slice_eigenvalues=torch.stack([one.slice_eigenvalues for one in measured]),
        status=torch.tensor([one.status for one in measured]),
        long_side=first.long_side,
        dtype=measured[0].dtype,
        definitions=options.definitions,
        live_sides=torch.tensor([one.live_sides for one in measured], dtype=torch.float64),
        window_eigenvalues=_windows_of(measured),
        trap_headroom=stacked("trap_headroom"),
        mean_shift=stacked("mean_shift"),
        num_traps=stacked("num_traps"),
        trap_severity=stacked("trap_severity"),
        trap_p_value=stacked("trap_p_value"),
        randomized=[one.randomized for one in measured],
        vectors=[one.vectors for one in measured],
    )
    columns = {metric.name: metric.function(batch).tolist() for metric in options.chosen}
    status, verdict, phase = statuses(batch), verdicts(batch), phases(batch)
    rows = []
    for b, (matrix, one) in enumerate(pairs):
        values = {name: float(column[b]) for name, column in columns.items()}
        rows.append(
            Layer(
                matrix.name,
                matrix.kind,
                matrix.shape,
                status[b],
                verdict[b],
                values,
                role=matrix.role,
                phase=phase[b],
                esd=_histogram(batch.eigenvalues[b], float(batch.floor[b])) if one.status == Status.OK else None,
                trap_entries=one.trap_entries,
                eigenvalues=tuple(batch.eigenvalues[b].tolist()) if options.keep_eigenvalues else None,
            )
        )
    return rows


def _windows_of(measured: Sequence[_Measured]) -> torch.Tensor | None:
    """`[B, n]`, NaN for a layer without a spectrum; `None` if no windows were asked for."""
    known = next((one.window_eigenvalues for one in measured if one.window_eigenvalues is not None), None)
    if known is None:
        return None
    rows = [one.window_eigenvalues for one in measured]
    return torch.stack([torch.full_like(known, NAN) if row is None else row for row in rows])


def _histogram(spectrum: torch.Tensor, floor: float) -> Histogram | None:
    known = spectrum[spectrum > floor].log10()
    if len(known) == 0:
        return None
    low, high = float(known[0]), float(known[-1])
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(known, bins=_ESD_BINS, min=low, max=high)
    return Histogram(low, high, tuple(int(c) for c in counts.tolist()), num_zero=len(spectrum) - len(known))


def _summary(layers: Sequence[Layer], chosen: Sequence[Metric]) -> dict[str, float]:
    """The model's value of each metric, over the layers where it is known."""
    summary = {}
    for metric in chosen:
        known = [value for layer in layers if (value := layer.value(metric.name)) == value]
        summary[metric.name] = float(metric.reduce(known)) if known else NAN
    return summary

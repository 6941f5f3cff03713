"""Matrices of one shape → the numbers that need the weights, in two steps that a GPU need not wait between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from ww_monitor.engine.options import Options
from ww_monitor.matrices import Matrix
from ww_monitor.metric import Batch
from ww_monitor.record import NAN, TrapEntry
from ww_monitor.spectra import weightwatcher
from ww_monitor.spectra.eigenvalues import Eigenvalues, eigenvalues, solve_batched
from ww_monitor.spectra.elements import Elements, Moments, elements, large_entries, moments
from ww_monitor.spectra.host import Library
from ww_monitor.spectra.marchenko_pastur import per_matrix
from ww_monitor.spectra.powerlaw import TailFit
from ww_monitor.spectra.status import Status
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE, shuffled
from ww_monitor.spectra.vectors import vector_metrics
from ww_monitor.spectra.windows import windows

LEAST_TRAP_SIDE = 8
"""Slices with a shorter side have no trap metrics: the laws behind them hold for large matrices (M from 5 to 10 on)."""


@dataclass(frozen=True)
class Loaded:
    """Matrices of one shape, scale, precision and device, with their weights `[B, S, N, M]`."""

    matrices: Sequence[Matrix]
    weights: torch.Tensor

    @property
    def slices(self) -> torch.Tensor:
        """`[B·S, N, M]` in a dtype that has reductions (float8 has none)."""
        flat = self.weights.flatten(0, 1)
        return flat.float() if flat.element_size() < 2 else flat


@dataclass(frozen=True)
class Spectra:
    """What the device leaves of some matrices, each tensor `[B·S, …]` where the weights are."""

    solved: Eigenvalues
    moments: Moments
    tail: TailFit | None = None
    """Fields `[B]`, where the device has fitted them already."""
    on_host: str = ""
    """Why the host had to solve what was on a GPU."""


@dataclass(frozen=True)
class Measured:
    """One layer's numbers before the metrics; the weights are gone. Shapes as in `Batch`, without B."""

    slice_eigenvalues: torch.Tensor
    status: int
    dtype: torch.dtype
    live_sides: tuple[float, float] = (NAN, NAN)
    traps: Traps | None = None
    window_eigenvalues: torch.Tensor | None = None
    randomized: weightwatcher.Randomized | None = None
    vectors: np.ndarray | None = None
    tail: TailFit | None = None
    on_host: str = ""


@dataclass(frozen=True)
class Traps:
    """What the element histogram and the shuffles say of a layer; the worst slice, the sum for the count."""

    headroom: float = NAN
    mean_shift: float = NAN
    num_traps: float = NAN
    severity: float = NAN
    p_value: float = NAN
    entries: tuple[TrapEntry, ...] = ()


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on a device that solves batches itself; a device without float64 leaves it to the host."""
    return tensor.device.type == "cuda"


def solve_on_host(loaded: Loaded, options: Options, *, library: Library = "numpy") -> Spectra:
    """Eigenvalues and moments."""
    weights, like_weightwatcher = _as_solved(loaded, options), options.preset == "weightwatcher"
    return _spectra(weights, eigenvalues(weights, resolve_small=like_weightwatcher, library=library))


def solve_on_device(chunks: Sequence[Loaded], options: Options) -> list[Spectra]:
    """The same for chunks of one short side on one device, as one batch; the host reads nothing.

    A device that fails leaves them to the host, and the layers' status says so.
    """
    weights = [_as_solved(loaded, options) for loaded in chunks]
    try:
        if options.preset == "weightwatcher":
            solved = [eigenvalues(stack, resolve_small=True) for stack in weights]
        else:
            solved = solve_batched(weights)
    except RuntimeError as error:
        where = f"ok, solved on the host after {type(error).__name__} on {weights[0].device.type}"
        on_host = [Loaded(loaded.matrices, loaded.weights.cpu()) for loaded in chunks]
        return [replace(solve_on_host(loaded, options), on_host=where) for loaded in on_host]
    found = [_spectra(stack, one) for stack, one in zip(weights, solved, strict=True)]
    return [
        replace(spectra, tail=tail_on_device(loaded, spectra.solved, options))
        for loaded, spectra in zip(chunks, found, strict=True)
    ]


def _as_solved(loaded: Loaded, options: Options) -> torch.Tensor:
    """The slices; float64 is rounded where weightwatcher does."""
    rounded = options.preset == "weightwatcher" and loaded.weights.dtype == torch.float64
    return loaded.slices.float() if rounded else loaded.slices


def _spectra(weights: torch.Tensor, solved: Eigenvalues) -> Spectra:
    found = solved.moments or moments(weights, squares=solved.frobenius_sq.to(weights.device))
    return Spectra(solved, found)


def tail_on_device(loaded: Loaded, solved: Eigenvalues, options: Options) -> TailFit | None:
    """The plain power-law fit of all layers at once, where the eigenvalues are; `None` where another is asked for."""
    if options.fit != "csn" or options.fix_fingers is not None or options.aspect_ratio is not None:
        return None
    values = _layer_eigenvalues(loaded, solved)
    unknown = torch.full_like(values[:, 0, 0], NAN)
    batch = Batch(
        values,
        solved.status.view(values.shape[:2]).amax(1),
        loaded.matrices[0].long_side,
        loaded.weights.dtype,
        unknown,
        unknown,
        unknown,
        unknown,
        unknown,
        definitions=options.definitions,
    )
    return batch.power_law


def _layer_eigenvalues(loaded: Loaded, solved: Eigenvalues) -> torch.Tensor:
    """`[B, S, M]` in the scale of the layers; 0 for a slice that is zero."""
    values = torch.where((solved.status == Status.ZERO)[:, None], 0.0, solved.values)
    return values.view(*loaded.weights.shape[:2], -1) * loaded.matrices[0].eigenvalue_factor


def fetch(all_spectra: Sequence[Spectra]) -> list[Spectra]:
    """The same on the host, with one wait for the device whatever their number."""
    tensors = [tensor for spectra in all_spectra for tensor in _tensors(spectra) if on_gpu(tensor)]
    if not tensors:
        return list(all_spectra)
    packed = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu()
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    copies = {
        id(tensor): packed[end - tensor.numel() : end].view(tensor.shape).to(tensor.dtype)
        for tensor, end in zip(tensors, ends, strict=True)
    }

    def on_host(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return copies.get(id(value), value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{field.name: on_host(getattr(value, field.name)) for field in fields(value)})
        return value

    return [on_host(spectra) for spectra in all_spectra]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a dataclass and its parts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def measure(loaded: Loaded, spectra: Spectra, options: Options) -> list[Measured]:
    """The layers one by one; weights are read again only where an element, a shuffle or an option asks for it.

    Args:
        loaded: The weights.
        spectra: Theirs, on the host.
        options: What is needed.

    Raises:
        ValueError: with `options.strict`, if a layer has no spectrum.
    """
    layers, slices = loaded.weights.shape[:2]
    status = spectra.solved.status.view(layers, slices)
    values, factor = _layer_eigenvalues(loaded, spectra.solved), loaded.matrices[0].eigenvalue_factor
    found = []
    stats = _elements(loaded, spectra, options)
    for b, codes in enumerate(status.tolist()):
        code, part = _layer_status(codes), slice(b * slices, (b + 1) * slices)
        if code != Status.OK:
            if options.strict and code != Status.ZERO:
                raise ValueError(_complaint(loaded.weights[b], code))
            found.append(Measured(torch.full_like(values[b], NAN), code, loaded.weights.dtype, on_host=spectra.on_host))
            continue
        weights = loaded.slices[part]
        found.append(
            Measured(
                values[b],
                code,
                loaded.weights.dtype,
                live_sides=_live_sides(weights, bool(spectra.moments.dense[part].all())),
                traps=None if stats is None else _traps(weights, _part(stats, part), options),
                window_eigenvalues=_windows(weights, options, factor),
                randomized=_randomized(weights, options, factor),
                vectors=vector_metrics(weights) if "vectors" in options.needs else None,
                tail=None if spectra.tail is None else spectra.tail.row(b),
                on_host=spectra.on_host,
            )
        )
    return found


def _layer_status(slices: Sequence[int]) -> int:
    """Zero only if every slice is; otherwise that of the first slice that fails."""
    if all(code == Status.ZERO for code in slices):
        return int(Status.ZERO)
    return next((code for code in slices if code not in (Status.OK, Status.ZERO)), int(Status.OK))


def _live_sides(weights: torch.Tensor, dense: bool) -> tuple[float, float]:
    """N and M without rows and columns of zeros, mean over slices: a pruned unit leaves no random bulk."""
    if dense:
        return float(max(weights.shape[1:])), float(min(weights.shape[1:]))
    zeros = [one.numel() - int(torch.count_nonzero(one)) for one in weights]
    if max(zeros) < min(weights.shape[1:]):  # too few for a whole row or column
        return float(max(weights.shape[1:])), float(min(weights.shape[1:]))
    alive = weights != 0
    sides = [float(alive.any(dim).sum(1).double().mean()) for dim in (1, 2)]
    return max(sides), min(sides)


def _elements(loaded: Loaded, spectra: Spectra, options: Options) -> Elements | None:
    if not options.needs & {"elements", "shuffled"} or loaded.matrices[0].short_side < LEAST_TRAP_SIDE:
        return None
    return elements(loaded.slices, known=spectra.moments)


def _part(stats: Elements, part: slice | torch.Tensor) -> Elements:
    return Elements(stats.mean[part], stats.std[part], stats.headroom[part], stats.mean_shift[part])


def _traps(weights: torch.Tensor, stats: Elements, options: Options) -> Traps:
    """Headroom, mean shift, and the shuffled spectra of those slices whose headroom allows a trap."""
    headroom, mean_shift = _largest(stats.headroom), _largest(stats.mean_shift)
    if not headroom >= HEADROOM_TO_SHUFFLE or "shuffled" not in options.needs:
        return Traps(headroom, mean_shift, num_traps=0.0 if headroom < HEADROOM_TO_SHUFFLE else NAN)
    near = torch.nonzero(stats.headroom >= HEADROOM_TO_SHUFFLE).flatten()
    result = shuffled(
        weights[near.to(weights.device)],
        _part(stats, near),
        seed=options.seed,
        replicas=options.replicas,
        significance=per_matrix(options.significance, len(weights)),
    )
    smallest_p = result.median_p_value.amin()
    large = large_entries(weights, stats)
    entries = zip(large.index.tolist(), large.value.tolist(), large.headroom.tolist(), strict=True)
    return Traps(
        headroom,
        mean_shift,
        num_traps=float(result.mean_count.sum()),
        severity=float(result.mean_severity.amax()),
        p_value=float(-torch.expm1(len(weights) * torch.log1p(-smallest_p))),
        entries=tuple(TrapEntry(at[0], at[1], at[2], value, headroom) for at, value, headroom in entries),
    )


def _largest(values: torch.Tensor) -> float:
    known = [value for value in values.tolist() if value == value]
    return max(known, default=NAN)


def _windows(weights: torch.Tensor, options: Options, factor: float) -> torch.Tensor | None:
    if options.aspect_ratio is None:
        return None
    cut = eigenvalues(windows(weights, options.aspect_ratio)).values.flatten().sort().values
    return (cut * factor).cpu()


def _randomized(weights: torch.Tensor, options: Options, factor: float) -> weightwatcher.Randomized | None:
    if "randomized" not in options.needs:
        return None
    draw = weightwatcher.randomize(weights, seed=options.seed)
    return weightwatcher.Randomized(draw.pooled * factor, draw.single * factor)


def _complaint(weights: torch.Tensor, status: int) -> str:
    if status == Status.NOT_FINITE:
        nan, infinite = int(weights.isnan().sum()), int(weights.isinf().sum())
        return f"expected finite weights, got {nan} NaN and {infinite} infinite of {weights.numel()} entries"
    return f"expected a spectrum with the moments of the weights, got {Status(status).label}"

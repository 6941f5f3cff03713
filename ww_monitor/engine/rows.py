"""Batches → rows of a snapshot: all layers of one short side together, then the model's values over them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ww_monitor.engine.options import Options
from ww_monitor.errors import LayerError
from ww_monitor.matrix import Matrix
from ww_monitor.metric import NORMS, PHASES, VERDICTS, Batch, phases, statuses, verdicts
from ww_monitor.metric.drift import DRIFT, sketch
from ww_monitor.record import NAN, Histogram, Layer, Skipped, Snapshot, TrapEntry
from ww_monitor.spectra.device import read_together
from ww_monitor.spectra.status import Status

logger = logging.getLogger(__name__)

_ESD_BINS = 64
"""Bins of the histogram that a row keeps of its spectrum (our choice)."""


def layers_of(batches: Sequence[Batch], options: Options, *, step: int | None) -> Iterator[Layer]:
    """The rows, made of all batches of as many slices and one short side together, with one read a device.

    Where that fails the rows are made one by one, so that a bad layer costs itself only.

    Raises:
        LayerError: with `options.strict`, if a layer fails.
    """
    groups: dict[object, list[Batch]] = defaultdict(list)
    for batch in batches:
        spectra, values = batch.slice_eigenvalues, batch.measured.items()
        layout = tuple((k, v.shape[1:], v.dtype) if isinstance(v, torch.Tensor) else k for k, v in values)
        groups[spectra.device, spectra.shape[1:], layout].append(batch)  # what `torch.cat` takes together
    for group in groups.values():
        yield from _rows(group, options, step)


def _rows(group: Sequence[Batch], options: Options, step: int | None) -> list[Layer]:
    try:
        return _layers(Batch.joined(group), options, step)
    except LayerError:  # what `strict` asks for; what follows would try its layers one by one
        raise
    except Exception as error:  # noqa: BLE001 - whatever a metric throws costs one layer
        if len(group) == len(group[0]) == 1:  # where it has no spectrum, that is what its row says
            row, status = failed_layer(group[0].matrices[0], error, options, step=step), Status(int(group[0].status[0]))
            return [row if status == Status.OK else replace(row, status=status.label, verdict=status.label)]
    parts = [[part] for part in group] if len(group) > 1 else [[group[0].row(b)] for b in range(len(group[0]))]
    return [row for part in parts for row in _rows(part, options, step)]


def failed_layer(matrix: Matrix, error: Exception, options: Options, *, step: int | None) -> Layer:
    """A row that says what failed; with `strict` an error instead."""
    if options.strict:
        raise LayerError(f"{_place(matrix, step)}: {error}") from error
    logger.debug("analysis of layer %s failed", matrix.name, exc_info=error)
    metrics = {metric.name: NAN for metric in options.chosen}
    status = f"error: {type(error).__name__}: {error}"
    return Layer(matrix.name, str(matrix.kind), matrix.shape, status, "error", metrics, role=matrix.role, step=step)


def unread(matrix: Matrix, error: Exception, options: Options, *, step: int | None) -> Skipped:
    """A matrix that could not be loaded is left out with the reason; with `strict` an error instead."""
    if options.strict:
        raise LayerError(f"{_place(matrix, step)}: {error}") from error
    logger.debug("layer %s could not be read", matrix.name, exc_info=error)
    return Skipped.unread(matrix.name, str(matrix.kind), matrix.shape, error)


def _place(matrix: Matrix, step: int | None) -> str:
    return f"layer {matrix.name!r}" + (f" at step {step}" if step is not None else "")


def _layers(batch: Batch, options: Options, step: int | None) -> list[Layer]:
    found = [metric.function(batch) for metric in options.chosen]
    for metric, values_found in zip(options.chosen, found, strict=True):
        if values_found.is_complex():  # the read in float64 would drop the imaginary part and warn as torch
            raise TypeError(f"metric {metric.name!r}: expected real numbers, got {values_found.dtype}")
    states = torch.stack([statuses(batch), verdicts(batch), phases(batch)], 1)
    drifts = any(metric.name == DRIFT for metric in options.chosen)
    sketched = sketch(batch.eigenvalues) if drifts else batch.eigenvalues[:, :0]
    wanted = [torch.stack(found, 1) if found else states[:, :0], states, batch.floor, batch.eigenvalues, sketched]
    columns, codes, floors, spectra, sketches = (tensor.numpy() for tensor in read_together(wanted))
    for matrix, code in zip(batch.matrices, batch.status.tolist(), strict=True):
        if options.strict and code not in (Status.OK, Status.ZERO):  # what is not finite has been refused before
            complaint = f"expected a spectrum with the moments of the weights, got {Status(code).label}"
            raise LayerError(f"{_place(matrix, step)}: {complaint}")
    names, values = [metric.name for metric in options.chosen], columns.tolist()
    entries, permuted_on = batch.entries("trap_entries"), batch.entries("permuted_on")
    solved = [code == Status.OK for code in batch.status.tolist()]
    esd = _histograms(spectra, floors, solved)
    return [
        Layer(
            matrix.name,
            str(matrix.kind),  # records are plain data, also where a checkpoint pickles them
            matrix.shape,
            Status(int(status)).label,
            VERDICTS[int(verdict)],
            dict(zip(names, values[b], strict=True)),
            role=matrix.role,
            phase=PHASES[int(phase)],
            esd=esd[b],
            trap_entries=tuple(TrapEntry(*entry) for entry in (entries[b] if solved[b] else None) or ()),
            step=step,
            solved_on=", permuted on ".join(filter(None, (batch.solved_on[b], permuted_on[b]))),
            eigenvalues=tuple(spectra[b].tolist()) if options.keep_eigenvalues else None,
            sketch=tuple(sketches[b].tolist()) if solved[b] and sketches.size else None,
        )
        for b, (matrix, (status, verdict, phase)) in enumerate(zip(batch.matrices, codes.tolist(), strict=True))
    ]


def _histograms(spectra: np.ndarray, floors: np.ndarray, solved: Sequence[bool]) -> list[Histogram | None]:
    """log10 λ above the floor of each row in equal bins; `None` for a row without a spectrum."""
    known = spectra > floors[:, None]
    known[~np.asarray(solved)] = False
    log = np.log10(np.where(known, spectra, 1.0))
    low, high = np.where(known, log, np.inf).min(1), np.where(known, log, -np.inf).max(1)
    narrow = high - low < 1e-6  # equal eigenvalues: bins without width would divide by zero
    low, high = np.where(narrow, low - 0.5, low), np.where(narrow, high + 0.5, high)
    rows, places = known.nonzero()
    bin_ = (log[rows, places] - low[rows]) * (_ESD_BINS / (high - low))[rows]
    place = rows * _ESD_BINS + np.minimum(bin_.astype(np.int64), _ESD_BINS - 1)  # the largest lies on the last edge
    counts = np.bincount(place, minlength=len(spectra) * _ESD_BINS).reshape(len(spectra), _ESD_BINS).tolist()
    zeros = (spectra.shape[1] - known.sum(1)).tolist()
    return [
        Histogram(float(low[b]), float(high[b]), tuple(counts[b]), num_zero=zeros[b]) if any(counts[b]) else None
        for b in range(len(spectra))
    ]


def snapshot_of(
    layers: Sequence[Layer],
    skipped: Sequence[Skipped],
    options: Options,
    *,
    step: int | None = None,
    epoch: int | None = None,
    seconds: float = NAN,
) -> Snapshot:
    """The rows with the model's values over them."""
    summary = summary_of(layers, options)
    return Snapshot(
        tuple(layers), tuple(skipped), summary, step=step, epoch=epoch, preset=options.preset, seconds=seconds
    )


def summary_of(layers: Sequence[Layer], options: Options) -> dict[str, float]:
    """The model's value of each metric, over the layers where it is known and says something."""
    summary = {}
    rows = [layer.metrics for layer in layers]
    whole = [layer.metrics for layer in layers if layer.verdict != "thin_slices"]
    for metric in options.chosen:
        counted = rows if metric.name in NORMS or options.preset == "weightwatcher" else whole
        known = [value for row in counted if (value := row.get(metric.name, NAN)) == value]  # NaN is not itself
        summary[metric.name] = float(metric.reduce(known)) if known else NAN
    return summary

"""Measured layers of one shape → rows of a snapshot."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ww_monitor.engine.measure import Measured, Traps
from ww_monitor.engine.options import Options
from ww_monitor.errors import LayerError
from ww_monitor.matrices import Matrix
from ww_monitor.metric import Batch, Metric, phases, statuses, verdicts
from ww_monitor.record import NAN, Histogram, Layer, SkippedLayer, Snapshot
from ww_monitor.spectra.powerlaw import TailFit
from ww_monitor.spectra.status import Status

logger = logging.getLogger(__name__)

_ESD_BINS = 64

_NO_TRAPS = Traps()


class RowBlock:
    """Layers of one shape and precision, measured by several threads, whose rows are made together.

    A row takes hundreds of small operations, which cost about the same for eight layers as for one. Who delivers the
    last layer of a closed block makes the rows.
    """

    LAYERS = 8
    """From so many layers on a block is closed."""

    def __init__(self, options: Options, *, step: int | None) -> None:
        self.closed = False
        self._options, self._step = options, step
        self._awaited = 0
        self._delivered: list[tuple[Matrix, Measured]] = []
        self._lock = threading.Lock()

    def expect(self, layers: int) -> None:
        """So many more will be delivered; the block closes where it is large enough with them."""
        with self._lock:
            self._awaited += layers
            self.closed = self._awaited + len(self._delivered) >= self.LAYERS

    def deliver(self, matrices: Sequence[Matrix], measured: Sequence[Measured | None]) -> list[Layer]:
        """Some of the expected layers, `None` where one has failed; the rows, if these were the last."""
        with self._lock:
            self._awaited -= len(matrices)
            pairs = zip(matrices, measured, strict=True)
            self._delivered += [(matrix, one) for matrix, one in pairs if one is not None]
        return self._rows()

    def close(self) -> list[Layer]:
        """No more will be expected; the rows, if all have been delivered."""
        with self._lock:
            self.closed = True
        return self._rows()

    def _rows(self) -> list[Layer]:
        with self._lock:
            complete = self._delivered if self.closed and not self._awaited else []
            self._delivered = [] if complete else self._delivered
        if not complete:
            return []
        matrices, measured = zip(*complete, strict=True)
        return list(layers_of(matrices, measured, self._options, step=self._step))


def layers_of(
    matrices: Sequence[Matrix], measured: Sequence[Measured], options: Options, *, step: int | None
) -> Iterator[Layer]:
    """The rows together; where that fails one by one, so that a bad layer costs itself only.

    Args:
        matrices: Of one shape and scale.
        measured: Theirs, of one precision.
        options: Which metrics.
        step: For an error's message.

    Raises:
        LayerError: with `options.strict`, if a layer fails.
    """
    try:
        yield from _layers(matrices, measured, options, step)
    except Exception as error:  # noqa: BLE001 - whatever a metric throws costs one layer
        if len(matrices) == 1:
            yield failed_layer(matrices[0], error, options, step=step)
            return
        for matrix, one in zip(matrices, measured, strict=True):
            yield from layers_of([matrix], [one], options, step=step)


def failed_layer(matrix: Matrix, error: Exception, options: Options, *, step: int | None) -> Layer:
    """A row that says what failed; with `strict` an error instead."""
    if options.strict:
        where = f"layer {matrix.name!r}" + (f" at step {step}" if step is not None else "")
        raise LayerError(f"{where}: {error}") from error
    logger.debug("analysis of layer %s failed", matrix.name, exc_info=error)
    metrics = {metric.name: NAN for metric in options.chosen}
    status = f"error: {type(error).__name__}: {error}"
    return Layer(matrix.name, matrix.kind, matrix.shape, status, "error", metrics, role=matrix.role, step=step)


def _layers(
    matrices: Sequence[Matrix], measured: Sequence[Measured], options: Options, step: int | None
) -> list[Layer]:
    batch = _batch(matrices[0], measured, options)
    columns = {metric.name: metric.function(batch).tolist() for metric in options.chosen}
    status, verdict, phase = statuses(batch), verdicts(batch), phases(batch)
    spectra, esd = batch.eigenvalues.cpu(), _histograms(batch)
    rows = []
    for b, (matrix, one) in enumerate(zip(matrices, measured, strict=True)):
        rows.append(
            Layer(
                matrix.name,
                matrix.kind,
                matrix.shape,
                one.on_host if one.on_host and status[b] == "ok" else status[b],
                verdict[b],
                {name: float(column[b]) for name, column in columns.items()},
                role=matrix.role,
                phase=phase[b],
                esd=esd[b],
                trap_entries=() if one.traps is None else one.traps.entries,
                step=step,
                eigenvalues=tuple(spectra[b].tolist()) if options.keep_eigenvalues else None,
            )
        )
    return rows


def _batch(first: Matrix, measured: Sequence[Measured], options: Options) -> Batch:
    traps = [one.traps or _NO_TRAPS for one in measured]

    tails = [one.tail for one in measured if one.tail is not None]

    def column(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Batch(
        slice_eigenvalues=torch.stack([one.slice_eigenvalues for one in measured]),
        status=torch.tensor([one.status for one in measured]),
        long_side=first.long_side,
        dtype=measured[0].dtype,
        definitions=options.definitions,
        live_sides=column([one.live_sides for one in measured]),
        window_eigenvalues=_windows_of(measured),
        trap_headroom=column([one.headroom for one in traps]),
        mean_shift=column([one.mean_shift for one in traps]),
        num_traps=column([one.num_traps for one in traps]),
        trap_severity=column([one.severity for one in traps]),
        trap_p_value=column([one.p_value for one in traps]),
        randomized=[one.randomized for one in measured],
        vectors=[one.vectors for one in measured],
        fitted=TailFit.join(tails) if len(tails) == len(measured) else None,
    )


def _windows_of(measured: Sequence[Measured]) -> torch.Tensor | None:
    """`[B, n]`, NaN for a layer without a spectrum; `None` if no windows were asked for."""
    known = next((one.window_eigenvalues for one in measured if one.window_eigenvalues is not None), None)
    if known is None:
        return None
    rows = [one.window_eigenvalues for one in measured]
    return torch.stack([torch.full_like(known, NAN) if row is None else row for row in rows])


def _histograms(batch: Batch) -> list[Histogram | None]:
    """log10 λ above the floor of each row in equal bins; `None` for a row without a spectrum."""
    spectra, floors = batch.eigenvalues.numpy(), batch.floor.numpy()
    rows: list[Histogram | None] = []
    for spectrum, floor, status in zip(spectra, floors, batch.status.tolist(), strict=True):
        known = np.log10(spectrum[spectrum > floor]) if status == Status.OK else spectrum[:0]
        rows.append(_histogram(known, num_zero=len(spectrum) - len(known)) if len(known) else None)
    return rows


def _histogram(known: np.ndarray, *, num_zero: int) -> Histogram:
    low, high = float(known[0]), float(known[-1])
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    place = ((known - low) * (_ESD_BINS / (high - low))).astype(np.int64)
    counts = np.bincount(np.minimum(place, _ESD_BINS - 1), minlength=_ESD_BINS)
    return Histogram(low, high, tuple(counts.tolist()), num_zero=num_zero)


def snapshot_of(
    layers: Sequence[Layer],
    skipped: Sequence[SkippedLayer],
    options: Options,
    *,
    step: int | None = None,
    epoch: int | None = None,
    seconds: float = NAN,
) -> Snapshot:
    """The rows with the model's values over them."""
    summary = summary_of(layers, options.chosen)
    return Snapshot(
        tuple(layers), tuple(skipped), summary, step=step, epoch=epoch, preset=options.preset, seconds=seconds
    )


def summary_of(layers: Sequence[Layer], chosen: Sequence[Metric]) -> dict[str, float]:
    """The model's value of each metric, over the layers where it is known."""
    summary = {}
    for metric in chosen:
        known = [value for layer in layers if (value := layer.value(metric.name)) == value]
        summary[metric.name] = float(metric.reduce(known)) if known else NAN
    return summary

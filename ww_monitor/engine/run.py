"""The order of the work: chunks of equal shape, the most expensive first, loaded here and analysed by workers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial

import torch

from ww_monitor.engine import measure
from ww_monitor.engine.measure import Loaded, Measured, Spectra
from ww_monitor.engine.options import Options
from ww_monitor.engine.rows import RowBlock, failed_layer, snapshot_of
from ww_monitor.engine.threads import alone, thread_budget, workers
from ww_monitor.matrices import Matrix, Skipped
from ww_monitor.record import Layer, SkippedLayer, Snapshot
from ww_monitor.spectra.host import Library

Work = Sequence[tuple[Loaded, Spectra | None]]
"""Chunks of one shape, scale and precision, with their spectra where a device has solved them already."""

TOGETHER = 1 << 20
"""Elements up to which matrices of one shape are loaded and analysed as one chunk: small ones share its overhead."""

HOST_MEMORY = 2 << 30
"""Bytes of workspace that the chunks under way on the host may need together, the weights not counted."""

DEVICE_SHARE = 0.25
"""Share of the free memory of a GPU that the workspace of one batch may take."""

_HOST_RATE = 2e10
"""Multiply-adds a second of one host core on M²N + M³ (measured: 3072 × 768 in 0.09 s on a Zen 4 core)."""

_DEVICE_COLUMN = 30e-6
"""Seconds a column of a device's eigensolver, whatever the batch (published: 28–37 µs, PyTorch issue 175585)."""


@torch.no_grad()
def analyze_matrices(
    items: Iterable[Matrix | Skipped],
    options: Options,
    *,
    step: int | None = None,
    epoch: int | None = None,
    background: bool = False,
) -> Snapshot:
    """The snapshot of some matrices, without findings.

    Weights are loaded by the calling thread, in the order of their cost; at most one chunk more than there are
    workers is loaded at a time.

    Args:
        items: What a walker yields, after selection.
        options: How to analyse.
        step: Optimizer step the weights belong to.
        epoch: Epoch they belong to.
        background: Stay on the calling thread, which `engine.threads.hold_to_one_thread` holds to one thread, and set
            no thread count that other threads would feel.

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
    layers = {layer.name: layer for layer in _run(matrices, options, step, background)}
    ordered = [layers[matrix.name] for matrix in matrices]
    seconds = time.perf_counter() - start
    return snapshot_of(ordered, skipped, options, step=step, epoch=epoch, seconds=seconds)


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Do what the first analysis of a process does beside its work: imports, libraries' threads, first calls.

    It takes some tenths of a second, which would pass for the cost of a look.
    """
    weights = torch.arange(32.0 * 16).sin().view(1, 32, 16)
    analyze_matrices([Matrix(name, "dense", (1, 32, 16), lambda: weights) for name in "ab"], Options())


def groups_of(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Matrices of equal shape and scale, the most expensive matrix first."""
    by_shape: dict[tuple[tuple[int, int, int], float], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape, matrix.eigenvalue_factor].append(matrix)
    return sorted(by_shape.values(), key=lambda group: -group[0].cost)


def _run(matrices: Sequence[Matrix], options: Options, step: int | None, background: bool) -> Iterator[Layer]:
    """Chunks on the host go to the workers as they are loaded; those on a GPU wait to be solved in large batches."""
    tasks: list[Future[list[Layer]]] = []
    waiting: list[Loaded] = []
    blocks = _Blocks(options, step)
    library: Library = "torch" if background else "numpy"
    side = max((matrix.short_side for matrix in matrices), default=0)
    with alone() if background else workers(len(matrices), memory=HOST_MEMORY, largest_side=side) as pool:

        def submit(work: Work, needs: int = 0) -> None:
            block = blocks.of(work)
            tasks.append(pool.submit(partial(_analyse, work, options, step, library, block), needs=needs))

        for loaded in _loaded(groups_of(matrices), options, step):
            if isinstance(loaded, Layer):
                yield loaded
            elif not measure.on_gpu(loaded.weights):
                submit([(loaded, None)], needs=_workspace(loaded))
            else:
                waiting.append(loaded)
                if sum(_workspace(one) for one in waiting) > _device_memory(loaded.weights.device):
                    for work in _solved_on_devices(waiting, options):
                        submit(work)
                    waiting.clear()
            del loaded  # or it would be in memory beside the next
        for work in _solved_on_devices(waiting, options):
            submit(work)
        yield from blocks.last()
        for task in tasks:
            yield from task.result()


class _Blocks:
    """Which rows are made together: those of works of one shape, scale and precision that follow one another."""

    def __init__(self, options: Options, step: int | None) -> None:
        self._options, self._step = options, step
        self._key: object = None
        self._block = RowBlock(options, step=step)
        self._rows: list[Layer] = []

    def of(self, work: Work) -> RowBlock:
        """The block of a work, which expects its layers."""
        loaded = work[0][0]
        key = loaded.matrices[0].shape, loaded.matrices[0].eigenvalue_factor, loaded.weights.dtype
        if self._block.closed or key != self._key:
            self._rows += self._block.close()
            self._block, self._key = RowBlock(self._options, step=self._step), key
        self._block.expect(sum(len(loaded.matrices) for loaded, _ in work))
        return self._block

    def last(self) -> list[Layer]:
        """Close the last block: the rows that no worker has made."""
        return self._rows + self._block.close()


def _solved_on_devices(waiting: Sequence[Loaded], options: Options) -> Iterator[Work]:
    """One batch a short side and device, the largest first, then one wait for all; given back by shape."""
    batches: dict[tuple[int, torch.device], list[Loaded]] = defaultdict(list)
    for loaded in waiting:
        batches[-loaded.matrices[0].short_side, loaded.weights.device].append(loaded)
    ordered = [loaded for key in sorted(batches, key=lambda key: key[0]) for loaded in batches[key]]
    solved = [
        spectra
        for key in sorted(batches, key=lambda key: key[0])
        for spectra in measure.solve_on_device(batches[key], options)
    ]
    by_shape: dict[tuple[object, ...], list[tuple[Loaded, Spectra | None]]] = defaultdict(list)
    for loaded, spectra in zip(ordered, measure.fetch(solved), strict=True):
        first = loaded.matrices[0]
        by_shape[first.shape, first.eigenvalue_factor, loaded.weights.dtype].append((loaded, spectra))
    yield from by_shape.values()


def _device_memory(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    return DEVICE_SHARE * float(free)


def _workspace(loaded: Loaded) -> int:
    """Bytes that a solve takes: Gram matrices in float64, and the weights once more.

    The host solves a large matrix in its Gram matrix; small ones together and a device's take two further copies.
    """
    gram = 8 * loaded.matrices[0].short_side ** 2
    if len(loaded.matrices) == 1 and not measure.on_gpu(loaded.weights):
        return gram + loaded.weights.nbytes
    return 3 * gram * loaded.weights.shape[0] * loaded.weights.shape[1] + loaded.weights.nbytes


def _loaded(groups: Iterable[Sequence[Matrix]], options: Options, step: int | None) -> Iterator[Loaded | Layer]:
    """Chunks of one shape, precision and device; a row for each matrix that cannot be loaded.

    On a GPU each is a chunk of its own: the batch is made of the Gram matrices there.
    """
    for group in groups:
        chunks: dict[tuple[torch.dtype, torch.device], list[tuple[Matrix, torch.Tensor]]] = defaultdict(list)
        for matrix in group:
            try:
                weights = _load(matrix)
            except Exception as error:  # noqa: BLE001 - whatever a walker throws costs this layer only
                yield failed_layer(matrix, error, options, step=step)
                continue
            chunk = chunks[weights.dtype, weights.device]
            chunk.append((matrix, weights))
            full = measure.on_gpu(weights) or (len(chunk) + 1) * weights.numel() > TOGETHER
            del weights
            if full:
                yield _taken(chunk)
        for chunk in chunks.values():
            if chunk:
                yield _taken(chunk)


def _load(matrix: Matrix) -> torch.Tensor:
    if matrix.shards is not None:
        raise ValueError("spread over ranks; expected across_ranks=True, and the same call on each of them")
    weights = matrix.load()
    if tuple(weights.shape) != tuple(matrix.shape):
        raise ValueError(f"expected weights of shape {matrix.shape}, got {tuple(weights.shape)}")
    return weights


def _taken(chunk: list[tuple[Matrix, torch.Tensor]]) -> Loaded:
    """What has been collected as one chunk `[B, S, N, M]`, on the host where that is the quicker; nothing is left."""
    matrices, weights = [matrix for matrix, _ in chunk], [weights for _, weights in chunk]
    chunk.clear()
    stack = weights[0][None] if len(weights) == 1 else torch.stack(weights)
    return Loaded(matrices, stack.cpu() if _quicker_on_host(matrices, stack) else stack)


def _quicker_on_host(matrices: Sequence[Matrix], stack: torch.Tensor) -> bool:
    """Whether the host's cores solve a few small matrices before a device's latency has passed."""
    on_host = sum(matrix.cost for matrix in matrices) / _HOST_RATE / thread_budget()
    return measure.on_gpu(stack) and on_host < matrices[0].short_side * _DEVICE_COLUMN


def _analyse(work: Work, options: Options, step: int | None, library: Library, block: RowBlock) -> list[Layer]:
    """Measure chunks of one shape; the rows that are ready with it.

    Where that fails they are measured one by one, so that a bad layer costs itself only.
    """
    matrices = [matrix for loaded, _ in work for matrix in loaded.matrices]
    measured: Sequence[Measured | None]
    with torch.no_grad():
        try:
            measured = [
                one
                for loaded, spectra in work
                for one in measure.measure(
                    loaded, spectra or measure.solve_on_host(loaded, options, library=library), options
                )
            ]
        except Exception as error:  # noqa: BLE001 - whatever a solver throws costs one layer
            if len(matrices) > 1:
                return [row for part in _one_by_one(work) for row in _analyse([part], options, step, library, block)]
            return [failed_layer(matrices[0], error, options, step=step), *block.deliver(matrices, [None])]
        return block.deliver(matrices, measured)


def _one_by_one(work: Work) -> Iterator[tuple[Loaded, Spectra | None]]:
    for loaded, spectra in work:
        if len(loaded.matrices) == 1:
            yield loaded, spectra
        else:
            for b, matrix in enumerate(loaded.matrices):
                yield Loaded([matrix], loaded.weights[b : b + 1]), None

"""The order of the work: load, solve and measure on the host's workers or on the device, then rows, here."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial

import torch

from ww_monitor.engine.measure import as_solved, batch_of, measured
from ww_monitor.engine.options import Options
from ww_monitor.engine.rows import failed_layer, layers_of, snapshot_of, unread
from ww_monitor.engine.solve import DeviceQueue
from ww_monitor.engine.threads import Workers, held_to_one_thread, room_for_blas, thread_budget, workers
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.metric import Batch, Loaded
from ww_monitor.record import Layer, Snapshot
from ww_monitor.spectra import host
from ww_monitor.spectra.device import accelerator_of
from ww_monitor.spectra.eigenvalues import resolved, tall_of

TOGETHER = 1 << 18
"""Elements up to which matrices of one shape are loaded and analysed as one chunk: small ones share its overhead."""

HOST_MEMORY = 2 << 30
"""Bytes of workspace that the chunks under way on the host may need together, the weights not counted."""

Found = list[Batch | Layer | Skipped]
"""Batches, a row for each layer that failed, and what could not be read."""


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

    Weights are loaded by the calling thread, in the order of their cost. On the host at most one chunk more than there
    are workers is loaded at a time; on a device that solves its own matrices they wait for one another.

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
    items = list(items)
    matrices = [item for item in items if isinstance(item, Matrix)]
    left_out = (item for item in items if not isinstance(item, Matrix))
    skipped = [replace(item, kind=str(item.kind), shape=tuple(item.shape)) for item in left_out]
    found = _solved(matrices, options, step, background)
    rows = [one for one in found if not isinstance(one, Batch)]
    with held_to_one_thread():  # the logarithms of a spectrum take longer on two
        rows += layers_of([one for one in found if isinstance(one, Batch)], options, step=step)
    by_name = {row.name: row for row in rows}
    ordered = [row for matrix in matrices if isinstance(row := by_name[matrix.name], Layer)]
    skipped += [row for matrix in matrices if isinstance(row := by_name[matrix.name], Skipped)]
    seconds = time.perf_counter() - start
    return snapshot_of(ordered, skipped, options, step=step, epoch=epoch, seconds=seconds)


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Do what the first analysis of a process does beside its work: imports, libraries' threads, first calls.

    It takes some tenths of a second, which would pass for the cost of an analysis.
    """
    # numbers of no random stream, the user's would move; two matrices, so that worker threads start
    weights = torch.arange(32.0 * 16, dtype=torch.float32, device="cpu").sin().view(1, 32, 16)
    analyze_matrices([Matrix(name, Kind.DENSE, (1, 32, 16), lambda: weights) for name in "ab"], Options())


def _chunks(matrices: Iterable[Matrix]) -> Iterator[Loaded | tuple[Matrix, Exception]]:
    """Chunks of one shape, scale, precision and device, the most expensive matrix first.

    A matrix that cannot be loaded comes with what it raised.
    """
    by_shape: dict[tuple[tuple[int, int, int], float], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape, matrix.eigenvalue_factor].append(matrix)
    for group in sorted(by_shape.values(), key=lambda group: -group[0].cost):
        chunks: dict[tuple[torch.dtype, torch.device], list[tuple[Matrix, torch.Tensor]]] = defaultdict(list)
        for matrix in group:
            try:
                weights = _load(matrix)
            except Exception as error:  # noqa: BLE001 - whatever a walker throws costs this layer only
                yield matrix, error
                continue
            chunk = chunks[weights.dtype, weights.device]
            chunk.append((matrix, weights))
            full = (len(chunk) + 1) * weights.numel() > TOGETHER
            del weights  # or a generator that waits would hold the last ones while they are solved
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
    if not weights.is_floating_point() or weights.layout != torch.strided or weights.is_meta or not weights.numel():
        kind = f"{weights.dtype}, {weights.layout}, {weights.device}, shape {tuple(weights.shape)}"
        raise ValueError(f"expected floating-point weights in memory, at least one of them, got {kind}")
    return weights


def _taken(chunk: list[tuple[Matrix, torch.Tensor]]) -> Loaded:
    """What has been collected as one stack `[B, S, N, M]`; nothing is left in the list."""
    matrices, weights = zip(*chunk, strict=True)
    chunk.clear()
    stack = (weights[0][None] if len(weights) == 1 else torch.stack(weights)).detach()  # one alone is not copied
    return Loaded(matrices, [stack], stack.dtype)


def _solved(matrices: list[Matrix], options: Options, step: int | None, background: bool) -> Found:
    """Chunks on the host go to the workers as they are loaded; what a device solves never does."""
    tight = not background and not room_for_blas(thread_budget())
    background = background or tight
    library: host.Library = "torch" if background else "numpy"  # a thread cannot hold OpenBLAS to one for itself
    side = max((matrix.short_side for matrix in matrices), default=0)
    queues: dict[torch.device, DeviceQueue] = {}
    tasks: list[Future[Found]] = []
    found: Found = []
    with (
        held_to_one_thread() if tight else nullcontext(),
        nullcontext(Workers(1, memory=0))
        if background
        else workers(len(matrices), memory=HOST_MEMORY, largest_side=side) as pool,
    ):

        def submit(loaded: Loaded) -> None:
            try:
                copied = loaded.on_host()
            except Exception as error:  # noqa: BLE001 - it costs these layers only
                found.extend(unread(matrix, error, options, step=step) for matrix in loaded.matrices)
            else:
                tasks.append(pool.submit(partial(_on_host, copied, options, step, library), needs=workspace(copied)))

        for loaded in _chunks(matrices):
            if isinstance(loaded, tuple):
                found.append(unread(*loaded, options, step=step))
                continue
            accelerator = accelerator_of(loaded.device)
            if accelerator is None:
                submit(loaded)
            else:
                queue = DeviceQueue(accelerator, options, watch_memory=not background)
                found += queues.setdefault(loaded.device, queue).add(loaded)
            del loaded  # or it would be in memory beside the next
        for queue in queues.values():
            found += queue.solve()
            while queue.to_host:  # one at a time, so that a chunk leaves the device when it has been copied
                submit(queue.to_host.pop(0))
        for task in tasks:
            found += task.result()
    return found


def workspace(loaded: Loaded) -> int:
    """Bytes that a solve on the host takes: the weights and the Gram matrices, of small ones together three times."""
    gram, weights = 8 * loaded.matrices[0].short_side ** 2, loaded.weights[0]
    return weights.nbytes + (gram if len(weights) == 1 else 3 * gram * weights.shape[0] * weights.shape[1])


def _on_host(loaded: Loaded, options: Options, step: int | None, library: host.Library) -> Found:
    """Solve and measure a chunk; where that fails its matrices one by one, so that a bad layer costs itself only."""
    with torch.no_grad():  # which holds for a thread, not for those it starts
        try:
            (stack,) = as_solved(loaded, options)
            solved, found = host.solve(tall_of(stack), library)
            # weightwatcher counts ranks by singular values, whose small ones a Gram matrix blurs
            solved = resolved(solved, stack) if options.preset == "weightwatcher" else solved
            known = replace(loaded, moments=found)
            values = measured(known, solved.status, options)
            where = [loaded.solved_on or "cpu"] * len(loaded.matrices)
            return [batch_of(known, solved, values, options, where=where)]
        except Exception as error:  # noqa: BLE001 - whatever a solver throws costs one layer
            if len(loaded.matrices) == 1:
                return [failed_layer(loaded.matrices[0], error, options, step=step)]
        each = [loaded.take([b]) for b in range(len(loaded.matrices))]
        return [one for part in each for one in _on_host(part, options, step, library)]

"""The order of the work: load, solve and measure on the host's workers or on the device, then rows, here."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache, partial

import torch

from ww_monitor.engine.load import chunks_of
from ww_monitor.engine.options import Options
from ww_monitor.engine.rows import failed_layer, layers_of, snapshot_of
from ww_monitor.engine.solve import DeviceQueue, on_host
from ww_monitor.engine.threads import alone, room_for_blas, thread_budget, workers
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.metric import Batch, Loaded
from ww_monitor.record import Layer, Snapshot
from ww_monitor.spectra.device import accelerator_of
from ww_monitor.spectra.host import Library

HOST_MEMORY = 2 << 30
"""Bytes of workspace that the chunks under way on the host may need together, the weights not counted."""

Found = list[Batch | Layer]
"""Batches, and a row for each layer that failed."""


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
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    for item in items:
        if isinstance(item, Matrix):
            matrices.append(item)
        else:
            skipped.append(replace(item, kind=str(item.kind), shape=tuple(item.shape)))
    layers = {layer.name: layer for layer in _rows(matrices, options, step, background)}
    ordered = [layers[matrix.name] for matrix in matrices]
    seconds = time.perf_counter() - start
    return snapshot_of(ordered, skipped, options, step=step, epoch=epoch, seconds=seconds)


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Do what the first analysis of a process does beside its work: imports, libraries' threads, first calls.

    It takes some tenths of a second, which would pass for the cost of an analysis.
    """
    weights = torch.arange(32.0 * 16, dtype=torch.float32, device="cpu").sin().view(1, 32, 16)
    analyze_matrices([Matrix(name, Kind.DENSE, (1, 32, 16), lambda: weights) for name in "ab"], Options())


def _rows(matrices: list[Matrix], options: Options, step: int | None, background: bool) -> list[Layer]:
    found = _solved(matrices, options, step, background)
    rows = [one for one in found if isinstance(one, Layer)]
    return rows + list(layers_of([one for one in found if isinstance(one, Batch)], options, step=step))


def _solved(matrices: list[Matrix], options: Options, step: int | None, background: bool) -> Found:
    """Chunks on the host go to the workers as they are loaded; what a device solves never does."""
    background = background or not room_for_blas(thread_budget())
    library: Library = "torch" if background else "numpy"
    side = max((matrix.short_side for matrix in matrices), default=0)
    queues: dict[torch.device, DeviceQueue] = {}
    tasks: list[Future[Found]] = []
    found: Found = []
    with alone() if background else workers(len(matrices), memory=HOST_MEMORY, largest_side=side) as pool:

        def submit(loaded: Loaded) -> None:
            copied = _copied(loaded, options, step)
            if isinstance(copied, list):
                found.extend(copied)
            else:
                tasks.append(pool.submit(partial(_on_host, copied, options, step, library), needs=workspace(copied)))

        for loaded in chunks_of(matrices):
            if isinstance(loaded, tuple):
                found.append(failed_layer(*loaded, options, step=step))
                continue
            accelerator = accelerator_of(loaded.device)
            if accelerator is None:
                submit(loaded)
            else:
                if loaded.device not in queues:
                    queues[loaded.device] = DeviceQueue(accelerator, options, watch_memory=not background)
                found += queues[loaded.device].add(loaded)
            del loaded  # or it would be in memory beside the next
        for queue in queues.values():
            found += queue.solve()
            while queue.to_host:
                submit(queue.to_host.pop(0))
        for task in tasks:
            found += task.result()
    return found


def _copied(loaded: Loaded, options: Options, step: int | None) -> Loaded | list[Layer]:
    """The chunk with its weights on the host; rows that say why where they cannot be copied."""
    try:
        return loaded.on_host()
    except Exception as error:  # noqa: BLE001 - it costs these layers only
        return [failed_layer(matrix, error, options, step=step) for matrix in loaded.matrices]


def workspace(loaded: Loaded) -> int:
    """Bytes that a solve on the host takes: Gram matrices in float64, and the weights once more.

    A large matrix is solved in its Gram matrix; small ones together take two further copies.
    """
    gram = 8 * loaded.matrices[0].short_side ** 2
    weights = loaded.weights[0]
    alone = len(weights) == 1
    return gram + weights.nbytes if alone else 3 * gram * weights.shape[0] * weights.shape[1] + weights.nbytes


def _on_host(loaded: Loaded, options: Options, step: int | None, library: Library) -> Found:
    """Solve and measure a chunk; where that fails its matrices one by one, so that a bad layer costs itself only."""
    with torch.no_grad():
        try:
            return [on_host(loaded, options, library=library)]
        except Exception as error:  # noqa: BLE001 - whatever a solver throws costs one layer
            if len(loaded.matrices) == 1:
                return [failed_layer(loaded.matrices[0], error, options, step=step)]
        each = [loaded.take([b]) for b in range(len(loaded.matrices))]
        return [one for part in each for one in _on_host(part, options, step, library)]

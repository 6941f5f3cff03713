"""Matrices → loaded weights: chunks of one shape, the most expensive first, one in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from ww_monitor.matrix import Matrix
from ww_monitor.metric import Loaded

TOGETHER = 1 << 20
"""Elements up to which matrices of one shape are loaded and analysed as one chunk: small ones share its overhead."""


def groups_of(matrices: Iterable[Matrix]) -> list[list[Matrix]]:
    """Matrices of equal shape and scale, the most expensive matrix first."""
    by_shape: dict[tuple[tuple[int, int, int], float], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape, matrix.eigenvalue_factor].append(matrix)
    return sorted(by_shape.values(), key=lambda group: -group[0].cost)


def chunks_of(matrices: Iterable[Matrix]) -> Iterator[Loaded | tuple[Matrix, Exception]]:
    """Chunks of one shape, scale, precision and device; a matrix that cannot be loaded with what it raised."""
    for group in groups_of(matrices):
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
    if not weights.is_floating_point() or weights.layout != torch.strided or weights.is_meta or not weights.numel():
        kind = f"{weights.dtype}, {weights.layout}, {weights.device}, shape {tuple(weights.shape)}"
        raise ValueError(f"expected floating-point weights in memory, at least one of them, got {kind}")
    return weights


def _taken(chunk: list[tuple[Matrix, torch.Tensor]]) -> Loaded:
    """What has been collected as one stack `[B, S, N, M]`; nothing is left in the list."""
    matrices: Sequence[Matrix] = [matrix for matrix, _ in chunk]
    weights = [weights.detach() for _, weights in chunk]
    chunk.clear()
    stack = weights[0][None] if len(weights) == 1 else torch.stack(weights)
    return Loaded(matrices, [stack], stack.dtype)

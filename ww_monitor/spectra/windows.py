"""Windows of one aspect ratio, so that the spectra of differently shaped matrices can be compared (FARMS)."""

from __future__ import annotations

import torch

from ww_monitor.spectra.eigenvalues import tall_of


def windows(matrices: torch.Tensor, aspect_ratio: float) -> torch.Tensor:
    """Cut N × M into the fewest evenly spaced windows of long side / short side = `aspect_ratio` that cover it.

    A longer matrix keeps its short side M and is cut along N, a squarer one keeps N and is cut along M. The eigenvalues
    of the windows are then pooled: the exponent of a matrix depends on its aspect ratio. Source: Hu et al. 2025 (FARMS,
    arXiv 2506.06280); even spacing instead of a fixed stride, so that every entry counts, is our choice.

    Args:
        matrices: `[R, rows, columns]`.
        aspect_ratio: At least 1.

    Returns:
        `[R · K, window rows, window columns]`, copies, tall.

    >>> windows(torch.zeros(1, 100, 30), 1.0).shape
    torch.Size([4, 30, 30])
    """
    tall = tall_of(matrices)
    n, m = tall.shape[1:]
    if n >= aspect_ratio * m:
        return torch.cat([tall[:, a:b] for a, b in _spans(n, max(m, round(aspect_ratio * m)))])
    return torch.cat([tall[:, :, a:b] for a, b in _spans(m, max(1, round(n / aspect_ratio)))])


def _spans(length: int, size: int) -> list[tuple[int, int]]:
    count = -(-length // size)
    starts = [round(k * (length - size) / max(count - 1, 1)) for k in range(count)]
    return [(start, start + size) for start in starts]

"""Two matrices compared: similarity of their Gram matrices, and the angles between leading singular subspaces."""

from __future__ import annotations

import scipy.linalg
import torch

_NAN = float("nan")


def cka(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Linear CKA without centring, ‖AᵀB‖²_F / (‖AᵀA‖_F ‖BᵀB‖_F): the cosine between the Gram matrices AAᵀ and BBᵀ.

    A similarity in [0, 1], 1 also for B = c·AQ with Q orthogonal: the rows (output units) are the examples, the basis
    of the inputs does not count. Unrelated Gaussian matrices have columns/(rows + columns), not 0. Source: Kornblith et
    al. 2019 (ICML, arXiv 1905.00414, eq. 4), uncentred because a weight matrix has no mean to remove. weightwatcher
    0.7.7 gives the square root of this and calls it a distance.

    Args:
        a: `[R, N, M]` float64.
        b: `[R, N, M]` float64.

    Returns:
        `[R]`, NaN where a matrix is zero or not finite.

    >>> a = torch.eye(2, dtype=torch.float64)[None]
    >>> cka(a, torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))[None])
    tensor([0.7071], dtype=torch.float64)
    """
    if a.shape[1] >= a.shape[2]:  # the same numbers from Gram matrices of the short side
        cross, grams = (a.mT @ b).square().sum((1, 2)), [x.mT @ x for x in (a, b)]
    else:
        grams = [x @ x.mT for x in (a, b)]
        cross = (grams[0] * grams[1]).sum((1, 2))
    similarity = cross / (torch.linalg.matrix_norm(grams[0]) * torch.linalg.matrix_norm(grams[1]))
    return torch.where(torch.isfinite(similarity), similarity.clamp(0.0, 1.0), _NAN)


def subspace(weights: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U_k, V_k: the left and right singular vectors of the k = min(top, N, M) largest singular values.

    From the eigenvectors V of the float64 Gram matrix of the short side; the other side is an orthonormal basis of
    W V_k. A direction whose eigenvalue is numerically zero (`numerical_floor`) does not exist and is a zero column.

    Args:
        weights: `[R, N, M]` of any floating dtype.
        top: Number of directions.

    Returns:
        `[R, N, k]` and `[R, M, k]`, float64; zero for a matrix that is zero or not finite.

    >>> left, right = subspace(torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None], top=1)
    >>> left[0, :, 0].abs().tolist(), right[0, :, 0].abs().tolist()
    ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0])
    """
    wide = weights.shape[1] < weights.shape[2]
    tall = (weights.mT if wide else weights).double()
    finite = torch.isfinite(tall).flatten(1).all(1)  # SciPy's solver refuses NaN, and with it all slices
    tall = torch.where(finite[:, None, None], tall, 0.0)
    values, short = _leading(tall.mT @ tall, min(top, tall.shape[2]))
    mean_square = tall.square().mean((1, 2))
    floor = numerical_floor(values[:, 0], mean_square, *tall.shape[1:], eps=torch.finfo(weights.dtype).eps)
    exists = (values > floor[:, None])[:, None, :]
    long = torch.linalg.qr(tall @ short).Q
    short, long = torch.where(exists, short, 0.0), torch.where(exists, long, 0.0)
    return (short, long) if wide else (long, short)


def _leading(gram: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest eigenvalues `[R, k]`, descending, and their vectors `[R, M, k]`.

    On the host by LAPACK's solver for a range: four times as fast as all vectors at M = 1024 and k = 8.
    """
    if gram.device.type != "cpu":
        values, vectors = torch.linalg.eigh(gram)
        return values[:, -k:].flip(1), vectors[:, :, -k:].flip(2)
    indices = [gram.shape[1] - k, gram.shape[1] - 1]
    solved = [scipy.linalg.eigh(one.numpy(), subset_by_index=indices, driver="evr") for one in gram]
    on_host = (torch.stack([*map(torch.from_numpy, found)]) for found in zip(*solved, strict=True))
    return next(on_host).flip(1), next(on_host).flip(2)


def largest_eigenvalue(weights: torch.Tensor) -> torch.Tensor:
    """λmax of WᵀW, `[R]`, of finite float64 `[R, N, M]`.

    >>> largest_eigenvalue(torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64))[None])
    tensor([9.], dtype=torch.float64)
    """
    tall = weights if weights.shape[1] >= weights.shape[2] else weights.mT
    return _leading(tall.mT @ tall, 1)[0][:, 0]


def numerical_floor(
    largest: torch.Tensor,
    mean_square: torch.Tensor,
    long_side: torch.Tensor | int,
    short_side: int,
    *,
    eps: torch.Tensor | float,
) -> torch.Tensor:
    """max(N·2⁻⁵²·λmax, (eps²/12)·mean(w²)·(√N + √M)²): eigenvalues at or below it are numerically zero.

    The error of the float64 solve, and the largest eigenvalue of the uniform rounding errors of the storage
    precision, a random matrix.

    Args:
        largest: `[B]` λmax.
        mean_square: `[B]` mean of the squared entries.
        long_side: N, a number or `[B]`.
        short_side: M.
        eps: Rounding unit of the storage precision, a number or `[B]`.
    """
    rounding = eps**2 / 12 * mean_square * (long_side**0.5 + short_side**0.5) ** 2
    return torch.maximum(rounding, long_side * torch.finfo(torch.float64).eps * largest)


def overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """‖UᵀV‖²_F / k, the mean squared cosine of the principal angles between two k-dimensional subspaces.

    Source: Björck & Golub 1973 (Math. Comp. 27). 1 for equal subspaces and 0 for orthogonal ones; independent
    random ones in N dimensions have k/N. Bases with fewer directions count as subspaces of the larger number.

    Args:
        first: `[R, N, k]` with orthonormal or zero columns.
        second: `[R, N, k]` likewise.

    Returns:
        `[R]`, NaN where a basis is empty.
    """
    counts = torch.stack([(basis != 0).any(1).sum(1) for basis in (first, second)])
    cosines = (first.mT @ second).square().sum((1, 2))
    return torch.where(counts.amin(0) > 0, (cosines / counts.amax(0)).clamp(max=1.0), _NAN)


def rotation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """1 − ‖UᵀV‖²_F / k, the mean squared sine of the principal angles: 0 = the same subspace, 1 = an orthogonal one.

    Arguments and result as those of `overlap`.

    >>> axes = torch.eye(4, dtype=torch.float64)[None]
    >>> rotation(axes[:, :, :2], axes[:, :, 1:3])
    tensor([0.5000], dtype=torch.float64)
    """
    return 1.0 - overlap(first, second)

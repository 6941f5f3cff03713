"""The solve on the host: float64 Gram matrices of the short side and their eigenvalues, no copy of what is large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ww_monitor.spectra import lapack
from ww_monitor.spectra.elements import Moments
from ww_monitor.spectra.stop import stop_if_told

_TOGETHER = 1 << 18
"""Elements of W up to which matrices are solved in one call: small ones share its overhead."""

_ROW_CHUNK = 1 << 18
"""Elements of W that are held in float64 at a time while the Gram matrix is summed, or an eighth of the Gram matrix
where that is more: 2 MiB stay in a core's cache, and shorter products cost more (measured: those of a sixteenth 5 % of
the Gram matrix at 2048)."""

_IN_PLACE_SIDE = 256
"""From this side on a copy of a Gram matrix costs more than a call of one's own."""

_MKL_SIDE = 2048
"""Above this side torch's host eigensolver beats SciPy's (measured on 2 cores: 3.6 s against 5.9 s at 4096)."""

FLOOR_NORM = 1e-150
"""Up to this squared Frobenius norm the second moment underflows in float64, so the spectrum is not known."""

Library = Literal["numpy", "torch"]
"""Whose routines to use: numpy's and SciPy's are the faster up to `_MKL_SIDE`, torch's can be held to one thread a
worker without touching any other thread."""


@dataclass(frozen=True)
class Solved:
    """What the host finds of B matrices, not yet verified.

    Attributes:
        values: `[B, M]` ascending; ones where a matrix cannot be solved.
        frobenius_sq: `[B]` ‖W‖²_F.
        gram_sq: `[B]` ‖WᵀW‖²_F.
        failed: `[B]` whether the solver gave up.
        moments: Of the elements, where they have been taken in passing.
    """

    values: torch.Tensor
    frobenius_sq: torch.Tensor
    gram_sq: torch.Tensor
    failed: torch.Tensor
    moments: Moments | None = None


def solve(tall: torch.Tensor, library: Library) -> Solved:
    """The spectra of `[B, N, M]` on the host, N ≥ M, any floating dtype."""
    together = max(1, _TOGETHER // (tall.shape[1] * tall.shape[2]))
    if len(tall) and together == 1:
        parts = [_solve_one(w, library) for w in tall]
    else:
        parts = [_solve_together(tall[b : b + together], library) for b in range(0, max(1, len(tall)), together)]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: list[Solved]) -> Solved:
    moments = [part.moments for part in parts if part.moments is not None]
    return Solved(
        values=torch.cat([part.values for part in parts]),
        frobenius_sq=torch.cat([part.frobenius_sq for part in parts]),
        gram_sq=torch.cat([part.gram_sq for part in parts]),
        failed=torch.cat([part.failed for part in parts]),
        moments=Moments.joined(moments) if len(moments) == len(parts) else None,
    )


def _solve_one(w: torch.Tensor, library: Library) -> Solved:
    """One matrix `[N, M]`; its elements are looked at while they are in the cache."""
    m = w.shape[1]
    gram, found = np.zeros((m, m)), []
    with np.errstate(all="ignore"):
        for rows in _row_chunks(w):
            found.append((rows.sum(), _squares(rows, library), rows.min(), rows.max(), np.count_nonzero(rows == 0)))
            if library == "torch":
                torch.from_numpy(gram).addmm_(torch.from_numpy(rows.T), torch.from_numpy(rows))
            else:
                lapack.add_gram(rows, gram)
        total, squares, low, high, zeros = np.array(found).T
        over_all = np.array([total.sum(), squares.sum(), low.min(), high.max(), zeros.sum()])
        moments = Moments(*torch.split(torch.from_numpy(over_all), 1))
        gram_sq = _squares(gram, library)
        if library == "numpy":  # one triangle
            gram_sq = 2 * gram_sq - _squares(gram.diagonal(), library)
    return _solve_grams(gram[None], moments.squares.numpy(), np.array([gram_sq]), library, moments)


def _row_chunks(w: torch.Tensor) -> Iterator[np.ndarray]:
    """Some rows at a time, in float64 and in one piece.

    numpy converts what it knows: the threads that torch would convert with go on spinning where BLAS needs the cores.
    """
    n, m = w.shape
    rows = max(_ROW_CHUNK // m, m // 8, 1)
    in_numpy = w.dtype in (torch.float64, torch.float32, torch.float16)
    for start in range(0, n, rows):
        stop_if_told()
        part = w[start : start + rows]
        array = part.numpy() if in_numpy else part.double().numpy()
        chunk = array.astype(np.float64, order="K" if 1 in w.stride() else "C", copy=False)
        whole = chunk.flags.c_contiguous or chunk.flags.f_contiguous
        yield chunk if whole else chunk.copy(order="K")


def _squares(array: np.ndarray, library: Library) -> float:
    if library == "numpy":
        return lapack.sum_of_squares(array)
    flat = torch.from_numpy(array.ravel(order="K"))
    return float(torch.dot(flat, flat))


def _solve_together(tall: torch.Tensor, library: Library) -> Solved:
    """Small matrices `[B, N, M]` in one call each of product and solver."""
    a = torch.empty(tall.shape, dtype=torch.float64, device="cpu").copy_(tall)  # slices of a kernel lie scattered
    with np.errstate(all="ignore"):
        each = a.flatten(1).numpy()
        squares = np.einsum("bi,bi->b", each, each)  # one call: a library's own would cost more than a small matrix
        found = each.sum(1), squares, each.min(1), each.max(1), np.count_nonzero(each == 0, axis=1).astype(float)
        moments = Moments(*map(torch.from_numpy, found))
        gram = torch.matmul(a.mT, a).numpy() if library == "torch" else np.matmul(a.mT.numpy(), a.numpy())
        flat = gram.reshape(len(gram), gram.shape[-1] ** 2)
    return _solve_grams(gram, squares, np.einsum("bi,bi->b", flat, flat), library, moments)


def solve_grams(gram: torch.Tensor, frobenius_sq: torch.Tensor) -> Solved:
    """The spectra of Gram matrices `[B, M, M]` float64 that are given; overwritten."""
    norms = frobenius_sq.numpy()
    return _joined(
        [
            _solve_grams(one[None], norms[b : b + 1], np.array([_squares(one, "numpy")]), "numpy")
            for b, one in enumerate(gram.numpy())
        ]
    )


def _solve_grams(
    gram: np.ndarray, frobenius_sq: np.ndarray, gram_sq: np.ndarray, library: Library, moments: Moments | None = None
) -> Solved:
    """Those that cannot be solved are made one first."""
    for b in np.flatnonzero(~((frobenius_sq > FLOOR_NORM) & (frobenius_sq < np.inf))):
        gram[b] = np.eye(gram.shape[-1])
    values, failed = _eigvalsh(gram, library)
    return Solved(
        values=torch.from_numpy(values),
        frobenius_sq=torch.from_numpy(frobenius_sq),
        gram_sq=torch.from_numpy(gram_sq),
        failed=torch.from_numpy(failed),
        moments=moments,
    )


def _eigvalsh(gram: np.ndarray, library: Library) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues `[B, M]`, and which matrices the solver gave up on (they have ones)."""
    failed = np.zeros(len(gram), dtype=bool)
    if len(gram) == 1 or gram.shape[-1] < _IN_PLACE_SIDE:
        try:
            return _lapack(gram, library), failed
        except (np.linalg.LinAlgError, RuntimeError):
            if len(gram) == 1:
                return np.ones(gram.shape[:2]), ~failed
    parts = [_eigvalsh(gram[b : b + 1], library) for b in range(len(gram))]
    return np.concatenate([values for values, _ in parts]), np.concatenate([gave_up for _, gave_up in parts])


def _lapack(gram: np.ndarray, library: Library) -> np.ndarray:
    """The eigenvalues of the upper triangles: of small ones together, of a large one in place.

    Which way depends on the side alone, so that with one BLAS thread a matrix has the same bits whatever it is solved
    beside; more threads may differ in the last ones.
    """
    side = gram.shape[-1]
    if side >= _IN_PLACE_SIDE:
        return lapack.eigvalsh(gram[0], with_torch=library == "torch" or side > _MKL_SIDE)[None]
    if library == "torch":
        values: np.ndarray = torch.linalg.eigvalsh(torch.from_numpy(gram), UPLO="U").numpy()
        return values
    return np.linalg.eigvalsh(gram, UPLO="U")

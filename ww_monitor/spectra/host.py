"""The solve on the host: float64 Gram matrices of the short side and their eigenvalues, no copy of what is large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ww_monitor.spectra import lapack
from ww_monitor.spectra.elements import Moments
from ww_monitor.spectra.status import Rows, Status
from ww_monitor.spectra.stop import stop_if_told

_TOGETHER = _ROW_CHUNK = 1 << 18
"""Elements of W up to which matrices are solved in one call, whose overhead small ones share; and of a large W that are
held in float64 at a time while the Gram matrix is summed, or an eighth of the Gram matrix where that is more: 2 MiB
stay in a core's cache, and shorter products cost more (measured: of a sixteenth 5 % of the Gram matrix at 2048)."""

_TOGETHER_SIDE = 256
"""Below this side torch's eigensolver, for several matrices in a call, takes 0.63 to 0.95 of the time of numpy's on an
Intel Xeon (64: 0.14 ms against 0.23), and on an AMD EPYC 1.08 (0.13 against 0.12)."""

_SCIPY_SIDES = (_TOGETHER_SIDE, 2048)
"""Sides at which SciPy's eigensolver, in place, is quicker than torch's (2 cores of an AMD EPYC; at 4096 torch's takes
3.6 s, SciPy's 5.9)."""

_SCIPY_SIDES_ON_INTEL = (640, 1024)
"""The same on Intel's processors, for which torch's library is made (2 workers on a Xeon, milliseconds for SciPy and
torch: 4.6 and 4.1 at 384, 9.6 and 8.5 at 512, 66 and 68 at 1024, 218 and 133 at 1536, 476 and 260 at 2048)."""

FLOOR_NORM = 1e-150
"""Up to this squared Frobenius norm the second moment underflows in float64, so the spectrum is not known."""

Library = Literal["numpy", "torch"]
"""Whose routines to use: numpy's and SciPy's make the faster products, and solve faster at `_SCIPY_SIDES`; torch's
can be held to one thread a worker without touching any other thread."""


@dataclass(frozen=True)
class Eigenvalues(Rows):
    """Spectra `[B, M]` float64, ascending and never negative; NaN where `status` (`[B]` int64 of `Status`) is not OK.

    `frobenius_sq` is `[B]` ‖W‖²_F, summed over the elements in float64.
    """

    values: torch.Tensor
    frobenius_sq: torch.Tensor
    status: torch.Tensor


def input_status(frobenius_sq: torch.Tensor) -> torch.Tensor:
    """Status known before the solve: a sum of squares is finite exactly when every element is (and none overflows)."""
    status = torch.where(frobenius_sq <= FLOOR_NORM, int(Status.ZERO), int(Status.OK))
    return torch.where(torch.isfinite(frobenius_sq), status, int(Status.NOT_FINITE))


def verified(
    values: torch.Tensor, frobenius_sq: torch.Tensor, gram_sq: torch.Tensor, long_side: torch.Tensor | int
) -> Eigenvalues:
    """Check both moments of solved spectra `[B, M]` to 64·N roundings of the Gram matrix, blank what is not known.

    Σλ must be ‖W‖²_F and Σλ² = ‖WᵀW‖²_F, both `[B]`: a solver that returns the diagonal keeps the trace.
    """
    values, tolerance = values.clamp(min=0.0), 64 * torch.finfo(torch.float64).eps * long_side
    first = (values.sum(1) - frobenius_sq).abs() <= tolerance * frobenius_sq
    second = (values.square().sum(1) - gram_sq).abs() <= tolerance * gram_sq
    status = input_status(frobenius_sq)
    status = torch.where((status == Status.OK) & ~(first & second), int(Status.SOLVER_FAILED), status)
    return Eigenvalues(torch.where((status == Status.OK)[:, None], values, float("nan")), frobenius_sq, status)


def solve(tall: torch.Tensor, library: Library = "numpy") -> tuple[Eigenvalues, Moments]:
    """The spectra of `[B, N, M]` on the host, N ≥ M, any floating dtype; the moments are taken in passing."""
    together = max(1, _TOGETHER // (tall.shape[1] * tall.shape[2]))
    if len(tall) and together == 1:
        parts = [_solve_one(w, library) for w in tall]
    else:
        # no matrix is one part too, whose fields are empty
        parts = [_solve_together(tall[b : b + together], library) for b in range(0, max(1, len(tall)), together)]
    solved, moments = zip(*parts, strict=True)
    return Eigenvalues.joined(solved), Moments.joined(moments)


def _solve_one(w: torch.Tensor, library: Library) -> tuple[Eigenvalues, Moments]:
    """One matrix `[N, M]`; its elements are looked at while they are in the cache."""
    n, m = w.shape
    gram, found = np.zeros((m, m)), []
    with np.errstate(all="ignore"):  # large weights overflow: their status says so, whatever numpy was told to raise
        for stored, rows in _row_chunks(w):
            zeros = np.count_nonzero(stored == 0)
            found.append((rows.sum(), _squares(rows, library), stored.min(), stored.max(), zeros))
            if library == "torch":
                torch.from_numpy(gram).addmm_(torch.from_numpy(rows.T), torch.from_numpy(rows))
            else:
                lapack.add_gram(rows, gram)
        total, squares, low, high, none = np.array(found, dtype=np.float64).T
        over_all = np.array([total.sum(), squares.sum(), low.min(), high.max(), none.sum()])
        gram_sq = _squares(gram, library)
        if library == "numpy":  # one triangle
            gram_sq = 2 * gram_sq - _squares(gram.diagonal(), library)
    solved = _solve_grams(gram[None], over_all[1:2], np.array([gram_sq]), n, library)
    return solved, Moments(*torch.split(torch.from_numpy(over_all), 1))


def _row_chunks(w: torch.Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some rows at a time, as what is quickest to compare and in float64 in one piece; slices of kernels lie scattered.

    numpy converts what it knows: the threads that torch would convert with go on spinning where BLAS needs the cores.
    """
    in_numpy = w.dtype in (torch.float64, torch.float32, torch.float16)
    for part in torch.split(w, max(_ROW_CHUNK // w.shape[1], w.shape[1] // 8, 1)):
        stop_if_told()
        array = part.numpy() if in_numpy else part.double().numpy()  # numpy has no bfloat16
        chunk = array.astype(np.float64, order="K" if 1 in w.stride() else "C", copy=False)
        if not (chunk.flags.c_contiguous or chunk.flags.f_contiguous):
            chunk = chunk.copy(order="K")
        # numpy takes twenty times as long to compare float16 as float32, and float64 more than twice
        yield array if array.dtype == np.float32 and 1 in w.stride() else chunk, chunk


def _squares(array: np.ndarray, library: Library) -> float:
    if library == "numpy":
        return lapack.sum_of_squares(array)
    flat = torch.from_numpy(array.ravel(order="K"))
    return float(torch.dot(flat, flat))


def _solve_together(tall: torch.Tensor, library: Library) -> tuple[Eigenvalues, Moments]:
    """Small matrices `[B, N, M]` in one call each of product and solver."""
    a = torch.empty(tall.shape, dtype=torch.float64, device="cpu").copy_(tall)  # slices of a kernel lie scattered
    with np.errstate(all="ignore"):
        each = a.flatten(1).numpy()
        squares = np.einsum("bi,bi->b", each, each)  # one call: a library's own would cost more than a small matrix
        found = each.sum(1), squares, each.min(1), each.max(1), np.count_nonzero(each == 0, axis=1).astype(float)
        gram = torch.matmul(a.mT, a).numpy() if library == "torch" else np.matmul(a.mT.numpy(), a.numpy())
        flat = gram.reshape(len(gram), gram.shape[-1] ** 2)
    solved = _solve_grams(gram, squares, np.einsum("bi,bi->b", flat, flat), tall.shape[1], library)
    return solved, Moments(*map(torch.from_numpy, found))


def solve_grams(gram: torch.Tensor, frobenius_sq: torch.Tensor, long_side: torch.Tensor) -> Eigenvalues:
    """The spectra of Gram matrices `[B, M, M]` float64 of matrices with long sides `[B]`; overwritten."""
    each = zip(gram.numpy(), frobenius_sq.numpy(), long_side.tolist(), strict=True)
    return Eigenvalues.joined(
        _solve_grams(one[None], norm.reshape(1), np.array([_squares(one, "numpy")]), int(n), "numpy")
        for one, norm, n in each
    )


def _solve_grams(
    gram: np.ndarray, frobenius_sq: np.ndarray, gram_sq: np.ndarray, long_side: int, library: Library
) -> Eigenvalues:
    """The spectra of Gram matrices `[B, M, M]`, overwritten; one that cannot be solved becomes an identity first.

    For one that is not finite torch would give up on all that are solved in the same call.
    """
    for b in np.flatnonzero(~((frobenius_sq > FLOOR_NORM) & (frobenius_sq < np.inf))):
        gram[b] = np.eye(gram.shape[-1])
    values, first, second = map(torch.from_numpy, (_eigvalsh(gram, library), frobenius_sq, gram_sq))
    return verified(values, first, second, long_side)


def _eigvalsh(gram: np.ndarray, library: Library) -> np.ndarray:
    """Eigenvalues `[B, M]`; NaN for a matrix that the solver gave up on."""
    if len(gram) == 1 or gram.shape[-1] < _TOGETHER_SIDE:
        try:
            return _lapack(gram, library)
        except (np.linalg.LinAlgError, RuntimeError):  # SciPy's way, and torch's
            if len(gram) == 1:
                return np.full(gram.shape[:2], np.nan)
    return np.concatenate([_eigvalsh(gram[b : b + 1], library) for b in range(len(gram))])


def _lapack(gram: np.ndarray, library: Library) -> np.ndarray:
    """The eigenvalues of the upper triangles: of small ones together, of a large one in place.

    Which way depends on the side alone, so that with one BLAS thread a machine gives a matrix the same bits whatever it
    is solved beside; more threads may differ in the last ones.
    """
    side, (least, most) = gram.shape[-1], _SCIPY_SIDES_ON_INTEL if lapack.on_intel() else _SCIPY_SIDES
    if side >= least:
        return lapack.eigvalsh(gram[0], with_torch=library == "torch" or side > most)[None]
    values: np.ndarray = torch.linalg.eigvalsh(torch.from_numpy(gram), UPLO="U").numpy()
    return values

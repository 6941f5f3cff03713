"""Weights → eigenvalues of WᵀW, guarded before the solve and verified after it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ww_monitor.spectra.status import Status

_TOGETHER = 1 << 18
"""Elements of W up to which matrices are solved in one call: small ones share its overhead."""

_ROW_CHUNK = 1 << 20
"""Elements of W that are held in float64 at a time while the Gram matrix is summed (8 MiB), or a quarter of the Gram
matrix where that is more: smaller chunks would spend their time on adding."""

_MKL_SIDE = 2048
"""Above this side torch's host eigensolver beats numpy's (measured on 2 cores: 2.87 s against 3.29 s at 4096)."""

_RESOLVED = 1e-5
"""Relative size from which on an eigenvalue of the float64 Gram matrix is good to better than 1e-9."""

_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""CUDA capabilities with float64 at half the rate of float32 (data-centre cards); the others have 1/32 or 1/64."""

_LARGEST_BATCH = 65535
"""What cuSOLVER's batched eigensolver takes."""

Library = Literal["numpy", "torch"]
"""Whose host routines to use: numpy's are the faster up to `_MKL_SIDE`, torch's can be held to one thread a worker
without touching any other thread."""

_FLOOR_NORM = 1e-150
"""Up to this squared Frobenius norm the second moment underflows in float64, so the spectrum is not known."""


@dataclass(frozen=True)
class Eigenvalues:
    """Spectra of B matrices.

    Attributes:
        values: `[B, M]` float64, ascending, never negative; NaN where `status` is not OK.
        frobenius_sq: `[B]` float64, ‖W‖²_F summed over the elements.
        status: `[B]` int64 of `Status`.
    """

    values: torch.Tensor
    frobenius_sq: torch.Tensor
    status: torch.Tensor


def eigenvalues(matrices: torch.Tensor, *, resolve_small: bool = False, library: Library = "numpy") -> Eigenvalues:
    """λ = eigenvalues of WᵀW (squared singular values of W), ascending, float64, no division by N.

    The Gram matrix of the short side is formed and solved in float64 whatever the storage dtype. That keeps
    alpha within 1e-11 of a float64 singular value decomposition; a float32 Gram matrix does not. Inputs are
    checked for finite values first; afterwards Σλ = ‖W‖²_F and Σλ² = ‖WᵀW‖²_F are verified, the second because
    a solver that returns the diagonal keeps the trace.

    Where a GPU is slow in float64 the Gram matrix is formed in float32 there, unless the user allows TF32; a device
    without float64 is left for the host.

    Args:
        matrices: `[B, N, M]` of any floating dtype; N < M is transposed.
        resolve_small: Solve matrices with λmin < 1e-5 λmax once more by a singular value decomposition. The Gram
            matrix leaves an absolute error of a few 1e-16 λmax, which only counts of zero eigenvalues and √λmin feel.
        library: Host routines, see `Library`.

    Returns:
        Spectra of `min(N, M)` eigenvalues, on the device that solved them; a matrix that fails carries a status and
        NaN.

    Raises:
        ValueError: if `matrices` is not three-dimensional or has an empty side.

    >>> eigenvalues(torch.diag(torch.tensor([3.0, 1.0, 2.0]))[None]).values
    tensor([[1., 4., 9.]], dtype=torch.float64)
    """
    if matrices.ndim != 3 or 0 in matrices.shape[1:]:
        raise ValueError(f"eigenvalues: expected non-empty matrices [B, N, M], got shape {tuple(matrices.shape)}")
    tall = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mT
    solved = solve_batched([tall])[0] if tall.device.type == "cuda" else _solve_on_host(tall.cpu(), library)
    if resolve_small:
        blurred = (solved.values[:, 0] < _RESOLVED * solved.values[:, -1]).nonzero().flatten()
        solved.values[blurred] = torch.linalg.svdvals(tall[blurred].double()).flip(1).square().to(solved.values.device)
    return solved


def eigenvalues_of_gram(gram: torch.Tensor, frobenius_sq: torch.Tensor, *, long_side: int) -> Eigenvalues:
    """λ of Gram matrices that are given, as where the sum over the shards of W has made them; guarded and verified.

    Args:
        gram: `[B, M, M]` float64, overwritten where it cannot be solved.
        frobenius_sq: `[B]` float64 ‖W‖²_F, summed over the elements.
        long_side: N, for the rounding to allow.
    """
    solve = _solve_gram_on_device if gram.device.type == "cuda" else _solve_gram_on_host
    values, gram_sq, status = solve(gram, frobenius_sq.to(gram.device))
    eps = torch.finfo(torch.float64).eps
    return _verified(values, frobenius_sq.to(gram.device), gram_sq, status, long_side, eps)


def _solve_gram_on_device(
    gram: torch.Tensor, frobenius_sq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues, ‖WᵀW‖²_F and status; nothing is read by the host."""
    status = _input_status(frobenius_sq)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = torch.where((status == Status.OK)[:, None, None], gram, identity)
    gram_sq = torch.linalg.vector_norm(gram, dim=(1, 2)).square()
    return torch.cat([_eigvalsh_on_device(part) for part in _in_parts(gram)]).clamp(min=0.0), gram_sq, status


def _solve_gram_on_host(
    gram: torch.Tensor, frobenius_sq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same on the host."""
    values, gram_sq, failed = _solve_grams(gram.numpy(), frobenius_sq.numpy(), "numpy")
    status = _input_status(frobenius_sq)
    status[failed & (status == Status.OK)] = Status.SOLVER_FAILED
    return values.clamp(min=0.0), gram_sq, status


def solve_batched(stacks: Sequence[torch.Tensor]) -> list[Eigenvalues]:
    """The solve as one batched operation of the device, whatever the long sides; the same results as on the host.

    Args:
        stacks: Each `[B, N, M]` or `[B, M, N]` with N ≥ M, of one M, on one device with float64.
    """
    precision = gram_precision(stacks[0].device)
    with torch.autocast(stacks[0].device.type, enabled=False):
        grams, norms = zip(*(_gram_on_device(stack, precision) for stack in stacks), strict=True)
        gram, frobenius_sq = torch.cat(grams), torch.cat(norms)
        del grams
        values, gram_sq, status = _solve_gram_on_device(gram, frobenius_sq)
    eps, start, solved = torch.finfo(precision).eps, 0, []
    for stack in stacks:
        part = slice(start, start + len(stack))
        n = max(stack.shape[1:])
        solved.append(_verified(values[part], frobenius_sq[part], gram_sq[part], status[part], n, eps))
        start += len(stack)
    return solved


def _gram_on_device(stack: torch.Tensor, precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """WᵀW `[B, M, M]` and ‖W‖²_F `[B]`, float64."""
    w = (stack if stack.shape[1] >= stack.shape[2] else stack.mT).to(precision)
    return (w.mT @ w).double(), torch.linalg.vector_norm(w, dim=(1, 2), dtype=torch.float64).square()


def gram_precision(device: torch.device) -> torch.dtype:
    """Float64, but float32 on a GPU that is slow in float64 while no TF32 is allowed; no flag is changed."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) in _FAST_FLOAT64:
        return torch.float64
    return torch.float64 if _tf32_allowed() else torch.float32


def _tf32_allowed() -> bool:
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set by torch's old and its new setting at odds
        return True


def _in_parts(gram: torch.Tensor) -> Iterator[torch.Tensor]:
    return (gram[start : start + _LARGEST_BATCH] for start in range(0, len(gram), _LARGEST_BATCH))


def _eigvalsh_on_device(gram: torch.Tensor) -> torch.Tensor:
    """Ascending eigenvalues `[B, M]`; torch loops over a batch before 2.12, so CuPy solves it there, if installed."""
    batched = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
    if batched or len(gram) == 1 or gram.device.type != "cuda" or importlib.util.find_spec("cupy") is None:
        values: torch.Tensor = torch.linalg.eigvalsh(gram)
        return values
    import cupy

    with cupy.cuda.ExternalStream(torch.cuda.current_stream(gram.device).cuda_stream):
        solved = cupy.linalg.eigvalsh(cupy.from_dlpack(gram))
    return torch.utils.dlpack.from_dlpack(solved)


def _solve_on_host(tall: torch.Tensor, library: Library) -> Eigenvalues:
    together = max(1, _TOGETHER // (tall.shape[1] * tall.shape[2]))
    parts = [_solve_part(tall[b : b + together], library) for b in range(0, max(1, len(tall)), together)]
    values, frobenius_sq, gram_sq, failed = (torch.cat(field) for field in zip(*parts, strict=True))
    status = _input_status(frobenius_sq)
    status[failed & (status == Status.OK)] = Status.SOLVER_FAILED
    eps = torch.finfo(torch.float64).eps
    return _verified(values.clamp(min=0.0), frobenius_sq, gram_sq, status, tall.shape[1], eps)


def _solve_part(tall: torch.Tensor, library: Library) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues, ‖W‖²_F, ‖WᵀW‖²_F and whether the solver failed, of matrices that are solved together."""
    gram, frobenius_sq = _gram_on_host(tall, library)
    values, gram_sq, failed = _solve_grams(gram, frobenius_sq, library)
    return values, torch.from_numpy(frobenius_sq), gram_sq, failed


def _solve_grams(
    gram: np.ndarray, frobenius_sq: np.ndarray, library: Library
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues, ‖WᵀW‖²_F and whether the solver failed; those that cannot be solved are overwritten."""
    gram_sq = np.array([_sum_of_squares(one) for one in gram])
    solvable = (frobenius_sq > _FLOOR_NORM) & (frobenius_sq < np.inf)
    for b in np.flatnonzero(~solvable):
        gram[b] = np.eye(gram.shape[-1])
    values, failed = _eigvalsh_on_host(gram, library)
    return values, torch.from_numpy(gram_sq), torch.from_numpy(failed)


def _gram_on_host(tall: torch.Tensor, library: Library) -> tuple[np.ndarray, np.ndarray]:
    """WᵀW `[B, M, M]` and ‖W‖²_F `[B]`; of one matrix without a float64 copy of a whole large W."""
    batch, n, m = tall.shape
    rows = n if batch != 1 else max(_ROW_CHUNK // m, m // 4, 1)
    gram, frobenius_sq = np.zeros((batch, m, m)), np.zeros(batch)
    product = gram if rows >= n else np.empty_like(gram)
    with np.errstate(all="ignore"):
        for start in range(0, n, rows):
            a = tall[:, start : start + rows].double()
            frobenius_sq += [_sum_of_squares(one) for one in a.numpy()]
            if library == "torch":
                torch.matmul(a.mT, a, out=torch.from_numpy(product))
            else:
                np.matmul(a.mT.numpy(), a.numpy(), out=product)
            if product is not gram:
                gram += product
    return gram, frobenius_sq


def _sum_of_squares(a: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        flat = a.ravel(order="K")
        return float(np.dot(flat, flat))


def _eigvalsh_on_host(gram: np.ndarray, library: Library) -> tuple[torch.Tensor, np.ndarray]:
    """Eigenvalues `[B, M]`, and which matrices the solver gave up on (they have ones)."""
    failed = np.zeros(len(gram), dtype=bool)
    try:
        return _lapack(gram, library), failed
    except (np.linalg.LinAlgError, RuntimeError):
        if len(gram) == 1:
            return torch.ones(gram.shape[:2], dtype=torch.float64), ~failed
    parts = [_eigvalsh_on_host(gram[b : b + 1], library) for b in range(len(gram))]
    return torch.cat([values for values, _ in parts]), np.concatenate([gave_up for _, gave_up in parts])


def _lapack(gram: np.ndarray, library: Library) -> torch.Tensor:
    if library == "torch" or gram.shape[-1] > _MKL_SIDE:
        values: torch.Tensor = torch.linalg.eigvalsh(torch.from_numpy(gram))
        return values
    return torch.from_numpy(np.linalg.eigvalsh(gram))


def _input_status(frobenius_sq: torch.Tensor) -> torch.Tensor:
    """Status known before the solve: a sum of squares is finite exactly when every element is (and none overflows)."""
    status = torch.full(frobenius_sq.shape, int(Status.OK), device=frobenius_sq.device)
    status[frobenius_sq <= _FLOOR_NORM] = Status.ZERO
    status[~torch.isfinite(frobenius_sq)] = Status.NOT_FINITE
    return status


def _verified(
    values: torch.Tensor,
    frobenius_sq: torch.Tensor,
    gram_sq: torch.Tensor,
    status: torch.Tensor,
    long_side: int,
    eps: float,
) -> Eigenvalues:
    """Check both moments of the spectrum to 64·N roundings of the Gram matrix and blank what is not known."""
    tolerance = 64 * long_side * eps
    first = (values.sum(1) - frobenius_sq).abs() <= tolerance * frobenius_sq
    second = (values.square().sum(1) - gram_sq).abs() <= tolerance * gram_sq
    status = torch.where((status == Status.OK) & ~(first & second), int(Status.SOLVER_FAILED), status)
    values = torch.where((status == Status.OK)[:, None], values, float("nan"))
    return Eigenvalues(values, frobenius_sq, status)

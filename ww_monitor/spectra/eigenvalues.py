"""Weights → eigenvalues of WᵀW, guarded before the solve and verified after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ww_monitor.spectra.status import Status

_ROW_CHUNK = 1 << 23
"""Elements of W that are held in float64 at a time while the Gram matrix is summed (64 MiB)."""

_MKL_SIDE = 2048
"""Above this side torch's host eigensolver beats numpy's (measured on 2 cores: 2.87 s against 3.29 s at 4096)."""

_RESOLVED = 1e-5
"""Relative size from which on an eigenvalue of the float64 Gram matrix is good to better than 1e-9."""

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


def eigenvalues(matrices: torch.Tensor, *, resolve_small: bool = False) -> Eigenvalues:
    """λ = eigenvalues of WᵀW (squared singular values of W), ascending, float64, no division by N.

    The Gram matrix of the short side is formed and solved in float64 whatever the storage dtype. That keeps
    alpha within 1e-11 of a float64 singular value decomposition; a float32 Gram matrix does not. Inputs are
    checked for finite values first; afterwards Σλ = ‖W‖²_F and Σλ² = ‖WᵀW‖²_F are verified, the second because
    a solver that returns the diagonal keeps the trace.

    Args:
        matrices: `[B, N, M]` of any floating dtype; N < M is transposed.
        resolve_small: Solve matrices with λmin < 1e-5 λmax once more by a singular value decomposition. The Gram
            matrix leaves an absolute error of a few 1e-16 λmax, which only counts of zero eigenvalues and √λmin feel.

    Returns:
        Spectra of `min(N, M)` eigenvalues; a matrix that fails carries a status and NaN.

    Raises:
        ValueError: if `matrices` is not three-dimensional or has an empty side.

    >>> eigenvalues(torch.diag(torch.tensor([3.0, 1.0, 2.0]))[None]).values
    tensor([[1., 4., 9.]], dtype=torch.float64)
    """
    if matrices.ndim != 3 or 0 in matrices.shape[1:]:
        raise ValueError(f"eigenvalues: expected non-empty matrices [B, N, M], got shape {tuple(matrices.shape)}")
    tall = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mT
    solved = solve_batched(tall) if tall.device.type == "cuda" else _solve_on_host(tall.cpu())
    if resolve_small:
        blurred = (solved.values[:, 0] < _RESOLVED * solved.values[:, -1]).nonzero().flatten()
        solved.values[blurred] = torch.linalg.svdvals(tall[blurred].double()).flip(1).square()
    return solved


def solve_batched(tall: torch.Tensor) -> Eigenvalues:
    """The solve as one batched device operation; the same result as on the host.

    Args:
        tall: `[B, N, M]` with N ≥ M on any device with float64.
    """
    w = tall.double()
    frobenius_sq = torch.linalg.vector_norm(w, dim=(1, 2)).square()
    status = _input_status(frobenius_sq)
    gram = w.mT @ w
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = torch.where((status == Status.OK)[:, None, None], gram, identity)
    values = torch.linalg.eigvalsh(gram).clamp(min=0.0)
    return _verified(values, frobenius_sq, gram.square().sum((1, 2)), status, tall.shape[1])


def _solve_on_host(tall: torch.Tensor) -> Eigenvalues:
    values = torch.ones(tall.shape[0], tall.shape[2], dtype=torch.float64)
    frobenius_sq = torch.zeros(tall.shape[0], dtype=torch.float64)
    gram_sq = torch.zeros_like(frobenius_sq)
    failed = torch.zeros(tall.shape[0], dtype=torch.bool)
    for b, w in enumerate(tall):
        gram, frobenius_sq[b] = _gram_on_host(w)
        gram_sq[b] = float(np.vdot(gram, gram))
        if _FLOOR_NORM < frobenius_sq[b] < float("inf"):
            try:
                values[b] = _eigvalsh_on_host(gram)
            except (np.linalg.LinAlgError, RuntimeError):
                failed[b] = True
    status = _input_status(frobenius_sq)
    status[failed & (status == Status.OK)] = Status.SOLVER_FAILED
    return _verified(values.clamp(min=0.0), frobenius_sq, gram_sq, status, tall.shape[1])


def _gram_on_host(w: torch.Tensor) -> tuple[np.ndarray, float]:
    """WᵀW and ‖W‖²_F, without a float64 copy of a whole large W."""
    rows = max(1, _ROW_CHUNK // w.shape[1])
    gram = np.zeros((w.shape[1], w.shape[1]))
    frobenius_sq = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, len(w), rows):
            a = w[start : start + rows].double()
            frobenius_sq += float(torch.linalg.vector_norm(a)) ** 2
            a_np = a.numpy()
            gram = a_np.T @ a_np if rows >= w.shape[0] else gram + a_np.T @ a_np
    return gram, frobenius_sq


def _eigvalsh_on_host(gram: np.ndarray) -> torch.Tensor:
    if gram.shape[0] > _MKL_SIDE:
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
    values: torch.Tensor, frobenius_sq: torch.Tensor, gram_sq: torch.Tensor, status: torch.Tensor, long_side: int
) -> Eigenvalues:
    """Check both moments of the spectrum to 64·N·2⁻⁵² and blank what is not known."""
    tolerance = 64 * long_side * torch.finfo(torch.float64).eps
    first = (values.sum(1) - frobenius_sq).abs() <= tolerance * frobenius_sq
    second = (values.square().sum(1) - gram_sq).abs() <= tolerance * gram_sq
    status = torch.where((status == Status.OK) & ~(first & second), int(Status.SOLVER_FAILED), status)
    values = torch.where((status == Status.OK)[:, None], values, float("nan"))
    return Eigenvalues(values, frobenius_sq, status)

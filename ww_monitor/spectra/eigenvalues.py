"""Weights → eigenvalues of WᵀW, guarded before the solve and verified after it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ww_monitor.spectra import host
from ww_monitor.spectra.elements import Moments
from ww_monitor.spectra.status import Status

_RESOLVED = 1e-5
"""Relative size from which on an eigenvalue of the float64 Gram matrix is good to better than 1e-9."""

_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""CUDA capabilities with float64 at half the rate of float32 (data-centre cards); the others have 1/32 or 1/64."""

_LARGEST_BATCH = 65535
"""What cuSOLVER's batched eigensolver takes."""


@dataclass(frozen=True)
class Eigenvalues:
    """Spectra of B matrices.

    Attributes:
        values: `[B, M]` float64, ascending, never negative; NaN where `status` is not OK.
        frobenius_sq: `[B]` float64, ‖W‖²_F summed over the elements.
        status: `[B]` int64 of `Status`.
        moments: Of the elements, where the solve has taken them in passing.
    """

    values: torch.Tensor
    frobenius_sq: torch.Tensor
    status: torch.Tensor
    moments: Moments | None = None


def eigenvalues(matrices: torch.Tensor, *, resolve_small: bool = False, library: host.Library = "numpy") -> Eigenvalues:
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
        library: Host routines, see `host.Library`.

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
        gram: `[B, M, M]` float64; overwritten.
        frobenius_sq: `[B]` float64 ‖W‖²_F, summed over the elements.
        long_side: N, for the rounding to allow.
    """
    frobenius_sq = frobenius_sq.to(gram.device)
    if gram.device.type != "cuda":
        return _verified_on_host(host.solve_grams(gram, frobenius_sq), long_side)
    values, gram_sq, status = _solve_gram_on_device(gram, frobenius_sq)
    return _verified(values, frobenius_sq, gram_sq, status, long_side, torch.finfo(torch.float64).eps)


def _solve_gram_on_device(
    gram: torch.Tensor, frobenius_sq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues, ‖WᵀW‖²_F and status; nothing is read by the host."""
    status = _input_status(frobenius_sq)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = torch.where((status == Status.OK)[:, None, None], gram, identity)
    gram_sq = torch.linalg.vector_norm(gram, dim=(1, 2)).square()
    return torch.cat([_eigvalsh_on_device(part) for part in _in_parts(gram)]).clamp(min=0.0), gram_sq, status


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


def _solve_on_host(tall: torch.Tensor, library: host.Library) -> Eigenvalues:
    found = host.solve(tall, library)
    return replace(_verified_on_host(found, tall.shape[1]), moments=found.moments)


def _verified_on_host(found: host.Solved, long_side: int) -> Eigenvalues:
    status = _input_status(found.frobenius_sq)
    status[found.failed & (status == Status.OK)] = Status.SOLVER_FAILED
    eps = torch.finfo(torch.float64).eps
    return _verified(found.values.clamp(min=0.0), found.frobenius_sq, found.gram_sq, status, long_side, eps)


def _input_status(frobenius_sq: torch.Tensor) -> torch.Tensor:
    """Status known before the solve: a sum of squares is finite exactly when every element is (and none overflows)."""
    status = torch.full(frobenius_sq.shape, int(Status.OK), device=frobenius_sq.device)
    status[frobenius_sq <= host.FLOOR_NORM] = Status.ZERO
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

"""Weights → eigenvalues of WᵀW, guarded before the solve and verified after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ww_monitor.spectra import host
from ww_monitor.spectra.device import MATRIX_COPIES, Accelerator, accelerator_of
from ww_monitor.spectra.elements import Moments
from ww_monitor.spectra.status import Status

_RESOLVED = 1e-5
"""Relative size from which on an eigenvalue of the float64 Gram matrix is good to better than 1e-9."""

_DEVICE_ROWS = 1 << 23
"""Elements of W that a device holds in float64 at a time (64 MiB)."""

DEVICE_MEMORY = 1 << 30
"""Bytes that a chunk of Gram matrices with its workspace may take on a device, beside the weights that it releases."""

MOST_RELEASED = 3 << 27
"""Bytes that the release of weights may add to them, since a model in training keeps its own (3/8 GiB: with it the 48
matrices of GPT-2 small are one batch)."""


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

    @classmethod
    def joined(cls, parts: Sequence[Eigenvalues]) -> Eigenvalues:
        """Spectra of one length, one after the other; without the moments."""
        return cls(
            torch.cat([part.values for part in parts]),
            torch.cat([part.frobenius_sq for part in parts]),
            torch.cat([part.status for part in parts]),
        )

    def to(self, device: torch.device) -> Eigenvalues:
        """The same on another device; without the moments."""
        return Eigenvalues(self.values.to(device), self.frobenius_sq.to(device), self.status.to(device))

    def split(self, counts: Sequence[int]) -> list[Eigenvalues]:
        """The inverse: so many spectra each; without the moments."""
        fields = (self.values, self.frobenius_sq, self.status)
        parts = zip(*(torch.split(field, list(counts)) for field in fields), strict=True)
        return [Eigenvalues(values, frobenius_sq, status) for values, frobenius_sq, status in parts]


def eigenvalues(matrices: torch.Tensor, *, resolve_small: bool = False, library: host.Library = "numpy") -> Eigenvalues:
    """λ = eigenvalues of WᵀW (squared singular values of W), ascending, float64, no division by N.

    The Gram matrix of the short side is formed and solved in float64 whatever the storage dtype. That keeps
    alpha within 1e-11 of a float64 singular value decomposition; a float32 Gram matrix does not. Inputs are
    checked for finite values first; afterwards Σλ = ‖W‖²_F and Σλ² = ‖WᵀW‖²_F are verified, the second because
    a solver that returns the diagonal keeps the trace.

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
    accelerator = accelerator_of(matrices.device)
    if len(matrices) and accelerator is not None and not accelerator.refusal():
        solved, _ = solve_on_device([matrices], accelerator)
    else:
        solved = solve_on_host(tall_of(matrices).cpu(), library)
    return resolved(solved, matrices) if resolve_small else solved


def tall_of(matrices: torch.Tensor) -> torch.Tensor:
    """The same `[B, N, M]` with N ≥ M."""
    return matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mT


def resolved(solved: Eigenvalues, matrices: torch.Tensor) -> Eigenvalues:
    """The same with the spectra whose smallest eigenvalues are blurred solved once more, as `resolve_small` says."""
    blurred = (solved.values[:, 0] < _RESOLVED * solved.values[:, -1]).nonzero().flatten()
    again = tall_of(matrices)[blurred.to(matrices.device)].cpu().double()  # a device's own is slower
    solved.values[blurred] = torch.linalg.svdvals(again).flip(1).square().to(solved.values.device)
    return solved


def eigenvalues_of_gram(gram: torch.Tensor, frobenius_sq: torch.Tensor, *, long_side: int) -> Eigenvalues:
    """λ of Gram matrices that are given, as where the sum over the shards of W has made them; guarded and verified.

    Args:
        gram: `[B, M, M]` float64; overwritten.
        frobenius_sq: `[B]` float64 ‖W‖²_F, summed over the elements.
        long_side: N, for the rounding to allow.
    """
    accelerator = accelerator_of(gram.device)
    sides = torch.full((len(gram),), float(long_side), dtype=torch.float64, device=gram.device)
    if accelerator is None or accelerator.refusal():
        return _verified_on_host(host.solve_grams(gram.cpu(), frobenius_sq.cpu()), sides.cpu())
    frobenius_sq = frobenius_sq.to(gram.device)
    values, gram_sq, status = _solve_grams_on_device(gram, frobenius_sq, accelerator)
    return _verified(values, frobenius_sq, gram_sq, status, sides)


def bytes_of(side: int) -> int:
    """What one matrix of a short side takes on a device, its share of the workspace included."""
    return MATRIX_COPIES * 8 * side**2


def solve_on_device(stacks: list[torch.Tensor], accelerator: Accelerator) -> tuple[Eigenvalues, list[str]]:
    """The solve on a device, whatever the long sides; the host reads nothing but what the device's solver reads itself.

    The list is emptied, so that matrices that nobody else holds are given up as their Gram matrices are made. What the
    device has no memory for, or fails at, is solved on the host.

    Args:
        stacks: Each `[b, N, M]` or `[b, M, N]` with N ≥ M, of one M.
        accelerator: The device that the matrices are on.

    Returns:
        Spectra on the device, in the order of the matrices, and for each `""` or why the host has solved it.
    """
    side, left = min(stacks[0].shape[1:]), sum(map(len, stacks))
    most = DEVICE_MEMORY + min(sum(stack.nbytes for stack in stacks), MOST_RELEASED)
    fitting = min(most, accelerator.spare()) / bytes_of(side)
    size, solved, reasons = accelerator.chunk(side, left, fitting), [], list[str]()
    with torch.autocast(accelerator.device.type, enabled=False):
        while left:
            parts, count = [], 0
            while count < min(size, left):
                part, rest = stacks[0].tensor_split([min(size, left) - count])
                stacks[:1] = [rest] if len(rest) else []
                parts.append(part)
                count += len(part)
                del part, rest
            left -= count
            found, reason = _solve_chunk(parts, size, accelerator)
            solved.append(found)
            reasons += [reason] * count
    return Eigenvalues.joined(solved), reasons


def _solve_chunk(parts: list[torch.Tensor], size: int, accelerator: Accelerator) -> tuple[Eigenvalues, str]:
    """One chunk; a last one that is short is filled with identities, so that the batched solver keeps its size."""
    counts, sides = [len(part) for part in parts], [max(part.shape[1:]) for part in parts]
    try:
        gram, squares = _grams(parts, size if accelerator.batches(min(parts[0].shape[1:]), size) else sum(counts))
    except Exception as error:  # noqa: BLE001 - whatever a device throws, the host goes on
        found = [solve_on_host(tall_of(part.cpu())) for part in parts]
        return Eigenvalues.joined(found).to(accelerator.device), type(error).__name__
    parts.clear()
    device, count = gram.device, sum(counts)
    long_side = torch.cat(
        [torch.full((n,), float(s), dtype=torch.float64, device=device) for n, s in zip(counts, sides, strict=True)]
    )
    try:
        values, gram_sq, status = _solve_grams_on_device(gram, squares, accelerator)
    except Exception as error:  # noqa: BLE001 - likewise
        on_host = _verified_on_host(host.solve_grams(gram[:count].cpu(), squares[:count].cpu()), long_side.cpu())
        return on_host.to(device), type(error).__name__
    return _verified(values[:count], squares[:count], gram_sq[:count], status[:count], long_side), ""


def _grams(parts: Sequence[torch.Tensor], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """WᵀW `[size, M, M]` of the short side and ‖W‖²_F `[size]`, float64; identities behind the last matrix."""
    device, side, start = parts[0].device, min(parts[0].shape[1:]), 0
    gram = torch.zeros(size, side, side, dtype=torch.float64, device=device)
    squares = torch.full((size,), float(side), dtype=torch.float64, device=device)
    for part in parts:
        where = slice(start, start + len(part))
        squares[where] = _add_gram(tall_of(part), gram[where])
        start += len(part)
    gram[start:].diagonal(dim1=1, dim2=2).fill_(1.0)
    return gram, squares


def _add_gram(tall: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Add WᵀW to `gram`; ‖W‖²_F `[b]`. Some rows are in float64 at a time."""
    squares = torch.zeros(len(tall), dtype=torch.float64, device=tall.device)
    for rows in torch.split(tall, max(1, _DEVICE_ROWS // (len(tall) * tall.shape[2])), dim=1):
        some = rows.double()
        gram.baddbmm_(some.mT, some)
        squares += torch.linalg.vector_norm(some, dim=(1, 2)).square()
    return squares


def _solve_grams_on_device(
    gram: torch.Tensor, frobenius_sq: torch.Tensor, accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues, ‖WᵀW‖²_F and status; what cannot be solved becomes an identity, in place to save a copy."""
    status = input_status(frobenius_sq)
    unsolvable = (status != Status.OK)[:, None]
    gram.masked_fill_(unsolvable[:, :, None], 0.0).diagonal(dim1=1, dim2=2).masked_fill_(unsolvable, 1.0)
    gram_sq = torch.linalg.vector_norm(gram, dim=(1, 2)).square()
    return accelerator.eigvalsh(gram).clamp(min=0.0), gram_sq, status


def solve_on_host(tall: torch.Tensor, library: host.Library = "numpy") -> Eigenvalues:
    """The solve of `[B, N, M]` on the host, N ≥ M, with the moments of the elements taken in passing."""
    found = host.solve(tall, library)
    return _verified_on_host(found, torch.full_like(found.frobenius_sq, float(tall.shape[1])))


def _verified_on_host(found: host.Solved, long_side: torch.Tensor) -> Eigenvalues:
    status = input_status(found.frobenius_sq)
    status[found.failed & (status == Status.OK)] = Status.SOLVER_FAILED
    verified = _verified(found.values.clamp(min=0.0), found.frobenius_sq, found.gram_sq, status, long_side)
    return replace(verified, moments=found.moments)


def input_status(frobenius_sq: torch.Tensor) -> torch.Tensor:
    """Status known before the solve: a sum of squares is finite exactly when every element is (and none overflows)."""
    status = torch.full(frobenius_sq.shape, int(Status.OK), dtype=torch.int64, device=frobenius_sq.device)
    status[frobenius_sq <= host.FLOOR_NORM] = Status.ZERO
    status[~torch.isfinite(frobenius_sq)] = Status.NOT_FINITE
    return status


def _verified(
    values: torch.Tensor,
    frobenius_sq: torch.Tensor,
    gram_sq: torch.Tensor,
    status: torch.Tensor,
    long_side: torch.Tensor,
) -> Eigenvalues:
    """Check both moments of the spectrum to 64·N roundings of the Gram matrix and blank what is not known."""
    tolerance = 64 * torch.finfo(torch.float64).eps * long_side
    first = (values.sum(1) - frobenius_sq).abs() <= tolerance * frobenius_sq
    second = (values.square().sum(1) - gram_sq).abs() <= tolerance * gram_sq
    status = torch.where((status == Status.OK) & ~(first & second), int(Status.SOLVER_FAILED), status)
    values = torch.where((status == Status.OK)[:, None], values, float("nan"))
    return Eigenvalues(values, frobenius_sq, status)

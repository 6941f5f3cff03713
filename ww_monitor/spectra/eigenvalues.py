"""Weights → eigenvalues of WᵀW, guarded before the solve and verified after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ww_monitor.spectra import host
from ww_monitor.spectra.device import MATRIX_COPIES, Accelerator, accelerator_of
from ww_monitor.spectra.host import Eigenvalues, input_status, verified
from ww_monitor.spectra.status import Status

_RESOLVED = 1e-5
"""Relative size from which on an eigenvalue of the float64 Gram matrix is good to better than 1e-9."""

_DEVICE_ROWS = 1 << 23
"""Elements of W that a device holds in float64 at a time (64 MiB)."""

DEVICE_MEMORY, MOST_RELEASED = 1 << 30, 3 << 27
"""Bytes that a chunk of Gram matrices with its workspace may take on a device, and that the release of weights may add:
a model in training keeps its own (3/8 GiB: with it the 48 matrices of GPT-2 small are one batch)."""


def eigenvalues(matrices: torch.Tensor, *, resolve_small: bool = False, library: host.Library = "numpy") -> Eigenvalues:
    """λ = eigenvalues of WᵀW (squared singular values of W), ascending, float64, no division by N.

    The Gram matrix of the short side is formed and solved in float64 whatever the storage dtype. That keeps alpha
    within 1e-11 of a float64 singular value decomposition; a float32 Gram matrix does not. Inputs are checked for
    finite values first; afterwards Σλ = ‖W‖²_F and Σλ² = ‖WᵀW‖²_F are verified.

    Args:
        matrices: `[B, N, M]` of any floating dtype; N < M is transposed.
        resolve_small: Solve matrices with λmin < 1e-5 λmax once more by a singular value decomposition. The Gram
            matrix leaves an absolute error of a few 1e-16 λmax, which only counts of zero eigenvalues and √λmin feel.
        library: Host routines, see `host.Library`.

    Returns:
        Spectra of `min(N, M)` eigenvalues, on the device that solved them; NaN and a status for a matrix that fails.

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
        solved, _ = host.solve(tall_of(matrices).cpu(), library)
    return resolved(solved, matrices) if resolve_small else solved


def tall_of(matrices: torch.Tensor) -> torch.Tensor:
    """The matrices, transposed where that makes them `[…, N, M]` with N ≥ M; a view."""
    return matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT


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
        return host.solve_grams(gram.cpu(), frobenius_sq.cpu(), sides.cpu())
    return _solve_grams(gram, frobenius_sq.to(gram.device), sides, accelerator)


def bytes_of(side: int) -> int:
    """What one matrix of a short side takes on a device, its share of the workspace included."""
    return MATRIX_COPIES * 8 * side**2


def solve_on_device(stacks: list[torch.Tensor], accelerator: Accelerator) -> tuple[Eigenvalues, list[str]]:
    """The solve on a device, whatever the long sides; the host reads nothing but what the device's solver reads itself.

    The list is emptied, so that matrices that nobody else holds are given up as their Gram matrices are made. What the
    device has no memory for, or fails at, is solved on the host.

    Args:
        stacks: Each `[b, N, M]` or `[b, M, N]` with N ≥ M, of one M.
        accelerator: The device that they are on.

    Returns:
        Spectra on the device, in the order of the matrices, and for each `""` or why the host has solved it.
    """
    side, left = min(stacks[0].shape[1:]), sum(map(len, stacks))
    most = DEVICE_MEMORY + min(sum(stack.nbytes for stack in stacks), MOST_RELEASED)
    size = accelerator.chunk(side, left, min(most, accelerator.spare()) / bytes_of(side))
    solved, reasons = [], list[str]()
    while left:  # in float64, which a region of autocast leaves alone
        parts, count = [], 0
        while count < min(size, left):
            part, rest = stacks[0].tensor_split([min(size, left) - count])
            stacks[:1] = [rest] if len(rest) else []
            parts.append(part)
            count += len(part)
            del part, rest  # views, either of which holds all of the stack
        left -= count
        found, reason = _solve_chunk(parts, size, accelerator)
        solved.append(Eigenvalues(*(field.to(accelerator.device) for field in vars(found).values())))
        reasons += [reason] * count
    return Eigenvalues.joined(solved), reasons


def _solve_chunk(parts: list[torch.Tensor], size: int, accelerator: Accelerator) -> tuple[Eigenvalues, str]:
    """One chunk; a last one that is short is filled with identities, so that the batched solver keeps its size."""
    count, long_sides = sum(map(len, parts)), [float(max(part.shape[1:])) for part in parts for _ in part]
    try:
        gram, squares = _grams(parts, size if accelerator.batches(min(parts[0].shape[1:]), size) else count)
    except Exception as error:  # noqa: BLE001 - whatever a device throws, the host goes on
        return Eigenvalues.joined(host.solve(tall_of(part.cpu()))[0] for part in parts), type(error).__name__
    parts.clear()  # or the weights would be in memory beside the solver's workspace
    sides = torch.tensor([*long_sides, *[1.0] * (len(gram) - count)], dtype=torch.float64, device="cpu")
    try:
        return _solve_grams(gram, squares, sides.to(gram.device), accelerator).take(slice(count)), ""
    except Exception as error:  # noqa: BLE001 - likewise
        return host.solve_grams(gram[:count].cpu(), squares[:count].cpu(), sides[:count]), type(error).__name__


def _grams(parts: Sequence[torch.Tensor], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """WᵀW `[size, M, M]` of the short side and ‖W‖²_F `[size]`, float64; identities behind the last matrix.

    Some rows are in float64 at a time.
    """
    device, side, start = parts[0].device, min(parts[0].shape[1:]), 0
    gram = torch.zeros(size, side, side, dtype=torch.float64, device=device)
    squares = torch.zeros(size, dtype=torch.float64, device=device)
    for tall in map(tall_of, parts):
        where = slice(start, start + len(tall))
        for rows in torch.split(tall, max(1, _DEVICE_ROWS // (len(tall) * side)), dim=1):
            some = rows.double()
            gram[where].baddbmm_(some.mT, some)
            squares[where] += torch.linalg.vector_norm(some, dim=(1, 2)).square()
        start += len(tall)
    gram[start:].diagonal(dim1=1, dim2=2).fill_(1.0)  # with its norm below it passes `verified`
    squares[start:] = float(side)
    return gram, squares


def _solve_grams(
    gram: torch.Tensor, frobenius_sq: torch.Tensor, long_side: torch.Tensor, accelerator: Accelerator
) -> Eigenvalues:
    """On the device; what cannot be solved becomes an identity, in place to save a copy."""
    unsolvable = (input_status(frobenius_sq) != Status.OK)[:, None]
    gram.masked_fill_(unsolvable[:, :, None], 0.0).diagonal(dim1=1, dim2=2).masked_fill_(unsolvable, 1.0)
    gram_sq = torch.linalg.vector_norm(gram, dim=(1, 2)).square()
    return verified(accelerator.eigvalsh(gram), frobenius_sq, gram_sq, long_side)

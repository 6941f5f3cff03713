"""A device that solves its own matrices: whether it can, what memory it has, and loop or batch by a measured rule.

All figures are of one H100 80GB, cuSOLVER, float64, eigenvalues only: at a short side of 768 one matrix takes 7.8 ms
by the routine for one and 54 ms by the routine for a batch, which takes 67 ms for 48.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

BATCHED_SIDE = 128
"""Short side up to which any number of matrices is one batch: there a batch takes as long as one matrix."""

LEAST_BATCH = 8
"""Matrices from which on a batch beats single solves above that side (the crossing lies between 6 and 10 for every side
from 256 to 3072)."""

MATRIX_COPIES = 6
"""Bytes of a batch over those of its matrices: they, torch's copy, and a workspace of four times their size (19 MB for
each matrix of 768²)."""

FREE_SHARE = 0.5
"""Share of a device's free memory that it may take: training beside it needs the rest (our choice)."""

SECONDS_PER_COLUMN, SECONDS_A_SIDE = 1e-5, 1.3e-3
"""What the routine for one matrix takes (2.2 ms at 256, 7.8 at 768, 10.3 at 1024); and what launching the operations
that follow the solve takes, once a short side (measured for the fit of one row)."""

_LARGEST_COUNT, _LARGEST_BATCH = 2**31 - 1, 65535
"""Elements that the batched routine takes together, n·lda·B, and matrices."""

_FULL_RATE, _FULL_RATE_AMD = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}, ("gfx90a", "gfx94", "gfx95")
"""CUDA capabilities, and AMD's architectures, with float64 at half the rate of float32 (data-centre cards); the others
have 1/32 or 1/64."""


class Accelerator:
    """A CUDA device, as the engine uses it; everything that is asked of the device passes through here."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refusal(self) -> str:
        """Why the host solves the matrices of this device, `""` if the device does."""
        if torch.version.hip:
            full = torch.cuda.get_device_properties(self.device).gcnArchName.startswith(_FULL_RATE_AMD)
        else:
            full = torch.cuda.get_device_capability(self.device) in _FULL_RATE
        return "" if full else "no full-rate float64"

    def free_memory(self) -> int:
        """Bytes that can be had: what is free, and what torch has reserved and not allocated."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved(self.device) - self.allocated())

    def spare(self) -> float:
        """Bytes that may be taken of it at a time."""
        return FREE_SHARE * self.free_memory()

    def allocated(self) -> int:
        """Bytes that tensors take."""
        return int(torch.cuda.memory_allocated(self.device))

    def single(self, gram: torch.Tensor) -> torch.Tensor:
        """Ascending eigenvalues `[M]` of one Gram matrix."""
        values: torch.Tensor = torch.linalg.eigvalsh(gram)
        return values

    def batched(self, gram: torch.Tensor) -> torch.Tensor:
        """Ascending eigenvalues `[B, M]` of a stack, in one call; NaN where the solver gave up.

        torch sends a stack to cuSOLVER's batched routine from 2.12 on, and loops over it before.
        """
        if _torch_batches() or not _has_nvmath():
            values: torch.Tensor = torch.linalg.eigvalsh(gram)
            return values
        return _xsyev_batched(gram)

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same tensors on the host, as float64, with one wait for the device whatever their number."""
        if not tensors:
            return []
        packed = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu()  # of one type: one copy
        ends = accumulate(tensor.numel() for tensor in tensors)
        return [packed[end - one.numel() : end].view(one.shape) for one, end in zip(tensors, ends, strict=True)]

    def batches(self, side: int, count: int) -> bool:
        """Whether so many matrices of a short side are solved as a batch; else one by one."""
        if side <= BATCHED_SIDE:
            return count > 1
        return count >= LEAST_BATCH and (_torch_batches() or _has_nvmath())

    def eigvalsh(self, gram: torch.Tensor) -> torch.Tensor:
        """Ascending eigenvalues `[B, M]` of Gram matrices `[B, M, M]` float64, by the quicker of the two ways."""
        if self.batches(gram.shape[-1], len(gram)):
            return self.batched(gram)
        return torch.stack([self.single(one) for one in gram])

    def chunk(self, side: int, count: int, fitting: float) -> int:
        """How many of `count` matrices of a side to solve together if so many fit into memory; at least one.

        All chunks are of one size: a batched solve is set up anew when it changes.
        """
        most = min(_LARGEST_COUNT // side**2, _LARGEST_BATCH, int(min(fitting, count)))
        return -(-count // -(-count // max(1, most)))

    def seconds(self, side: int, count: int) -> float:
        """About how long the device takes for so many matrices of a short side; a batch takes as long as eight."""
        return SECONDS_A_SIDE + SECONDS_PER_COLUMN * side * (1 if side <= BATCHED_SIDE else min(count, LEAST_BATCH))


ACCELERATORS: dict[str, type[Accelerator]] = {"cuda": Accelerator}
"""What solves its own matrices, by the type of its device."""


def accelerator_of(device: torch.device) -> Accelerator | None:
    """How to use a device; `None` for the host and for devices whose matrices the host solves anyway."""
    kind = ACCELERATORS.get(device.type)
    return None if kind is None else kind(device)


def read_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one device on the host, with one wait for the device."""
    accelerator = accelerator_of(tensors[0].device)
    return [tensor.cpu() for tensor in tensors] if accelerator is None else accelerator.read(tensors)


def _torch_batches() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def _has_nvmath() -> bool:
    return not torch.version.hip and importlib.util.find_spec("nvmath") is not None


_HANDLES = threading.local()
"""cuSOLVER's handle and parameters by device, for each thread its own: two threads must not share a handle."""

_REAL_64, _LOWER, _NO_VECTORS = 1, 0, 0
"""CUDA_R_64F, CUBLAS_FILL_MODE_LOWER and CUSOLVER_EIG_MODE_NOVECTOR of CUDA's headers."""


def _xsyev_batched(gram: torch.Tensor) -> torch.Tensor:
    """The batched routine through NVIDIA's bindings; the stack is overwritten."""
    from nvmath.bindings import cusolverDn

    count, side = gram.shape[:2]
    made: dict[torch.device, tuple[int, int]] = _HANDLES.__dict__.setdefault("made", {})
    with torch.cuda.device(gram.device):
        if gram.device not in made:
            made[gram.device] = cusolverDn.create(), cusolverDn.create_params()
        handle, params = made[gram.device]
        # in torch's order: behind what made the stack, and before torch gives its workspace to others
        cusolverDn.set_stream(handle, torch.cuda.current_stream(gram.device).cuda_stream)
        values = torch.empty(count, side, dtype=torch.float64, device=gram.device)
        info = torch.empty(count, dtype=torch.int32, device=gram.device)
        shared: tuple[Any, ...] = (
            handle, params, _NO_VECTORS, _LOWER, side, _REAL_64, gram.data_ptr(), side, _REAL_64, values.data_ptr(),
            _REAL_64,
        )  # fmt: skip
        on_device, on_host = cusolverDn.xsyev_batched_buffer_size(*shared, count)
        work = torch.empty(max(1, on_device), dtype=torch.uint8, device=gram.device)  # an empty one's address is 0
        host_work = torch.empty(max(1, on_host), dtype=torch.uint8, device="cpu")
        cusolverDn.xsyev_batched(
            *shared, work.data_ptr(), on_device, host_work.data_ptr(), on_host, info.data_ptr(), count
        )
    return torch.where((info == 0)[:, None], values, float("nan"))

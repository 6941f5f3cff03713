"""The solver alone on a device: float64 Gram matrices and their eigenvalues, one after the other and in batches.

Nothing here is the package's: it is what the package is measured against.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import rivals

ALWAYS_BATCHED = 128
"""Short side up to which one batch takes as long as one matrix (measured on an H100)."""

BATCHED_FROM = 8
"""Matrices from which a batch of larger ones beats as many single solves; the crossing was between 6 and 10."""

MOST_ELEMENTS = 2**31 - 1
"""Of a batch: what `cusolverDnXsyevBatched` takes."""

Solver = Callable[[torch.Tensor], torch.Tensor]
"""`[B, M, M]` symmetric float64, which it may overwrite → `[B, M]`."""


@dataclass(frozen=True)
class Alone:
    """Milliseconds a round for all the matrices of one short side.

    Attributes:
        side: M.
        count: Matrices of that side.
        loop: One solve a matrix.
        batch: One call for all, or as few as fit; empty where nothing solves batches here.
    """

    side: int
    count: int
    loop: list[float]
    batch: list[float]

    @property
    def better(self) -> float:
        """The median of what the rule takes."""
        batched = self.batch and (self.side <= ALWAYS_BATCHED or self.count >= BATCHED_FROM)
        return statistics.median(self.batch if batched else self.loop)


def grams(model: torch.nn.Module) -> dict[int, Callable[[], torch.Tensor]]:
    """By short side M, what makes all Gram matrices `[B, M, M]` of the model's weights."""
    groups: dict[int, list[torch.Tensor]] = defaultdict(list)
    for matrix in rivals.matrices_of(model):
        weights = matrix.load().detach()
        groups[min(weights.shape[1:])].append(weights)
    return {side: partial(_grams, stacks) for side, stacks in sorted(groups.items())}


def _grams(stacks: list[torch.Tensor]) -> torch.Tensor:
    tall = (w if w.shape[1] >= w.shape[2] else w.mT for w in stacks)
    return torch.cat([w.mT @ w for w in (w.double() for w in tall)])


def loop(gram: torch.Tensor) -> torch.Tensor:
    """`torch.linalg.eigvalsh` of one matrix after the other."""
    return torch.stack([torch.linalg.eigvalsh(one) for one in gram])


def in_batches(solve: Solver, gram: torch.Tensor) -> torch.Tensor:
    """As few calls as the solver takes, of one size but for the last."""
    size = max(1, MOST_ELEMENTS // gram[0].numel())
    size = -(-len(gram) // -(-len(gram) // size))
    return torch.cat([solve(part) for part in gram.split(size)])


# --- batches: torch's own from 2.12 on, before that cuSOLVER's routine


def batched_solver(device: torch.device) -> tuple[str, Solver | None]:
    """What solves a batch there in one call, and its name; or why there is none.

    NVIDIA's own bindings are taken first, then the library that torch has loaded.
    """
    if device.type != "cuda" or _torch_version() >= (2, 12):
        return "torch.linalg.eigvalsh", torch.linalg.eigvalsh
    found = []
    for name, make in (("nvmath", _Nvmath), ("ctypes", _Ctypes)):
        try:
            solve = partial(_xsyev_batched, make())
            _check(solve, device)
            return "; ".join([f"XsyevBatched by {name}", *found]), solve
        except Exception as error:  # noqa: BLE001 - what one cannot, for whatever reason, the next one may
            found.append(f"not by {name} ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
    return "; ".join(found), None


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _check(solve: Solver, device: torch.device) -> None:
    """Two small matrices are solved right.

    Raises:
        RuntimeError: if they are not.
    """
    w = torch.arange(1.0, 33.0, dtype=torch.float64, device=device).sin().view(2, 4, 4)
    gram = w.mT @ w
    if not torch.allclose(solve(gram.clone()), loop(gram)):
        raise RuntimeError("two matrices of 4 × 4 come out wrong")


def _xsyev_batched(library: Any, gram: torch.Tensor) -> torch.Tensor:
    """CuSOLVER's XsyevBatched, eigenvalues only.

    Raises:
        RuntimeError: if a matrix is not solved.
    """
    gram = gram.contiguous()
    count, side, _ = gram.shape
    values = torch.empty(count, side, dtype=gram.dtype, device=gram.device)
    info = torch.empty(count, dtype=torch.int32, device=gram.device)
    library.set_stream(torch.cuda.current_stream(gram.device).cuda_stream)
    where = (side, gram.data_ptr(), values.data_ptr())
    on_device, on_host = library.buffer_sizes(*where, count)
    work = torch.empty(max(1, on_device), dtype=torch.uint8, device=gram.device)
    host_work = torch.empty(max(1, on_host), dtype=torch.uint8, device="cpu")
    library.solve(*where, work.data_ptr(), on_device, host_work.data_ptr(), on_host, info.data_ptr(), count)
    if bool(info.any()):
        raise RuntimeError(f"XsyevBatched: {int(info.count_nonzero())} of {count} matrices of side {side} not solved")
    return values


_VALUES_ONLY, _LOWER, _FLOAT64 = 0, 0, 1
"""CUSOLVER_EIG_MODE_NOVECTOR, CUBLAS_FILL_MODE_LOWER, CUDA_R_64F."""


class _Nvmath:
    """The routine through `nvmath-python`."""

    def __init__(self) -> None:
        self._dn = importlib.import_module("nvmath.bindings.cusolverDn")
        self._handle, self._parameters = self._dn.create(), self._dn.create_params()

    def set_stream(self, stream: int) -> None:
        self._dn.set_stream(self._handle, stream)

    def buffer_sizes(self, side: int, gram: int, values: int, count: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self._dn.xsyev_batched_buffer_size(*self._problem(side, gram, values), count)
        return sizes

    def solve(self, side: int, gram: int, values: int, *rest: int) -> None:
        self._dn.xsyev_batched(*self._problem(side, gram, values), *rest)

    def _problem(self, side: int, gram: int, values: int) -> Iterator[int]:
        yield from (self._handle, self._parameters, _VALUES_ONLY, _LOWER)
        yield from (side, _FLOAT64, gram, side, _FLOAT64, values, _FLOAT64)


class _Ctypes:
    """The routine of the library that torch has loaded; Linux says where it lies."""

    def __init__(self) -> None:
        torch.linalg.eigvalsh(torch.eye(4, dtype=torch.float64, device="cuda"))  # loads it
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
        paths = sorted(set(re.findall(r"\S*libcusolver\.so\S*", mapped)))
        if not paths:
            raise OSError("torch has loaded no libcusolver")
        self._library = ctypes.CDLL(paths[0])
        self._handle, self._parameters = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cusolverDnCreate", ctypes.byref(self._handle))
        self._call("cusolverDnCreateParams", ctypes.byref(self._parameters))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: status {status}")

    def set_stream(self, stream: int) -> None:
        self._call("cusolverDnSetStream", self._handle, ctypes.c_void_p(stream))

    def buffer_sizes(self, side: int, gram: int, values: int, count: int) -> tuple[int, int]:
        on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
        sizes = (ctypes.byref(on_device), ctypes.byref(on_host))
        self._call(
            "cusolverDnXsyevBatched_bufferSize", *self._problem(side, gram, values), *sizes, ctypes.c_int64(count)
        )
        return on_device.value, on_host.value

    def solve(
        self, side: int, gram: int, values: int, work: int, size: int, host_work: int, host_size: int, *rest: int
    ) -> None:
        info, count = rest
        self._call(
            "cusolverDnXsyevBatched", *self._problem(side, gram, values),
            ctypes.c_void_p(work), ctypes.c_size_t(size), ctypes.c_void_p(host_work), ctypes.c_size_t(host_size),
            ctypes.c_void_p(info), ctypes.c_int64(count),
        )  # fmt: skip

    def _problem(self, side: int, gram: int, values: int) -> Iterator[Any]:
        width, real = ctypes.c_int64(side), ctypes.c_int(_FLOAT64)
        yield from (self._handle, self._parameters, ctypes.c_int(_VALUES_ONLY), ctypes.c_int(_LOWER), width)
        yield from (real, ctypes.c_void_p(gram), width, real, ctypes.c_void_p(values), real)

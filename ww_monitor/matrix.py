"""The unit of analysis: a named weight matrix that is loaded only when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ww_monitor.errors import check_choice
from ww_monitor.kind import Kind
from ww_monitor.record import Skipped

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Index", "Matrix", "Piece", "Shards", "Skipped"]

Index = range | tuple[int, ...]
"""Places along one axis of a matrix."""


@dataclass(frozen=True)
class Piece:
    """The part of a matrix that lies on this rank.

    Attributes:
        index: The slices, rows and columns whose product lies here; none along an axis where the rank has nothing.
        load: Returns the part `[slices, rows, columns]` on the device of the mesh; no other rank is needed.
        dtype: The type of the weights.
        mesh: The ranks that hold all of the matrix between them, replicas included.
        sharded: The dimensions of the mesh along which ranks hold different parts.
    """

    index: tuple[Index, Index, Index]
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    dtype: torch.dtype
    mesh: DeviceMesh = field(repr=False, compare=False)
    sharded: tuple[int, ...]


@dataclass(frozen=True)
class Shards:
    """How a matrix lies on the ranks of a job.

    Attributes:
        ranks: Those (by their number in the job) that hold it between them; all of them call `Matrix.load` together,
            and each gets the whole.
        piece: What lies on this rank, where it can be read alone.
    """

    ranks: tuple[int, ...]
    piece: Piece | None = None


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a model, or the stack of slices of one kernel.

    Attributes:
        name: Cleaned dotted name, unique in its model.
        kind: What layer it belongs to; also given by its word, as `"dense"`.
        shape: `(slices, rows, columns)` of what `load` returns; a dense weight has one slice.
        load: Returns the weights `[slices, rows, columns]`, detached, in storage dtype, on their device.
        role: What the matrix does in its block (`"q"`, `"up"`, `"head"`, …), or `""` where unknown.
        frozen: Whether training leaves it alone, as far as the walker can see.
        shards: Where it is spread over ranks, so that `load` is a collective; else `None`.
        inputs_first: Whether the rows are inputs and the columns outputs, as Keras and GPT-2 store them.
        groups: How many groups of a convolution lie along the rows and along the columns, one block after the other.

    Raises:
        InvalidArgument: if `kind` is none.
    """

    name: str
    kind: Kind
    shape: tuple[int, int, int]
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    role: str = ""
    frozen: bool = False
    shards: Shards | None = field(default=None, repr=False, compare=False)
    inputs_first: bool = field(default=False, repr=False, compare=False)
    groups: tuple[int, int] = field(default=(1, 1), repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.kind) is not Kind:
            check_choice(f"Matrix {self.name!r}", "kind", self.kind, tuple(Kind))
            object.__setattr__(self, "kind", Kind(self.kind))  # the one way to set a field of a frozen class

    @property
    def long_side(self) -> int:
        """N, the larger dimension of a slice."""
        return max(self.shape[1:])

    @property
    def short_side(self) -> int:
        """M, the smaller dimension of a slice: its number of eigenvalues."""
        return min(self.shape[1:])

    @property
    def fan_in(self) -> int:
        """Inputs of a slice, of one group of it."""
        side = 0 if self.inputs_first else 1
        return self.shape[1 + side] // self.groups[side]

    @property
    def fan_out(self) -> int:
        """Outputs of a slice, of one group of it."""
        side = 1 if self.inputs_first else 0
        return self.shape[1 + side] // self.groups[side]

    @property
    def num_eigenvalues(self) -> int:
        """Number of pooled eigenvalues, slices · M."""
        return self.shape[0] * self.short_side

    @property
    def eigenvalue_factor(self) -> float:
        """What eigenvalues are multiplied by after the solve: 0.5 for kernels, whoever owns them, else 1."""
        kind = Kind.CONV if self.role == Kind.CONV.about.role else self.kind
        return kind.about.eigenvalue_factor

    @property
    def cost(self) -> float:
        """Floating-point work of one analysis in units of one multiply-add, M²N + M³ a slice."""
        n, m = self.long_side, self.short_side
        return float(self.shape[0] * (m * m * n + m**3))

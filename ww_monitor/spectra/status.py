"""What all numbers of B matrices share: rows that are taken and joined, and why one is not known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TypeVar

import torch


class Status(IntEnum):
    """Outcome of a numerical step for one matrix; an integer, so that a batch of them is a tensor.

    >>> Status(1).label
    'not_finite'
    """

    OK = 0
    NOT_FINITE = 1
    ZERO = 2
    SOLVER_FAILED = 3
    FEW_EIGENVALUES = 4
    DEGENERATE = 5

    @property
    def label(self) -> str:
        """The name in lower case, as it stands in a snapshot."""
        return self.name.lower()


R = TypeVar("R", bound="Rows")


class Rows:
    """Base of dataclasses whose fields are tensors with a row for each matrix."""

    def take(self: R, which: torch.Tensor | Sequence[int] | slice) -> R:
        """Some of the rows."""
        return type(self)(*(field[which] for field in vars(self).values()))

    @classmethod
    def joined(cls: type[R], parts: Iterable[R]) -> R:
        """The rows of several, one after the other."""
        first, *rest = each = list(parts)
        return cls(*map(torch.cat, zip(*(vars(one).values() for one in each), strict=True))) if rest else first

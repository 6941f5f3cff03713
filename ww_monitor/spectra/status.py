"""Why a number is not known."""

from __future__ import annotations

from enum import IntEnum


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

"""When to look: pure functions of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable

from ww_monitor.errors import check_positive_int

Schedule = Callable[[int, int | None], bool]
"""`schedule(step, last)`: whether to analyse at optimizer step `step`, the last analysed step being `last`."""


def every_n_steps(n: int) -> Schedule:
    """True when a multiple of n has been reached or passed since the last analysis, and when there was none.

    Steps may repeat (gradient accumulation) and jump (several optimizers): neither a repeat nor a jump over a
    multiple confuses it.

    >>> due = every_n_steps(100)
    >>> due(100, 0), due(101, 100), due(202, 100), due(0, None)
    (True, False, True, True)
    """
    check_positive_int("every_n_steps", "n", n)
    return lambda step, last: last is None or step // n > last // n


def never(step: int, last: int | None) -> bool:
    """False: only explicit calls analyse."""
    return False

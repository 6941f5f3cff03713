"""Schedules: pure functions of the step and the last analysed step."""

import pytest

from ww_monitor.errors import InvalidArgument
from ww_monitor.schedule import every_n_steps, never


def analysed(schedule, steps, last: int | None = None) -> list[int]:
    """The steps at which `schedule` asks for an analysis, when it gets what it asks for."""
    seen = []
    for step in steps:
        if schedule(step, last):
            seen.append(step)
            last = step
    return seen


@pytest.mark.parametrize(
    ("n", "steps", "last", "expected"),
    [
        (1, range(4), None, [0, 1, 2, 3]),
        (3, range(10), None, [0, 3, 6, 9]),
        (3, [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4], None, [0, 3]),
        (3, [0, 2, 4, 6, 8, 10, 12], None, [0, 4, 6, 10, 12]),
        (5, [0, 7, 14, 15, 40, 41], None, [0, 7, 14, 15, 40]),
        (10, [0, 1000, 1001, 1009, 1010], None, [0, 1000, 1010]),
        (10, range(15, 35), 12, [20, 30]),
        (10, range(15, 35), 20, [30]),
        (10, range(15, 25), None, [15, 20]),
        (100, range(50), 0, []),
    ],
    ids=[
        "every step",
        "every third",
        "repeats under gradient accumulation",
        "jumps of two optimizers",
        "jumps over multiples",
        "a jump over many",
        "resumed before a multiple",
        "resumed on a multiple",
        "resumed without a state",
        "not yet",
    ],
)
def test_a_multiple_reached_or_passed_is_analysed_once(n, steps, last, expected):
    assert analysed(every_n_steps(n), steps, last) == expected


def test_a_schedule_is_a_pure_function():
    schedule = every_n_steps(4)
    assert [schedule(8, 4) for _ in range(3)] == [True] * 3
    assert [schedule(7, 4) for _ in range(3)] == [False] * 3


def test_never_is_never():
    assert analysed(never, range(1000)) == []


@pytest.mark.parametrize("n", [0, -1, 2.5, 3.0, True, "3", None])
def test_a_number_that_makes_no_sense_is_refused(n):
    with pytest.raises(InvalidArgument, match=rf"every_n_steps: n must be an integer >= 1; got {n!r}"):
        every_n_steps(n)

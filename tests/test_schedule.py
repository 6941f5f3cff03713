"""Schedules: pure functions of the step and the last analysed step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ww_monitor.errors import InvalidArgument
from ww_monitor.schedule import Budget, every_n_steps, never, next_round


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


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(budget: Budget, clock: Clock, *, steps: int, step_seconds: float, look_seconds, start: int = 0) -> list[int]:
    """The steps at which a run of so many steps is looked at, the last among them; `look_seconds(step)` long."""

    def analyze(step: int) -> None:
        clock.now += look_seconds(step)
        budget.spent(look_seconds(step))
        seen.append(step)

    seen: list[int] = []
    budget.start(start)
    analyze(start)
    due = None
    for step in range(start + 1, start + steps + 1):
        clock.now += step_seconds(step) if callable(step_seconds) else step_seconds
        budget.tick(step)
        due = budget.plan(step) if due is None else due
        if due is not None and step >= due:
            analyze(step)
            due = None
    if seen[-1] != start + steps:
        analyze(start + steps)
    return seen


@pytest.mark.parametrize("share", [0.01, 0.02, 0.1, 0.5])
@pytest.mark.parametrize(("step_seconds", "look"), [(0.01, 0.05), (0.1, 0.003), (1.0, 30.0), (0.002, 0.4)])
def test_a_long_run_loses_no_more_than_its_share(share, step_seconds, look):
    clock = Clock()
    budget = Budget(share, clock=clock)
    steps = round(20 * look / share / step_seconds) + 100
    seen = run(budget, clock, steps=steps, step_seconds=step_seconds, look_seconds=lambda step: look)
    assert budget.overhead <= share
    assert budget.overhead > share / 4 or len(seen) > steps - 10
    assert budget.overhead == pytest.approx(len(seen) * look / (steps * step_seconds + len(seen) * look))


def test_looks_that_cost_nothing_are_taken_at_every_step_once_steps_are_timed():
    clock = Clock()
    seen = run(Budget(0.02, clock=clock), clock, steps=15, step_seconds=1.0, look_seconds=lambda step: 1e-9)
    assert seen == [0, 10, 11, 12, 13, 14, 15]


def test_what_the_first_look_takes_longer_is_warm_up():
    clock = Clock()
    budget = Budget(0.02, clock=clock)
    seen = run(budget, clock, steps=20_000, step_seconds=0.1, look_seconds=lambda step: 9.0 if step == 0 else 1.0)
    assert seen[1] > 9.0 / 0.02 / 0.1
    assert budget.lost == pytest.approx(len(seen))


def test_slow_first_steps_do_not_count():
    clock = Clock()
    budget = Budget(0.02, clock=clock)
    run(budget, clock, steps=50, step_seconds=lambda step: 60.0 if step <= 3 else 0.5, look_seconds=lambda step: 0.1)
    assert budget.seconds_per_step == pytest.approx(0.5)


def test_looks_become_rarer_when_they_cost_more():
    clock = Clock()
    seen = run(
        Budget(0.02, clock=clock),
        clock,
        steps=40_000,
        step_seconds=0.1,
        look_seconds=lambda step: 0.05 if step < 20_000 else 5.0,
    )
    early = [step for step in seen if 10_000 < step < 20_000]
    late = [step for step in seen if step > 20_000]
    assert len(early) > 5 * len(late)


def test_time_between_two_runs_is_not_counted():
    clock = Clock()
    budget = Budget(0.02, clock=clock)
    run(budget, clock, steps=100, step_seconds=0.1, look_seconds=lambda step: 0.1)
    budget.stop()
    before = budget.elapsed
    clock.now += 10_000
    run(budget, clock, steps=10, step_seconds=0.1, look_seconds=lambda step: 0.1, start=100)
    assert budget.elapsed == pytest.approx(before + 1.2)


def test_steps_that_a_look_beside_them_slows_are_lost_time():
    clock = Clock()
    budget = Budget(0.02, clock=clock)
    budget.start(0)
    for step in range(1, 101):
        busy = step > 80
        clock.now += 1.5 if busy else 1.0
        budget.tick(step, busy=busy)
    assert budget.lost == pytest.approx(20 * 0.5)


def test_a_look_spread_over_steps_is_one_look():
    clock = Clock()
    budget = Budget(0.02, clock=clock)
    budget.start(0)
    for complete in (False, False, True, False, True):
        budget.spent(1.0, complete=complete)
    assert (budget.analyses, budget.cost) == (2, 2.0)


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(InvalidArgument, match="max_overhead must be between 0 and 1"):
        Budget(share)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_the_next_look_is_at_a_round_step_and_not_too_late(step, interval):
    found = next_round(step, interval)
    assert step + interval <= found < step + 1 + 6 * interval
    assert any(
        found % (factor * 10**power) == 0
        for power in range(7)
        for factor in (1, 2, 5)
        if factor * 10**power >= interval / 2
    )

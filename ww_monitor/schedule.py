"""When to analyse: at given optimizer steps, or as often as a share of the training time allows."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import median

from ww_monitor.errors import check_positive_int, check_share
from ww_monitor.settings import MAX_OVERHEAD

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
    return partial(_passed_a_multiple, n)


def _passed_a_multiple(n: int, step: int, last: int | None) -> bool:
    return last is None or step // n > last // n


def never(step: int, last: int | None) -> bool:
    """False: only explicit calls analyse."""
    return False


WARM_UP = 3
"""First steps that are not timed: compilation, caches and allocators make them slow."""

STEPS_TO_TIME = 10
"""Steps after which the duration of a step is known well enough to plan with."""


class Budget:
    """Plans each analysis so that the time lost stays below a share of the run, the last analysis of the run included.

    After every analysis the next one is planned in steps, from the duration of the steps and what the last ones cost;
    in a run on several ranks one of them plans for all. Time when no training runs does not count.

    Args:
        share: Time lost over the time of the run, both counted from the start of training.
        clock: Function that returns the time in seconds.

    Raises:
        InvalidArgument: if the share is not between 0 and 1.

    >>> now = [0.0]
    >>> budget = Budget(0.1, clock=lambda: now[0])
    >>> budget.start(0)
    >>> budget.spent(1.0)                             # the analysis before the first step
    >>> for step in range(1, 11):                     # a second each
    ...     now[0] += 1.0
    ...     budget.tick(step)
    >>> budget.plan(10)                               # (1 + 2 · 1)/0.1 = 30 s after the start, in round steps
    40
    """

    def __init__(self, share: float = MAX_OVERHEAD, *, clock: Callable[[], float] = time.perf_counter) -> None:
        check_share("Budget", "max_overhead", share)
        self.share = share
        self.analyses = 0
        self._clock = clock
        self._elapsed = 0.0
        self._resumed_at: float | None = None
        self._stood_still = 0.0
        self._this_look = 0.0
        self._costs: deque[float] = deque(maxlen=3)  # of three the median: one slow analysis alone does not count
        self._first_step = 0
        self._last: tuple[int, float] | None = None
        self._steps = {False: 0, True: 0}
        self._seconds = {False: 0.0, True: 0.0}

    @property
    def elapsed(self) -> float:
        """Seconds of the run, with what was lost in them."""
        return self._elapsed + (0.0 if self._resumed_at is None else self._clock() - self._resumed_at)

    @property
    def lost(self) -> float:
        """Seconds that training stood still, or was slower because an analysis went on beside it."""
        slowed = self._seconds[True] - self._steps[True] * self._mean(busy=False)
        return self._stood_still + (max(0.0, slowed) if self._steps[False] >= STEPS_TO_TIME else 0.0)

    @property
    def overhead(self) -> float:
        """Share of the run that was lost so far."""
        return self.lost / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def cost(self) -> float:
        """Seconds that an analysis is expected to cost."""
        return median(self._costs) if self._costs else 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of a training step, NaN while it is not known."""
        steps = self._steps[False] + self._steps[True]
        return (self._seconds[False] + self._seconds[True]) / steps if steps else math.nan

    def _mean(self, *, busy: bool) -> float:
        return self._seconds[busy] / self._steps[busy] if self._steps[busy] else 0.0

    def start(self, step: int) -> None:
        """Training begins or goes on after `step` completed steps."""
        self._resumed_at = self._clock()
        self._first_step, self._last = step, None

    def stop(self) -> None:
        """Training pauses or ends."""
        self._elapsed, self._resumed_at = self.elapsed, None

    def tick(self, step: int, *, busy: bool = False) -> None:
        """A step has been completed; `busy` if an analysis went on beside it."""
        trained = self.elapsed - self._stood_still
        if self._last is not None and step > self._last[0]:
            self._steps[busy] += step - self._last[0]
            self._seconds[busy] += trained - self._last[1]
        if step >= self._first_step + WARM_UP and (self._last is None or step > self._last[0]):
            self._last = step, trained

    def spent(self, seconds: float, *, complete: bool = True) -> None:
        """Training stood still for so long; `complete` ends an analysis.

        What the first analysis took longer than the second is warm-up and not counted.
        """
        self._stood_still += seconds
        self._this_look += seconds
        if complete:
            if self.analyses == 1:
                self._stood_still -= max(0.0, self._costs.pop() - self._this_look)
            self._costs.append(self._this_look)
            self._this_look = 0.0
            self.analyses += 1

    def can_plan(self, step: int) -> bool:
        """Whether enough steps have been timed."""
        return step >= self._first_step + STEPS_TO_TIME

    def plan(self, step: int) -> int | None:
        """The step of the next analysis, seen from `step`; `None` while the duration of a step is not known."""
        if math.isnan(self.seconds_per_step) or not self.can_plan(step):
            return None
        needed = (self.lost + 2 * self.cost) / self.share  # of the next, and of one that may end the run
        wait = max(0.0, needed - self.elapsed) / max(self.seconds_per_step, 1e-9)
        return next_round(step, math.ceil(wait)) if wait > 0 else step


def next_round(step: int, interval: int) -> int:
    """The first multiple of a round number (1, 2 or 5 times a power of ten) that is at least `interval` steps away.

    >>> next_round(0, 30), next_round(40, 1), next_round(7, 130)
    (50, 41, 200)
    """
    power = int(10 ** math.floor(math.log10(interval)))
    nice = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= interval)
    return -(-(step + interval) // nice) * nice

"""Which rank analyses what."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def deal(costs: Sequence[float], holders: Sequence[Collection[int]], world: int) -> list[int]:
    """The owner of each matrix: longest processing time first, each to the least loaded rank that holds it.

    The largest load is at most 4/3 − 1/(3·world) of the least possible one where every rank holds all (Graham 1969,
    "Bounds on multiprocessing timing anomalies", theorem 2). Ties go to the lower rank, so that every rank that
    deals for itself deals the same.

    Args:
        costs: Work of each matrix, in any unit.
        holders: The ranks that may analyse it, at least one each.
        world: Number of ranks.

    >>> deal([5.0, 4.0, 3.0, 3.0], [range(2)] * 4, 2)
    [0, 1, 1, 0]
    """
    load, owners = [0.0] * world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(holders[i], key=lambda rank: (load[rank], rank))
        load[owners[i]] += costs[i]
    return owners

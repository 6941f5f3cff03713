"""Which rank owns which matrix, and which matrices are under way at the same time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from heapq import heapreplace


def assign_owners(costs: Sequence[float], holders: Sequence[Collection[int]], world: int) -> list[int]:
    """The owner of each matrix: longest processing time first, each to the least loaded rank that holds it.

    The largest load is at most 4/3 − 1/(3·world) of the least possible one where every rank holds all (Graham 1969,
    "Bounds on multiprocessing timing anomalies", theorem 2). Ties go to the lower rank.

    Args:
        costs: Work of each matrix, in any unit.
        holders: The ranks that may analyse it, at least one each.
        world: Number of ranks.

    >>> assign_owners([5.0, 4.0, 3.0, 3.0], [range(2)] * 4, 2)
    [0, 1, 1, 0]
    """
    load, owners = [0.0] * world, [0] * len(costs)
    by_load = [(0.0, rank) for rank in range(world)]  # a heap, for where nobody has to be left out
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if len(holders[i]) == world:
            while by_load[0][0] != load[by_load[0][1]]:  # has been given more since
                heapreplace(by_load, (load[by_load[0][1]], by_load[0][1]))
            owners[i] = by_load[0][1]
        else:
            owners[i] = min(holders[i], key=lambda rank: (load[rank], rank))
        load[owners[i]] += costs[i]
    return owners


def rounds(costs: Sequence[float], owners: Sequence[int]) -> list[list[int]]:
    """Numbers of matrices, at most one of each owner in a round, the most expensive of each owner first.

    The matrices of a round are read and analysed at the same time, each by its owner.

    >>> rounds([5.0, 4.0, 3.0, 3.0], [0, 1, 1, 0])
    [[0, 1], [3, 2]]
    """
    queues: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        queues[owners[i]].append(i)
    longest = max(map(len, queues.values()), default=0)
    return [[queues[owner][r] for owner in sorted(queues) if r < len(queues[owner])] for r in range(longest)]

"""Which rank analyses what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ww_monitor.distributed import assign_owners, rounds
from ww_monitor.matrix import Matrix

GPT2_SMALL = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12

LLAMA_70B = [
    *[(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)] * 80,
    *[(128256, 8192)] * 2,
]
"""Hidden 8192, keys and values 1024, feed-forward 28672, 128256 tokens, 80 layers."""


def costs(shapes):
    return [Matrix("", "dense", (1, *shape), None).cost for shape in shapes]


def loads(costs, owners, world):
    return [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(world)]


def imbalance(costs, world):
    found = loads(costs, assign_owners(costs, [range(world)] * len(costs), world), world)
    return max(found) / (sum(found) / world)


def test_gpt2_small_on_four_ranks():
    assert imbalance(costs(GPT2_SMALL), 4) <= 1.1


def test_llama_70b_on_64_ranks():
    assert imbalance(costs(LLAMA_70B), 64) <= 1.2


@st.composite
def hands(draw):
    world = draw(st.integers(1, 6))
    holders = st.sets(st.integers(0, world - 1), min_size=1)
    cards = draw(st.lists(st.tuples(st.floats(0, 1e12), holders), max_size=30))
    return [cost for cost, _ in cards], [held for _, held in cards], world


@given(hands())
def test_each_matrix_goes_to_a_rank_that_holds_it(hand):
    costs, holders, world = hand
    owners = assign_owners(costs, holders, world)
    assert len(owners) == len(costs)
    assert all(owner in held for owner, held in zip(owners, holders, strict=True))


@given(hands())
def test_the_order_of_the_holders_does_not_matter(hand):
    costs, holders, world = hand
    assert assign_owners(costs, [sorted(held, reverse=True) for held in holders], world) == assign_owners(
        costs, holders, world
    )


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=30), st.integers(1, 6))
def test_grahams_bound(costs, world):
    """Largest load ≤ (sum of the others) / world + the last matrix that was dealt to that rank."""
    owners = assign_owners(costs, [range(world)] * len(costs), world)
    found = loads(costs, owners, world)
    last = min(cost for cost, owner in zip(costs, owners, strict=True) if owner == found.index(max(found)))
    assert max(found) <= (sum(costs) - last) / world + last + 1e-6


def test_who_holds_it_alone_analyses_it():
    assert assign_owners([9.0, 1.0, 1.0], [{1}, {1}, {0, 1}], 2) == [1, 1, 0]


@given(hands())
def test_a_round_has_every_owner_once_and_all_rounds_have_every_matrix(hand):
    costs, holders, world = hand
    owners = assign_owners(costs, holders, world)
    found = rounds(costs, owners)
    assert sorted(i for together in found for i in together) == list(range(len(costs)))
    assert all(len({owners[i] for i in together}) == len(together) for together in found)
    assert len(found) == max((owners.count(owner) for owner in set(owners)), default=0)


@given(st.lists(st.floats(0, 1e12), max_size=30), st.integers(1, 6))
def test_matrices_that_all_hold_are_assigned_as_any_others(costs, world):
    """The quick way, for where nobody has to be left out, finds the least loaded rank too."""
    load, expected = [0.0] * world, {}
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        expected[i] = load.index(min(load))
        load[expected[i]] += costs[i]
    assert assign_owners(costs, [range(world)] * len(costs), world) == [expected[i] for i in range(len(costs))]


@pytest.mark.parametrize("world", [1, 3])
def test_nothing_to_assign_owners(world):
    assert assign_owners([], [], world) == []

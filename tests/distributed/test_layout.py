"""Which part of a matrix travels in which blocks, and how parts come to their owner."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ww_monitor.distributed import layout
from ww_monitor.distributed.layout import deliver
from ww_monitor.distributed.shards import add_gram, mirror
from ww_monitor.matrix import Matrix


def parts(shape, axis, sizes):
    """A matrix cut along one axis into parts of these sizes, one a rank."""
    found, start = {}, 0
    for rank, size in enumerate(sizes):
        index = [range(length) for length in shape]
        index[axis] = range(start, start + size)
        found[rank], start = tuple(index), start + size
    return found


@st.composite
def deliveries(draw):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    axis = draw(st.sampled_from([0, 1, 2]))
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 30)), draw(st.integers(1, 30))]
    shape[axis] = sum(sizes)
    matrix = Matrix("w", "dense", tuple(shape), torch.zeros)
    return deliver(matrix, 0, parts(shape, axis, sizes), whole=draw(st.booleans()))


@settings(deadline=None)
@given(deliveries(), st.integers(1, 200))
def test_blocks_are_bounded_and_cover_a_part_once(delivery, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_BLOCK", most)
        for rank, part in delivery.parts.items():
            seen = torch.zeros([len(places) for places in part], dtype=torch.int64)
            for block in delivery.blocks(rank):
                seen[block] += 1
                line = max(seen.shape[1:])
                assert seen[block].numel() <= max(delivery.block_entries, line)
            assert torch.equal(seen, torch.ones_like(seen))


@given(deliveries())
def test_what_is_sent_is_what_the_others_hold(delivery):
    sent = sum(delivery.bytes_sent(rank, 4) for rank in delivery.parts)
    assert sent == 4 * (math.prod(delivery.shape) - math.prod(map(len, delivery.parts[0])))
    assert all(not list(delivery.for_rank(1).blocks(rank)) for rank in delivery.parts if rank != 1)


@pytest.mark.parametrize(
    ("shape", "axis", "short_axis"),
    [
        ((1, 40, 12), 1, 2),
        ((1, 12, 40), 2, 1),
        ((1, 40, 12), 2, None),
        ((1, 12, 40), 1, None),
        ((1, 12, 12), 1, 2),
        ((1, 12, 12), 2, 1),
        ((6, 12, 10), 0, 2),
    ],
)
def test_only_parts_with_the_whole_short_side_are_added(shape, axis, short_axis):
    matrix = Matrix("w", "dense", shape, torch.zeros)
    cut = parts(shape, axis, [shape[axis] // 2, shape[axis] - shape[axis] // 2])
    assert deliver(matrix, 1, cut, whole=False).short_axis == short_axis
    assert deliver(matrix, 1, cut, whole=True).short_axis is None


@settings(deadline=None)  # the first call looks for BLAS
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_that_are_added_one_block_after_the_other_make_the_gram_matrix(n, m, blocks, dtype):
    a = torch.randn(n, m, generator=torch.Generator().manual_seed(n)).to(dtype)
    gram = torch.zeros(m, m, dtype=torch.float64)
    for block in a.chunk(blocks):
        add_gram(gram, block)
        add_gram(gram, block.mT.contiguous().mT)  # a part whose rows lie along the other axis
    mirror(gram, together=5)
    torch.testing.assert_close(gram, 2 * a.double().mT @ a.double(), rtol=1e-12, atol=1e-12)

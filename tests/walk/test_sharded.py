"""The part of a matrix that lies on a rank: parts of all ranks make the matrix that one process would read."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ww_monitor.walk.parts import KERNEL, WHOLE, blocks, each_expert, halves, interleaved_heads
from ww_monitor.walk.sharded import _piece

CUTS = {
    "whole": ((13, 7), WHOLE),
    "blocks of rows": ((24, 5), blocks("qkv", (12, 6, 6))),
    "blocks of columns": ((5, 24), blocks("qkv", (8, 8, 8), 1)),
    "interleaved heads": ((32, 5), interleaved_heads(4, 2, 4)),
    "kernel": ((6, 5, 3, 2), KERNEL),
    "experts": ((3, 8, 5), tuple(each_expert(WHOLE, 3))),
    "pooled experts": ((3, 8, 5), WHOLE),
    "alternating halves": ((3, 8, 5), tuple(each_expert(halves(8, 1, alternate=True), 3))),
    "one row": ((1, 9), WHOLE),
}


class Shard:
    """As much of a DTensor as is read: a box of a tensor, with where it lies."""

    def __init__(self, whole, box):
        self.local = whole[tuple(slice(start, stop) for start, stop in box)]
        self.box = box
        self.dtype = whole.dtype
        self.placements = ()
        self.device_mesh = SimpleNamespace(device_type="cpu")

    def __create_chunk_list__(self):
        return [SimpleNamespace(offsets=[a for a, _ in self.box], sizes=[b - a for a, b in self.box])]

    def detach(self):
        return self

    def to_local(self):
        return self.local


@st.composite
def boxes(draw, shape):
    """The tensor cut along one or two dimensions at any places, so that parts may be empty."""
    found = [[(0, size) for size in shape]]
    for dim in draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=2, unique=True)):
        ends = [0, *sorted(draw(st.lists(st.integers(0, shape[dim]), max_size=3))), shape[dim]]
        found = [[*box[:dim], (start, stop), *box[dim + 1 :]] for box in found for start, stop in pairwise(ends)]
    return found


@pytest.mark.parametrize("cut", CUTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pieces_make_the_matrix(cut, data):
    shape, parts = CUTS[cut]
    whole = torch.randn(shape)
    layout = data.draw(boxes(shape))
    for part in parts:
        expected = part.stack(whole)
        found = torch.full_like(expected, float("nan"))
        for box in layout:
            piece = _piece(Shard(whole, box), part.stack, shape)
            grid = [torch.tensor(list(places), dtype=torch.long) for places in piece.index]
            found[grid[0][:, None, None], grid[1][None, :, None], grid[2][None, None]] = piece.load()
        assert torch.equal(found, expected)


def test_a_block_as_stored_is_read_in_place():
    whole = torch.randn(8, 5)
    piece = _piece(Shard(whole, [(2, 6), (0, 5)]), WHOLE[0].stack, (8, 5))
    assert piece.index == (range(1), range(2, 6), range(5))
    assert piece.load().data_ptr() == whole[2:].data_ptr()

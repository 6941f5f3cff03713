"""The row of a frozen matrix is kept while its weights are the same, to the bit."""

import pytest
import torch
from torch import nn

from tests.matrices import normal
from ww_monitor.matrix import Matrix
from ww_monitor.monitor.frozen import FrozenRowCache, checksum
from ww_monitor.record import Layer
from ww_monitor.walk.torch import walk


def matrix(weights, *, name="fc", frozen=True):
    return Matrix(name, "dense", tuple(weights.shape), lambda: weights, frozen=frozen)


ROW = Layer("fc", "dense", (1, 8, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_row_holds_until_one_bit_changes(dtype):
    weights, kept = normal(1, 8, 6, dtype=dtype), FrozenRowCache()
    checked = kept.check([matrix(weights)])
    assert checked.rows == {}
    kept.keep(checked, [ROW])
    assert kept.check([matrix(weights)]).rows == {"fc": ROW}
    bits = weights.view(torch.uint8)
    bits[0, 3, 1] ^= 1
    assert kept.check([matrix(weights)]).rows == {}


def test_two_entries_that_change_places_are_noticed():
    weights = normal(1, 8, 6)
    before = checksum(weights).tolist()
    weights[0, 0, :2] = weights[0, 0, :2].flip(0)
    assert checksum(weights).tolist() != before


def test_what_is_trained_is_never_kept():
    weights, kept = normal(1, 8, 6), FrozenRowCache()
    checked = kept.check([matrix(weights, frozen=False)])
    kept.keep(checked, [ROW])
    assert kept.check([matrix(weights, frozen=False)]).rows == {}


def test_a_matrix_that_cannot_be_read_is_left_to_the_analysis():
    def load():
        raise OSError("gone")

    kept = FrozenRowCache()
    kept.keep(kept.check([matrix(normal(1, 8, 6))]), [ROW])
    assert kept.check([Matrix("fc", "dense", (1, 8, 6), load, frozen=True)]).rows == {}


def test_a_layout_does_not_matter_nor_is_the_tensor_touched():
    weights = normal(1, 6, 8).mT
    assert checksum(weights).tolist() == checksum(weights.contiguous()).tolist()
    assert not weights.is_contiguous()


def test_the_walker_says_what_is_frozen():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].requires_grad_(False)
    net[2].weight.requires_grad_(False)
    assert [item.frozen for item in walk(net)] == [False, True, False]

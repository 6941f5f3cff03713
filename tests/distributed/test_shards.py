"""What arrives at the owner is the matrix, or its Gram matrix, on the host and on a GPU."""

from types import SimpleNamespace

import pytest
import torch

from tests.distributed.test_layout import parts
from ww_monitor.distributed.layout import deliver
from ww_monitor.distributed.shards import Shipment
from ww_monitor.matrix import Matrix, Piece, Shards

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def arrived(weights, axis, sizes, *, whole=False, broken=None):
    """Two or more ranks in one process, of which the last is the owner; with what each could not do."""
    index = parts(weights.shape, axis, sizes)
    matrix = Matrix("fc", "dense", tuple(weights.shape), torch.zeros)
    delivery = deliver(matrix, len(sizes) - 1, index, whole=whole)
    mesh = SimpleNamespace(device_type=weights.device.type)
    sides = []
    for rank, part in index.items():
        load = (lambda: 1 / 0) if rank == broken else (lambda p=part: weights[p[0]][:, p[1]][:, :, p[2]])
        piece = Piece(part, load, weights.dtype, mesh, (0,))
        shards = Shards(tuple(index), piece)
        held = Matrix("fc", "dense", matrix.shape, torch.zeros, shards=shards)
        sides.append(Shipment(held, delivery.for_rank(rank), rank))
    owner = sides[-1]
    owner.begin()
    for side in sides[:-1]:
        for (places, block), (expected, room) in zip(side.outgoing(), owner.incoming(side.rank), strict=True):
            assert (places, block.shape, block.dtype) == (expected, room.shape, room.dtype)
            owner.add(side.rank, places, block)
    return owner.end(), [side.error for side in sides]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "axis"), [((2, 700, 600), 1), ((2, 600, 700), 2), ((3, 60, 50), 0)])
def test_parts_with_the_whole_short_side_make_the_gram_matrix(shape, axis, dtype, device):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    sizes = [1, shape[axis] - 1] if axis == 0 else [3, 200, shape[axis] - 203]
    found, _ = arrived(weights, axis, sizes)
    tall = weights.double() if shape[1] >= shape[2] else weights.double().mT
    torch.testing.assert_close(found, tall.mT @ tall, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("axis", "whole"), [(1, False), (2, True), (0, True)])
def test_other_parts_make_the_matrix(axis, whole, device):
    weights = torch.randn((3, 600, 700), generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    found, _ = arrived(weights, axis, [1, weights.shape[axis] - 1], whole=whole)
    assert torch.equal(found, weights)


def test_who_cannot_read_its_part_sends_nan_and_says_so():
    weights = torch.randn((1, 80, 20), generator=torch.Generator().manual_seed(0))
    found, errors = arrived(weights, 1, [30, 20, 30], broken=1)
    assert found.isnan().all()
    assert errors == ["", "ZeroDivisionError: division by zero", ""]

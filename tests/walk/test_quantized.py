"""Quantised weights are dequantised where their class offers it, and left out with a reason elsewhere."""

import pytest
import torch
from torch import nn

from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.torch import walk


class Rounded(torch.Tensor):
    """A weight in int8 that behaves as one in float32, in the style of torchao."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __repr__(self):
        return "Rounded()"

    def dequantize(self):
        return self.values.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Rounded(args[0].values, args[0].scale)
        raise NotImplementedError(f"{function} of packed values")


class Packed(nn.Linear):
    """A layer of four-bit integers in the style of bitsandbytes, which unpacks its weight on request."""

    def __init__(self):
        super().__init__(6, 8)
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(24, 1, dtype=torch.uint8), requires_grad=False)

    def dequantize(self):
        self.calls += 1
        return torch.full((8, 6), 0.5)


class Bare(nn.Module):
    """A quantised layer that is no Linear and keeps its integers as `W_q`."""

    def __init__(self):
        super().__init__()
        self.W_q = nn.Parameter(torch.ones(24, 1, dtype=torch.uint8), requires_grad=False)

    def dequantize(self):
        return torch.full((8, 6), 0.25)


def walked(module):
    (item,) = walk(nn.ModuleDict({"box": module}))
    return item


def test_tensor_class():
    """A tensor class with `dequantize` gives the numbers it stands for."""
    layer = nn.Linear(6, 8)
    layer.weight = nn.Parameter(Rounded(torch.randint(-9, 9, (8, 6), dtype=torch.int8), 0.1), requires_grad=False)
    matrix = walked(layer)
    assert (matrix.name, matrix.kind, matrix.shape) == ("box", "dense", (1, 8, 6))
    assert torch.equal(matrix.load()[0], layer.weight.values.float() * 0.1)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, but models with it exist
def test_torch_quantised_tensor():
    """The quantised tensors of torch itself are dequantised."""
    layer = nn.Linear(6, 8)
    del layer.weight
    layer.weight = torch.quantize_per_tensor(torch.randn(8, 6), 0.1, 0, torch.qint8)
    assert torch.equal(walked(layer).load()[0], layer.weight.dequantize())


def test_module():
    """A layer of integers that offers `dequantize` is announced with its logical shape and unpacked by load only."""
    layer = Packed()
    matrix = walked(layer)
    assert matrix.shape == (1, 8, 6)
    assert layer.calls == 0
    assert torch.equal(matrix.load(), torch.full((1, 8, 6), 0.5))


def test_module_that_is_no_linear():
    """The integers of an unknown module that offers `dequantize` are a dense matrix under the module's name."""
    matrix = walked(Bare())
    assert (matrix.name, matrix.kind) == ("box", "dense")
    assert torch.equal(matrix.load(), torch.full((1, 8, 6), 0.25))


def test_integers_alone():
    """Integers that nobody offers to dequantise are left out."""
    layer = nn.Linear(6, 8)
    layer.weight = nn.Parameter(torch.ones(8, 6, dtype=torch.int8), requires_grad=False)
    item = walked(layer)
    assert isinstance(item, Skipped)
    assert item.reason == "integer weights"


def test_a_layer_that_can_do_both():
    """`dequantize` of a module counts only while its weight is packed."""
    layer = Packed()
    layer.weight = nn.Parameter(torch.randn(8, 6))
    matrix = walked(layer)
    assert isinstance(matrix, Matrix)
    assert torch.equal(matrix.load()[0], layer.weight)
    assert layer.calls == 0


def test_a_broken_dequantize(monkeypatch):
    """A layer whose unpacking fails while its shape is asked for costs itself only."""
    monkeypatch.setattr(Bare, "dequantize", lambda self: 1 / 0)
    items = list(walk(nn.ModuleDict({"bad": Bare(), "good": nn.Linear(4, 4)})))
    assert [type(item) for item in items] == [Skipped, Matrix]
    assert "ZeroDivisionError" in items[0].reason

"""Models whose weights lie in shards in every awkward way, built alike on every rank and in the test's own process."""

import torch
from torch import nn


class Experts(nn.Module):
    """Three stacked experts, with their gate and up projections in one tensor."""

    def __init__(self, width=12, inner=10):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.1 * torch.randn(3, 2 * inner, width))
        self.down_proj = nn.Parameter(0.1 * torch.randn(3, width, inner))


class Net(nn.Module):
    """Tied and frozen weights, fewer rows than ranks, cuts across shards, kernels, and each cause to read weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(90, 24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.tall = nn.Linear(40, 50)
        self.wide = nn.Linear(50, 40)
        self.square = nn.Linear(40, 40)
        self.few_rows = nn.Linear(40, 3)
        self.conv = nn.Conv2d(10, 12, 3)
        self.experts = Experts()
        self.frozen = nn.Linear(30, 30).requires_grad_(False)
        self.trap = nn.Linear(40, 64)
        self.wide_trap = nn.Linear(64, 40)
        self.pruned = nn.Linear(30, 64)
        self.zero = nn.Linear(20, 30)
        self.broken = nn.Linear(20, 30)
        self.head = nn.Linear(24, 90, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.trap.weight[3, 4] = 3.0
            self.wide_trap.weight[5, 6] = 3.0
            self.pruned.weight[10:14] = 0.0
            self.zero.weight.zero_()
            self.broken.weight[2, 2] = float("nan")

    def forward(self, x):
        return self.head(self.embedding(x))


class Chain(nn.Module):
    """Layers for a colwise and a rowwise split each, and one that stays whole."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.up = nn.Linear(32, 72)
        self.down = nn.Linear(72, 32)
        self.norm = nn.LayerNorm(32)
        self.plain = nn.Linear(32, 48)

    def forward(self, x):
        return self.plain(self.norm(self.down(self.up(self.embedding(x)))))


class Large(nn.Module):
    """Parts of several blocks: a tall and a wide matrix, a square one, and stacked experts."""

    def __init__(self):
        super().__init__()
        self.tall = nn.Linear(384, 3000, bias=False)
        self.wide = nn.Linear(3000, 384, bias=False)
        self.square = nn.Linear(402, 402, bias=False)
        self.experts = Experts(640, 320)

    def forward(self, x):
        return self.wide(self.tall(x))


def large():
    """The same numbers wherever it is called."""
    torch.manual_seed(2)
    return Large()


def net():
    """The same numbers wherever it is called."""
    torch.manual_seed(0)
    return Net()


def chain():
    """The same numbers wherever it is called."""
    torch.manual_seed(1)
    return Chain()

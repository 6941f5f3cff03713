"""What the monitor costs a training run: the same steps with it and without, in interleaved pairs.

`make bench-overhead` trains where torch can: on a CUDA device GPT-2 small in bf16, for about nine minutes, which
writes the section "overhead-gpu" of benchmarks/RESULTS.md, with throughput and peak memory; else small networks on two
threads of the CPU, for about 25 minutes, which writes "overhead". `--device` chooses. `--quick` runs the same code for
some seconds and writes nothing; `--only gpt-sync` runs some rows and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from benchmarks import table
from benchmarks.nets import Step, cnn_on_patterns, gpt2_in_bf16, gpt_on_bytes
from benchmarks.table import Bound, number, verdict
from benchmarks.training import Options, Run, in_loop

THREADS = 2
CALIBRATION_STEPS = 20

SECONDS = {"cpu": 40.0, "cuda": 20.0}
"""Of a run."""


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
    options: Options
    most_lost: Bound | None


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


def measure(row: Row, *, seconds: float, pairs: int) -> Measured:
    """Runs of about so many seconds, in the order A B B A …, after one of each to warm up."""
    in_loop(row.build, CALIBRATION_STEPS, row.options)
    each = in_loop(row.build, CALIBRATION_STEPS, None).seconds / CALIBRATION_STEPS
    result = Measured(row, max(CALIBRATION_STEPS, round(seconds / each)))
    for options, runs in in_turns(result, pairs):
        runs.append(in_loop(row.build, result.steps, options))
    return result


def in_turns(result: Measured, pairs: int) -> Iterator[tuple[Options | None, list[Run]]]:
    """Without and with, then with and without, and so on."""
    both: list[tuple[Options | None, list[Run]]] = [
        (None, result.without),
        (result.row.options, result.monitored),
    ]
    for pair in range(pairs):
        yield from both if pair % 2 == 0 else reversed(both)


# --- what is measured, and how it is said

SYNC: Options = {"max_overhead": 0.02}
ASYNC: Options = {"max_overhead": 0.02, "mode": "async"}


def on_host() -> dict[str, Row]:
    """The rows of the section "overhead"."""
    runs = {
        "gpt": ("GPT, 4 blocks of 256, 16 × 128 bytes, AdamW", gpt_on_bytes),
        "cnn": ("CNN, 6 convolutions, SGD", cnn_on_patterns),
    }
    ways = {"sync": ("sync", SYNC), "async": ("async", ASYNC)}
    return {
        f"{run}-{way}": Row(title, build, how, options, Bound(most=3, unit=" %"))
        for run, (title, build) in runs.items()
        for way, (how, options) in ways.items()
    }


def on_device(device: torch.device) -> dict[str, Row]:
    """Those of "overhead-gpu"."""
    each, build = {"every_n_steps": 100}, partial(gpt2_in_bf16, device)
    ways: dict[str, tuple[str, Options, Bound | None]] = {
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
        "cnn-sync": Row("tiny CNN", partial(cnn_on_patterns, width=8, batch=8), "sync", SYNC, None),
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

ON_GPU_HEAD = ("steps a second, without → with", "peak device memory, without → with")
"""More columns: a card may be named by its absolute figures."""


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


def cells_on_gpu(found: Measured) -> list[str]:
    """The same line with those under `ON_GPU_HEAD`."""
    sides = (found.without, found.monitored)
    rates = [number(statistics.median(run.steps / run.seconds for run in runs)) for runs in sides]
    peaks = [f"{max(run.peak for run in runs) / 2**30:.2f}" for runs in sides]
    return [*cells(found), " → ".join(rates), f"{' → '.join(peaks)} GiB"]


INTRODUCTION = """\
## What it costs a training run{where} (`make bench-overhead`)

{machine}.

The same steps with the monitor and without, in turns (A B B A …), about {seconds} s a run: the median of {pairs} pairs'
lost share, (with − without) / with. A run with the monitor has everything in it: the analysis before the first step,
those that the budget plans, and the analysis at the end, for which it waits. One short run of each kind goes before, so
that imports and first calls are not in it. By its own count the monitor lost the time that training stood still for it
or was slower beside it. "Same loss" says whether the last loss is the same in all runs, bit for bit."""

ON_A_GPU = " on a GPU"

ON_GPU = " Losing at most 2 % is a throughput of at least 0.98 of that without; kernels on a GPU may add in any order."


def section(found: Sequence[Measured], device: torch.device, *, seconds: float, pairs: int) -> str:
    """The Markdown between the markers."""
    on_gpu = device.type == "cuda"
    machine = f"{table.card(device)}; host: {table.machine()}" if on_gpu else table.machine()
    said = INTRODUCTION.format(where=ON_A_GPU if on_gpu else "", machine=machine, pairs=pairs, seconds=number(seconds))
    rows = map(cells_on_gpu if on_gpu else cells, found)
    head = (*HEAD, *ON_GPU_HEAD) if on_gpu else HEAD
    return f"{said}{ON_GPU if on_gpu else ''}\n\n{table.markdown(head, rows)}"


NOT_MEASURED = """\
## What it costs a training run on a GPU (`make bench-overhead`)

Not measured."""


def write(text: str, device: torch.device) -> None:
    table.write_section("overhead" if device.type == "cpu" else "overhead-gpu", text)
    if "<!-- overhead-gpu: begin -->" not in table.RESULTS.read_text(encoding="utf-8"):
        table.write_section("overhead-gpu", NOT_MEASURED)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is one"
    )
    parser.add_argument("--seconds", type=float, help="of a run; default 40 on the CPU, 20 on a GPU")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="some seconds in all; writes nothing")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="such as gpt-sync; writes nothing")
    options = parser.parse_args(arguments)
    found_one = torch.cuda.is_available()
    device = torch.device(options.device if options.device != "auto" else "cuda" if found_one else "cpu")
    if device.type == "cuda" and not found_one:
        print(f"not measured: torch {torch.__version__} finds no CUDA device here")
        return
    if device.type == "cpu":
        torch.set_num_threads(THREADS)
    full = on_host() if device.type == "cpu" else on_device(device)
    rows = tiny(device) if options.quick else full
    if options.only and set(options.only) - set(rows):
        parser.error(f"--only: expected some of {', '.join(rows)}; got {' '.join(options.only)}")
    seconds, pairs = (0.1, 1) if options.quick else (options.seconds or SECONDS[device.type], options.pairs)
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

"""What an analysis costs on a GPU: milliseconds, beside the bare solver of the same run, and what it costs a training.

`make bench-gpu` is ready within six minutes and writes benchmarks/gpu.json, every row with all its rounds, and the
section "gpu" of benchmarks/RESULTS.md; without a CUDA device it says so and writes nothing. `--weightwatcher` adds
weightwatcher on the same machine, which takes minutes more. `--device cpu` runs the same code on tiny matrices, to try
it out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

import ww_monitor
from benchmarks import gpu_training, rivals, shapes, solvers, table
from benchmarks.cases import shuffled_layers
from benchmarks.solvers import Alone, Solver
from benchmarks.table import Bound, number, verdict
from benchmarks.training import peak, started, synchronize
from ww_monitor.record import Snapshot

ROUNDS = {"least": 3, "most": 15}
SECONDS = {"cases": 190.0, "training": 130.0}
"""Of the six minutes; the rest is for the start, the making of the weights, and rows slower than their share."""

JSON = Path(__file__).parent / "gpu.json"

INTRODUCTION = """\
## What it costs on a GPU (`make bench-gpu`)

{card}; host: {machine}; {date}.

Medians of {least} to {most} rounds after one or two to warm up, a new seed each. "Ours" is the wall time of
`ww_monitor.analyze(model)` with every standard metric, the weights on the device, from one synchronisation to the next;
the host's share is in it. Rows with Student t elements (4 degrees of freedom) have their layers shuffled. The solver
alone is the float64 Gram matrices and their eigenvalues in the same run: a loop of `torch.linalg.eigvalsh`, and batches
by {batched}. Its better branch is one batch up to a short side of {always}, and above a batch from {several} matrices
on, else the loop; "≤ 1.45×" of it is what counts on a card of another speed. The bounds in ms are for an H100."""

NOT_ON_A_GPU = "Tiny matrices on the CPU: no figure here counts"

HEAD = (
    "matrices", "ours, ms (range)", "required", "held?", "solver, loop, ms", "solver, batches, ms",
    "ours ÷ better branch", "required", "held?", "peak above the weights, MiB", "layers shuffled", "solved on",
    "not ok",
)  # fmt: skip
PEER_HEAD = ("weightwatcher ÷ ours",)


@dataclass(frozen=True)
class Case:
    """Matrices, and what must hold for them.

    Attributes:
        title: What the table calls them.
        build: Makes a model of them on the host.
        plain: Most ms of an analysis.
        heavy: The same with Student t elements; without it they are not measured.
        ratio: Of the plain analysis to the solver alone; the small cases, which cost latency, have none.
    """

    title: str
    build: Callable[[], torch.nn.Module]
    plain: Bound | None = None
    heavy: Bound | None = None
    ratio: Bound | None = None


def full_size() -> dict[str, Case]:
    ms, ratio = (lambda most: Bound(most=most, unit=" ms")), Bound(most=1.45)
    return {
        "gpt2": Case("GPT-2 small, 48 matrices", shapes.gpt2_small, ms(110), ms(250), ratio),
        "resnet18": Case("ResNet-18, 197 slices", shapes.resnet18, ms(110), None, ratio),
        "1024": Case("12 × 1024²", partial(shapes.square, 1024, count=12), ms(115), ms(180), ratio),
        "4096": Case("one 4096²", partial(shapes.square, 4096), ms(125), ms(160), ratio),
        "llama": Case("Llama-3-8B, one block", shapes.llama_block, ms(650), ms(900), ratio),
        "small": Case("a small GPT, 16 matrices of 256", partial(shapes.gpt2_small, blocks=4, width=256), ms(30)),
        "mlp": Case("an MLP, 784-300-100-10", partial(shapes.mlp, 784, 300, 100, 10), ms(8)),
    }


def small() -> dict[str, Case]:
    """The same with tiny matrices, for which the bounds were not meant."""
    builds: dict[str, tuple[str, Callable[[], torch.nn.Module]]] = {
        "gpt2": ("8 matrices of 64", partial(shapes.gpt2_small, blocks=2, width=64)),
        "resnet18": ("tiny ResNet", partial(shapes.resnet18, width=8, classes=20)),
        "1024": ("3 × 48²", partial(shapes.square, 48, count=3)),
        "4096": ("one 96²", partial(shapes.square, 96)),
        "llama": ("tiny Llama block", partial(shapes.llama_block, width=64)),
        "small": ("4 matrices of 32", partial(shapes.gpt2_small, blocks=1, width=32)),
        "mlp": ("an MLP, 40-20-10", partial(shapes.mlp, 40, 20, 10)),
    }
    return {name: replace(case, title=builds[name][0], build=builds[name][1]) for name, case in full_size().items()}


@dataclass(frozen=True)
class Measured:
    """A row of the table.

    Attributes:
        title: The case, and which elements it has.
        ours: Milliseconds a round.
        alone: The solver, by short side.
        most: What `ours` must hold.
        most_ratio: What `ratio` must hold.
        peak: Most bytes on the device above the weights, over all rounds; 0 on the host.
        shuffled: How many layers of how many.
        solved_on: Layers by what solved them.
        failed: Layers whose status is not ok.
        peer: Milliseconds of weightwatcher.
    """

    title: str
    ours: list[float]
    alone: list[Alone]
    most: Bound | None
    most_ratio: Bound | None
    peak: int
    shuffled: str
    solved_on: dict[str, int]
    failed: int
    peer: float | None

    @property
    def ms(self) -> float:
        return statistics.median(self.ours)

    @property
    def loop(self) -> float:
        return sum(statistics.median(one.loop) for one in self.alone)

    @property
    def batch(self) -> float | None:
        """Nothing where nothing solves batches."""
        if not all(one.batch for one in self.alone):
            return None
        return sum(statistics.median(one.batch) for one in self.alone)

    @property
    def ratio(self) -> float:
        return self.ms / sum(one.better for one in self.alone)


def timed(run: Callable[[], object], device: torch.device, *, seconds: float) -> list[float]:
    """Milliseconds a round, for about so many seconds: at least three rounds, after one or two to warm up."""
    first = _wall_ms(run, device)
    if first < 1000:
        _wall_ms(run, device)
    each: list[float] = []
    end = time.perf_counter() + seconds
    while len(each) < ROUNDS["least"] or (len(each) < ROUNDS["most"] and time.perf_counter() < end):
        each.append(_wall_ms(run, device))
    return each


def _wall_ms(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def measure(
    case: Case, device: torch.device, batched: Solver | None, *, heavy: bool, seconds: float, peer: bool
) -> Measured:
    model = shapes.heavy_tailed(case.build()) if heavy else case.build()
    their_ms = _peer_ms(model, heavy=heavy) if peer else None
    model = model.to(device)
    snapshots: list[Snapshot] = []

    def analyze() -> None:
        snapshots.append(ww_monitor.analyze(model, seed=len(snapshots)))

    started(device)
    weights = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    ours = timed(analyze, device, seconds=seconds / 2)
    most_bytes = peak(device) - weights
    last = snapshots[-1]
    return Measured(
        f"{case.title}, {'Student t' if heavy else 'plain'}",
        ours,
        alone(model, device, batched, seconds=seconds / 2),
        case.heavy if heavy else case.plain,
        None if heavy else case.ratio,
        most_bytes,
        shuffled_layers(last),
        dict(Counter(str(getattr(layer, "solved_on", "not said")) for layer in last.layers)),
        sum(layer.status != "ok" for layer in last.layers),
        their_ms,
    )


def alone(model: torch.nn.Module, device: torch.device, batched: Solver | None, *, seconds: float) -> list[Alone]:
    """The solver, both ways, by short side."""
    found = []
    made = solvers.grams(model)
    for side, gram in made.items():
        share = seconds / len(made) / (2 if batched else 1)
        in_a_loop = timed(lambda gram=gram: solvers.loop(gram()), device, seconds=share)  # type: ignore[misc]
        in_batches: list[float] = []
        if batched is not None:
            run = partial(lambda make, solve: solvers.in_batches(solve, make()), gram, batched)
            in_batches = timed(run, device, seconds=share)
        found.append(Alone(side, len(gram()), in_a_loop, in_batches))
    return found


def _peer_ms(model: torch.nn.Module, *, heavy: bool) -> float | None:
    """One run, the model on the host and the device there to use."""
    if not rivals.has_weightwatcher():
        return None
    options = rivals.FULL if heavy else {}
    return _wall_ms(lambda: rivals.weightwatcher(model, **options), torch.device("cpu"))


def cells(found: Measured, *, peer: bool) -> list[str]:
    """A line under `HEAD`."""
    line = [
        found.title,
        f"{number(found.ms)} ({number(min(found.ours))}–{number(max(found.ours))})",
        *verdict(found.most, found.ms),
        number(found.loop),
        "not measured" if found.batch is None else number(found.batch),
        number(found.ratio),
        *verdict(found.most_ratio, found.ratio),
        number(found.peak / 2**20),
        found.shuffled,
        ", ".join(f"{where} ({count})" for where, count in found.solved_on.items()),
        str(found.failed),
    ]
    return [*line, "not measured" if found.peer is None else number(found.peer / found.ms)] if peer else line


def record(found: Sequence[Measured], training: Sequence[gpu_training.Trained], facts: dict[str, str]) -> str:
    """Everything as JSON: what the table says, and every round."""
    rows = [
        asdict(one)
        | {
            "most": one.most and str(one.most),
            "most_ratio": one.most_ratio and str(one.most_ratio),
            "median": one.ms, "loop": one.loop, "batch": one.batch, "ratio": one.ratio,
        }
        for one in found
    ]  # fmt: skip
    said = {**facts, "rows": rows, "training": [one.as_plain_data() for one in training]}
    return json.dumps(said, indent=1, ensure_ascii=False) + "\n"


def section(
    found: Sequence[Measured],
    training: Sequence[gpu_training.Trained],
    facts: dict[str, str],
    device: torch.device,
    *,
    peer: bool,
) -> str:
    """The Markdown between the markers."""
    said = INTRODUCTION.format(
        card=table.card(device) if device.type == "cuda" else NOT_ON_A_GPU,
        **{name: facts[name] for name in ("date", "machine", "batched")},
        **ROUNDS, always=solvers.ALWAYS_BATCHED, several=solvers.BATCHED_FROM,
    )  # fmt: skip
    parts = [said, table.markdown((*HEAD, *PEER_HEAD) if peer else HEAD, [cells(one, peer=peer) for one in found])]
    if training:
        head = table.markdown(gpu_training.HEAD, [one.cells() for one in training])
        parts += [gpu_training.INTRODUCTION.format(steps=training[0].steps), head]
    return "\n\n".join(parts)


def measured_cases(
    chosen: dict[str, Case], device: torch.device, batched: Solver | None, *, seconds: float, peer: bool
) -> list[Measured]:
    """Every row, each with an equal share of the seconds that are left."""
    rows = [(case, heavy) for case in chosen.values() for heavy in (False, True) if case.heavy or not heavy]
    start, found = time.perf_counter(), []
    for position, (case, heavy) in enumerate(rows):
        left = seconds - (time.perf_counter() - start)
        share = max(0.0, left / (len(rows) - position))
        found.append(measure(case, device, batched, heavy=heavy, seconds=share, peer=peer))
        print(f"[{time.perf_counter() - start:6.1f} s] {' | '.join(cells(found[-1], peer=peer))}", flush=True)
    return found


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script with tiny matrices")
    parser.add_argument("--seconds", type=float, default=SECONDS["cases"], help="for the analyses; default %(default)g")
    parser.add_argument("--only", nargs="+", choices=(*full_size(), "training"), help="some rows; nothing is written")
    parser.add_argument("--weightwatcher", action="store_true", help="run it too, which takes minutes")
    parser.add_argument("--folder", type=Path, help="where gpu.json and RESULTS.md are written; default benchmarks/")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print(f"not measured: torch {torch.__version__} finds no CUDA device here (--device cpu tries the script out)")
        return
    way, batched = solvers.batched_solver(device)
    now = datetime.now(timezone.utc)
    facts = {**table.card_facts(device), "machine": table.machine(), "date": f"{now:%Y-%m-%d}", "batched": way}
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    wanted = set(options.only or (*full_size(), "training"))
    chosen = {name: case for name, case in (full_size() if on_gpu else small()).items() if name in wanted}
    found = measured_cases(chosen, device, batched, seconds=options.seconds, peer=options.weightwatcher)
    training = gpu_training.measure(device, seconds=SECONDS["training"]) if "training" in wanted else []
    text = section(found, training, facts, device, peer=options.weightwatcher)
    print(f"\n{text}")
    if options.folder or (on_gpu and not options.only):
        folder = options.folder or JSON.parent
        (folder / JSON.name).write_text(record(found, training, facts), encoding="utf-8")
        table.write_section("gpu", text, folder / table.RESULTS.name)


if __name__ == "__main__":
    main()

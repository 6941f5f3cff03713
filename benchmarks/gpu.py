"""What an analysis costs on a GPU: milliseconds, against weightwatcher on the same machine, against the looped solver.

`make bench-gpu` takes some minutes, nearly all of them weightwatcher's, and writes its section of
benchmarks/RESULTS.md; without a CUDA device it says so and writes nothing. `--device cpu` runs the same code on tiny
matrices, to try it out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import ww_monitor
from benchmarks import rivals, shapes, table
from benchmarks.cases import shuffled_layers
from benchmarks.table import Bound, number, verdict
from ww_monitor.record import Snapshot
from ww_monitor.spectra.eigenvalues import solve_batched

WARM_UP = 2

INTRODUCTION = """\
## What it costs on a GPU (`make bench-gpu`)

{device}; host: {machine}.

Medians of {rounds} rounds after {warm_up} to warm up. "Ours" is the wall time of `ww_monitor.analyze(model)` with every
standard metric, the weights on the device, from one synchronisation to the next; the host's share is in it. The solver
is the float64 Gram matrices and their eigenvalues alone, timed by CUDA events: in batches as the analysis runs it, and
`torch.linalg.eigvalsh` in a loop. weightwatcher 0.7.7 (one round) gets the model on the host and the device to use; it
runs with `randomize`, `mp_fit` and `detX` in the rows with traps. Those have Student t elements (4 degrees of freedom),
so that layers are shuffled, with a new seed each round. The last column compares alpha with the host's."""

HEAD = (
    "matrices", "ours, ms (range)", "required", "held?", "weightwatcher ÷ ours", "required", "held?",
    "solver in batches, ms", "looped ÷ batched", "required", "held?", "layers shuffled", "not ok", "alpha, worst",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Matrices, and what must hold for a plain and for a full analysis of them."""

    title: str
    build: Callable[[], torch.nn.Module]
    milliseconds: Bound | None = None
    looped: Bound | None = None
    peer_full: bool = True


def full_size() -> dict[str, Case]:
    ms = partial(Bound, unit=" ms")
    return {
        "gpt2": Case("48 × 768 (GPT-2 small)", shapes.gpt2_small, ms(most=60), Bound(least=5)),
        "1024": Case("12 × 1024²", partial(shapes.square, 1024, count=12), ms(most=60), Bound(least=5)),
        "4096": Case("one 4096²", partial(shapes.square, 4096), ms(most=200)),
        "llama": Case("Llama-3-8B, one block", shapes.llama_block, peer_full=False),
    }


def small() -> dict[str, Case]:
    """The same with tiny matrices."""
    return {
        "gpt2": Case("8 × 64", partial(shapes.gpt2_small, blocks=2, width=64)),
        "1024": Case("3 × 48²", partial(shapes.square, 48, count=3)),
        "4096": Case("one 96²", partial(shapes.square, 96)),
        "llama": Case("tiny Llama block", partial(shapes.llama_block, width=64), peer_full=False),
    }


PEER_BOUNDS = {False: Bound(least=20), True: Bound(least=100)}
"""By whether traps are in."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_ms(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def device_ms(run: Callable[[], object], device: torch.device) -> float:
    """Between two CUDA events on the current stream; elsewhere the wall time."""
    if device.type != "cuda":
        return wall_ms(run, device)
    synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    synchronize(device)
    return float(start.elapsed_time(end))


def median_ms(run: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    each = [device_ms(run, device) for _ in range(WARM_UP + rounds)]
    return statistics.median(each[WARM_UP:])


def batched(model: torch.nn.Module) -> None:
    """One batch a short side."""
    groups: dict[int, list[torch.Tensor]] = defaultdict(list)
    for matrix in rivals.matrices_of(model):
        groups[matrix.short_side].append(matrix.load())
    for stacks in groups.values():
        solve_batched(stacks)


def looped(model: torch.nn.Module) -> None:
    """One solve a matrix."""
    with torch.no_grad():
        for matrix in rivals.matrices_of(model):
            for w in matrix.load():
                a = (w if w.shape[0] >= w.shape[1] else w.mT).double()
                torch.linalg.eigvalsh(a.mT @ a)


def rows(case: Case, device: torch.device, *, rounds: int, peer: bool, bounded: bool) -> list[list[str]]:
    """The case without traps and with them."""
    plain = row(case, case.build(), device, traps=False, rounds=rounds, peer=peer, bounded=bounded)
    model = shapes.heavy_tailed(case.build())
    full = row(case, model, device, traps=True, rounds=rounds, peer=peer and case.peer_full, bounded=bounded)
    return [plain, full]


def row(
    case: Case, model: torch.nn.Module, device: torch.device, *, traps: bool, rounds: int, peer: bool, bounded: bool
) -> list[str]:
    on_host = ww_monitor.analyze(model)
    their_ms = _peer_ms(model, traps=traps) if peer else None
    model = model.to(device)
    snapshots: list[Snapshot] = []
    each = [
        wall_ms(lambda seed=seed: snapshots.append(ww_monitor.analyze(model, seed=seed)), device)  # type: ignore[misc]
        for seed in range(WARM_UP + rounds)
    ][WARM_UP:]
    ours = statistics.median(each)
    in_batches = median_ms(partial(batched, model), device, rounds=rounds)
    ratio = median_ms(partial(looped, model), device, rounds=min(rounds, 3)) / in_batches
    their_ratio = None if their_ms is None else their_ms / ours
    bound_ms, bound_loop = (case.milliseconds, case.looped) if bounded and not traps else (None, None)
    return [
        f"{case.title}, {'with traps and MP spikes' if traps else 'plain'}",
        f"{number(ours)} ({number(min(each))}–{number(max(each))})",
        *verdict(bound_ms, ours),
        "" if their_ratio is None else number(their_ratio),
        *verdict(PEER_BOUNDS[traps] if bounded and (case.peer_full or not traps) else None, their_ratio),
        number(in_batches),
        number(ratio),
        *verdict(bound_loop, ratio),
        shuffled_layers(snapshots[0]),
        str(sum(layer.status != "ok" for layer in snapshots[0].layers)),
        number(_worst_alpha(snapshots[0], on_host)),
    ]


def _peer_ms(model: torch.nn.Module, *, traps: bool) -> float | None:
    if not rivals.has_weightwatcher():
        return None
    options = rivals.FULL if traps else {}
    return wall_ms(lambda: rivals.weightwatcher(model, **options), torch.device("cpu"))


def _worst_alpha(one: Snapshot, other: Snapshot) -> float:
    """Largest relative difference."""
    pairs = zip(one.layers, other.layers, strict=True)
    return max(abs(a.value("alpha") / b.value("alpha") - 1) for a, b in pairs)


def describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"On the {device.type}, tiny matrices: no figure here counts"
    cupy = next((f", {name} {found}" for name in _CUPY if (found := table.version_of(name))), "")
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}{cupy}"


_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def section(found: Sequence[Sequence[str]], device: torch.device, *, rounds: int) -> str:
    """The Markdown between the markers."""
    said = INTRODUCTION.format(device=describe(device), machine=table.machine(), rounds=rounds, warm_up=WARM_UP)
    return f"{said}\n\n{table.markdown(HEAD, found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script with tiny matrices")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=tuple(full_size()), help="some cases; RESULTS.md is left alone")
    parser.add_argument("--no-peer", action="store_true", help="leave weightwatcher out, which takes minutes")
    parser.add_argument("--results", type=Path, help="file whose gpu section to write; default benchmarks/RESULTS.md")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print(f"not measured: torch {torch.__version__} finds no CUDA device here (--device cpu tries the script out)")
        return
    found: list[list[str]] = []
    start = time.perf_counter()
    for name, case in (full_size() if on_gpu else small()).items():
        if not options.only or name in options.only:
            found += rows(case, device, rounds=options.rounds, peer=not options.no_peer, bounded=on_gpu)
            print(f"[{time.perf_counter() - start:6.1f} s] {case.title}: {' | '.join(found[-1][1:])}", flush=True)
    text = section(found, device, rounds=options.rounds)
    print(f"\n{text}")
    if options.results or (on_gpu and not options.only):
        table.write_section("gpu", text, options.results or table.RESULTS)


if __name__ == "__main__":
    main()

"""What the whole analysis costs over the bare float64 Gram matrix and its eigenvalues, and beside weightwatcher 0.7.7.

Run with `make bench`; prints a table for benchmarks/RESULTS.md. Both sides see the same matrices, in turns, in one
process; the figure is the ratio of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import ww_monitor
from benchmarks import shapes
from ww_monitor.walk.torch import walk

MODELS = {
    "GPT-2 small, 48 matrices": shapes.gpt2_small,
    "ResNet-18, 197 slices": shapes.resnet18,
    "one 2048²": lambda: shapes.square(2048),
}


def bare(model: torch.nn.Module) -> float:
    """Float64 Gram matrix of the short side and numpy's eigvalsh, and nothing else."""
    total = 0.0
    for matrix in walk(model):
        for w in matrix.load():
            a = (w if w.shape[0] >= w.shape[1] else w.mT).double().numpy()
            total += float(np.linalg.eigvalsh(a.T @ a)[-1])
    return total


def seconds(function: Callable[[torch.nn.Module], object], model: torch.nn.Module) -> float:
    start = time.perf_counter()
    function(model)
    return time.perf_counter() - start


def weightwatcher(model: torch.nn.Module, **options: bool) -> None:
    """The peer's analysis, its printing caught."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import weightwatcher

        weightwatcher.WeightWatcher(model=model).analyze(plot=False, savefig=False, **options)


def against_peer(rounds: int) -> None:
    """Ratios of wall time, the peer over ours."""
    block = shapes.gpt2_small()[0]  # type: ignore[index]
    cases = {
        "one GPT-2 block, plain": (block, {}),
        "one GPT-2 block, with traps and Marchenko–Pastur": (block, {"randomize": True, "mp_fit": True, "detX": True}),
    }
    print("\n| matrices | weightwatcher 0.7.7 ÷ analyze (median) | range over rounds |\n|---|---|---|")
    for name, (model, options) in cases.items():
        pairs = [
            (seconds(partial(weightwatcher, **options), model), seconds(ww_monitor.analyze, model))
            for _ in range(rounds)
        ]
        ratio = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
        each = [a / b for a, b in pairs]
        print(f"| {name} | {ratio:.1f} | {min(each):.1f}–{max(each):.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n"
    )
    print("| matrices | analyze ÷ bare solver (median) | range over rounds |\n|---|---|---|")
    for name, build in MODELS.items():
        model = build()
        ww_monitor.analyze(model, include=["0*"])
        pairs = [(seconds(ww_monitor.analyze, model), seconds(bare, model)) for _ in range(arguments.rounds)]
        ratio = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
        each = [a / b for a, b in pairs]
        print(f"| {name} | {ratio:.2f} | {min(each):.2f}–{max(each):.2f} |", flush=True)
    against_peer(arguments.rounds)


if __name__ == "__main__":
    main()

"""Planted spikes recovered: F1 here and by weightwatcher 0.7.7, on the same matrices.

A Gaussian matrix of unit variance gets k rank-one spikes of strength θ = f · (NM)^¼, f times the threshold above which
a spike leaves the bulk (Benaych-Georges & Nadakuditi 2012). A method's answer is its number of spikes p, of which
min(p, k) count as recovered. `python -m benchmarks.spike_recovery` prints the table for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Iterator

import torch
from torch import nn

import ww_monitor

SHAPES = ((200, 200), (400, 100), (512, 512), (1024, 256))
STRENGTHS = (1.5, 2.0, 3.0, 10.0)
COUNTS = (1, 3, 10)


def planted(rows: int, columns: int, count: int, strength: float, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator)).Q
    spikes = strength * (rows * columns) ** 0.25 * left @ right.T
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.randn(rows, columns, generator=generator) + spikes
    return layer


def score(found: list[tuple[int, int]]) -> float:
    """F1 over pairs (planted, answered)."""
    true_positive = sum(min(k, p) for k, p in found)
    return 2 * true_positive / (sum(k for k, _ in found) + sum(p for _, p in found))


def weightwatcher_spikes(layer: nn.Linear) -> int:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import weightwatcher

        details = weightwatcher.WeightWatcher(model=nn.Sequential(layer)).analyze(
            mp_fit=True, plot=False, savefig=False
        )
    return max(0, int(details["num_spikes"].iloc[0]))


def our_spikes(layer: nn.Linear) -> int:
    return int(ww_monitor.analyze(layer, metrics=["num_spikes"]).layers[0].value("num_spikes"))


def rows(draws: int) -> Iterator[tuple[str, float, float]]:
    everything: dict[str, list[tuple[int, int]]] = {"ours": [], "theirs": []}
    for n, m in SHAPES:
        for strength in STRENGTHS:
            layers = [(k, planted(n, m, k, strength, seed)) for k in COUNTS for seed in range(draws)]
            ours = [(k, our_spikes(layer)) for k, layer in layers]
            theirs = [(k, weightwatcher_spikes(layer)) for k, layer in layers]
            everything["ours"] += ours
            everything["theirs"] += theirs
            yield f"{n}×{m} | {strength:g}", score(ours), score(theirs)
    yield "all | all", score(everything["ours"]), score(everything["theirs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=3, help="matrices a shape, strength and count")
    arguments = parser.parse_args()
    print("| shape | strength ÷ threshold | F1 here | F1 weightwatcher 0.7.7 |\n|---|---|---|---|")
    for case, ours, theirs in rows(arguments.draws):
        print(f"| {case} | {ours:.3f} | {theirs:.3f} |", flush=True)


if __name__ == "__main__":
    main()

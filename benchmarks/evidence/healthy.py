"""How often a healthy run is warned: 512 small nets on digits that train as people train, and every rule on them.

`python -m benchmarks.evidence.healthy [--quick] [--jobs 2]` writes `results/healthy.json`. It takes 299 runs without a
false alarm, or 473 with one, to show a rate below 1 % (95 % bound, Clopper & Pearson); 22 more are among `runs`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from scipy.stats import beta

from benchmarks.evidence import study
from benchmarks.evidence.judge import judged, rule_name, versions
from benchmarks.evidence.runs import Run, small_net, train
from ww_monitor import History, rules

NETS = ("MLP 48", "MLP 96-48", "MLP 128-64-32", "CNN 8-16")
TRAININGS = (("sgd", 0.1), ("momentum", 0.02), ("adamw", 1e-3), ("adamw", 3e-3))
DECAYS = {"sgd": (0.0, 5e-4), "momentum": (0.0, 5e-4), "adamw": (0.0, 0.01)}
SEEDS, STEPS, EVERY = {"MLP": 18, "CNN": 10}, 1000, 50
ALARMING = ("warning", "critical")


def every_run() -> list[Run]:
    """Nets × trainings × weight decays × seeds."""
    found = []
    for name, (kind, rate) in itertools.product(NETS, TRAININGS):
        for decay in DECAYS[kind]:
            label = f"{name}, {kind} {rate:g}, weight decay {decay:g}"
            for seed in range(SEEDS[name[:3]]):
                make = partial(small_net, name.partition(" ")[2], "CNN" in name, kind, rate, decay)
                found.append(Run("healthy", f"{label}, seed {seed}", make, seed, STEPS, EVERY, {"label": label}))
    return found


def one(index: int, quick: bool, folder: Path) -> dict[str, Any]:
    """The row of a run, with the alarms of every rule by severity; trained unless it is in the folder."""
    run = every_run()[index]
    train(run, folder, steps=STEPS // 10 if quick else None)
    home = folder / run.study / run.name
    history = History.read(home / "ww_history.jsonl")
    seen = judged(history, json.loads((home / "outcome.json").read_text()))
    return {
        "label": seen.label, "seed": run.seed, "best": round(seen.best, 4), "end": round(seen.accuracy[-1], 4),
        "loses": seen.loses, "alarms": {rule_name(rule): longest(history, rule) for rule in rules.TRAINING_RULES},
    }  # fmt: skip


def longest(history: History, rule: Any) -> dict[str, int]:
    """For warnings or worse, and for any finding: in how many snapshots in a row the rule held in one layer."""
    most = {"warning": 0, "any": 0}
    held: dict[str, dict[str, int]] = {"warning": {}, "any": {}}
    for end in range(1, len(history) + 1):
        found = rules.apply_rules([rule], History(history.snapshots[:end]))
        for kind in most:
            some = {finding.layer for finding in found if kind == "any" or finding.severity in ALARMING}
            held[kind] = {layer: held[kind].get(layer, 0) + 1 for layer in some}
            most[kind] = max(most[kind], *held[kind].values(), 0)
    return most


def bound(alarms: int, runs: int) -> float:
    """The largest rate that so few alarms do not contradict at 5 % (Clopper & Pearson 1934).

    >>> round(bound(0, 299), 4)
    0.01
    """
    return 1.0 if alarms >= runs else float(beta.ppf(0.95, alarms + 1, runs - alarms))


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every rule, over the runs that kept their accuracy: those with a finding once, and thrice in a row."""
    good = [row for row in rows if not row["loses"]]
    found = []
    for name in good[0]["alarms"]:
        line: dict[str, Any] = {"rule": name, "runs": len(good)}
        for kind, patience in itertools.product(("warning", "any"), (1, 3)):
            count = sum(row["alarms"][name][kind] >= patience for row in good)
            line[f"{kind}, patience {patience}"] = count
            if kind == "warning":
                line[f"bound, patience {patience}"] = round(bound(count, len(good)), 4)
        found.append(line)
    return found


def main() -> None:
    options = study.arguments(__doc__, "one seed, a tenth as long", folder="runs/healthy").parse_args()
    folder = study.folder_of(options)
    chosen = [at for at, run in enumerate(every_run()) if run.seed == 0 or not options.quick]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(one, chosen, [options.quick] * len(chosen), [folder] * len(chosen)))
    for row in rows:  # what never held is left out
        row["held"] = {name: held for name, held in row["alarms"].items() if held["any"]}
    found = {"versions": versions(), "table": table(rows)}
    study.show(found["table"])
    kept = [{key: value for key, value in row.items() if key != "alarms"} for row in rows]
    study.keep("healthy_quick" if options.quick else "healthy", found, kept)


if __name__ == "__main__":
    main()

"""docs/evidence.png from the results that are checked in: `python -m benchmarks.evidence.figure`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.evidence import study

matplotlib.use("Agg")
from matplotlib import pyplot

PICTURE = Path(__file__).parents[2] / "docs" / "evidence.png"

RULES = (
    "trap", "trap_approaching", "mean_shift", "over_trained", "under_trained", "norm_growth", "stable_rank_collapse",
)  # fmt: skip


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((study.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def shares() -> tuple[list[str], np.ndarray]:
    """Set-ups, good and losing apart → share of runs in which each rule held three times in a row."""
    runs = read("stopping")["runs"]
    groups = sorted({(run["loses"], run["study"]) for run in runs})
    table = []
    for group in groups:
        some = [run for run in runs if (run["loses"], run["study"]) == group]
        table.append([sum("3" in run["alarms"].get(rule, {}) for run in some) / len(some) for rule in RULES])
    names = [f"{study} ({'loses' if loses else 'good'})" for loses, study in groups]
    small = read("healthy")["table"]
    by_rule = {row["rule"]: row["any, patience 3"] / row["runs"] for row in small}
    return [f"{small[0]['runs']} small healthy nets", *names], np.array([[by_rule[rule] for rule in RULES], *table])


def main() -> None:
    names, table = shares()
    runs = read("actions")["runs"]
    figure, (left, *right) = pyplot.subplots(1, 3, figsize=(14, 5), width_ratios=(2, 1, 1), layout="constrained")
    left.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    left.set_yticks(range(len(names)), names)
    left.set_xticks(range(len(RULES)), RULES, rotation=30, ha="right")
    left.set_title("share of runs in which a rule held three times in a row")
    for (row, column), share in np.ndenumerate(table):
        left.text(column, row, f"{share:.2f}", ha="center", va="center", color="w" if share > 0.6 else "k", fontsize=8)
    for axes, net in zip(right, dict.fromkeys(run["net"] for run in runs), strict=True):
        some = [run for run in runs if run["net"] == net]
        uniform = {run["seed"]: run["test_loss"] for run in some if run["arm"] == "uniform"}
        arms = [arm for arm in dict.fromkeys(run["arm"] for run in some) if arm != "uniform"]
        for place, arm in enumerate(reversed(arms)):
            over = [run["test_loss"] - uniform[run["seed"]] for run in some if run["arm"] == arm]
            axes.plot(over, [place] * len(over), "o", color="C1" if ":" in arm else "C0", alpha=0.7)
        axes.set_yticks(range(len(arms)), reversed(arms), fontsize=7)
        axes.axvline(0, color="0.6", zorder=0)
        axes.set_title(f"{net}: held-out loss over the\nuniform rate's (orange: controls)", fontsize=8)
    figure.savefig(PICTURE, dpi=90)


if __name__ == "__main__":
    main()

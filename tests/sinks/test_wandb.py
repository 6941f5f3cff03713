"""The W&B sink in offline runs, read back from their log."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ww_monitor
from tests.processes import run_python
from ww_monitor import MissingDependency, Monitor, WWMonitorError
from ww_monitor.record import Finding, Histogram, Layer, Snapshot
from ww_monitor.sinks.wandb import Dashboard, WandB, _QueuedRows
from ww_monitor.walk.torch import walk

wandb = pytest.importorskip("wandb", reason="wandb, the tracker, is not installed")

NAN = float("nan")


def snapshot(step: int | None = 10, *findings: Finding) -> Snapshot:
    row = Layer(
        "encoder.fc",
        "dense",
        (1, 32, 16),
        verdict="ok",
        metrics={"alpha": 2.5 + (step or 0) / 100, "num_traps": 0.0, "sigma": NAN},
        esd=Histogram(-2.0, 1.0, (3, 0, 5, 8)),
    )
    return Snapshot((row,), summary={"alpha": row.metrics["alpha"], "sigma": NAN}, findings=findings, step=step)


def finding(rule: str, layer: str, *, severity: Any = "critical", state: Any = "begin") -> Finding:
    return Finding(rule, layer, severity, f"{layer}: so it is", step=10, state=state)


def plain(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row that are ours; a medium has some too, as nested keys beside its `_type`."""
    media = {key.removesuffix("_type") for key in row if key.endswith("/_type")}
    own = {key: row[key] for key in row if key.startswith("ww") and not key.startswith(tuple(media))}
    return {key: value for key, value in own.items() if isinstance(value, (int, float))}


# --- rows and their axis


def test_a_snapshot_is_one_row_with_its_step_on_an_axis_of_its_own(tmp_path, start_wandb, read_wandb):
    run = start_wandb(tmp_path)
    run.log({"loss": 1.0})
    sink = WandB()
    for step in (10, 20):
        sink.write(snapshot(step))
        run.log({"loss": 0.5})
    sink.close()
    run.finish()
    written = read_wandb(tmp_path)
    rows = [plain(row) for row in written["rows"] if "ww/alpha" in row]
    assert rows == [
        {
            "ww/alpha": pytest.approx(2.5 + step / 100),
            "ww_alpha/encoder.fc": pytest.approx(2.5 + step / 100),
            "ww_num_traps/encoder.fc": 0.0,
            "ww_verdict/ok": 1,
            "ww/step": step,
        }
        for step in (10, 20)
    ]
    assert [row["loss"] for row in written["rows"] if "loss" in row] == [1.0, 0.5, 0.5]
    assert written["steps"][0] == ("ww/step", "")
    assert {("ww/alpha", "ww/step"), ("ww_alpha/encoder.fc", "ww/step")} < set(written["steps"])


def looks_and_logs(order: str) -> list[str]:
    """Looks (`w`) and logs of the run's owner (`o`), in a row."""
    return {"looks between": list("wwwo" * 5), "looks first": list("w" * 5 + "o" * 5), "looks last": list("ooooowww"),
            "logs first": list("owowowowow")}[order]  # fmt: skip


@pytest.mark.parametrize("order", ["looks between", "looks first", "looks last", "logs first"])
@pytest.mark.parametrize("how", ["step", "no step"])
def test_the_run_keeps_what_its_owner_logs_at_the_steps_that_it_would_have_without_us(
    tmp_path, start_wandb, read_wandb, order, how
):
    run = start_wandb(tmp_path)
    sink, looks, epochs = WandB(), 0, 0
    for what in looks_and_logs(order):
        if what == "w":
            sink.write(snapshot(10 * looks))
            looks += 1
        else:
            run.log({"loss": float(epochs)}, **({"step": epochs} if how == "step" else {}))
            epochs += 1
    sink.close()
    run.finish()
    rows = read_wandb(tmp_path)["rows"]
    assert [(row["_step"], row["loss"]) for row in rows if "loss" in row] == [(e, e) for e in range(epochs)]
    ours = [(row["ww/step"], row["ww/alpha"]) for row in rows if "ww/step" in row]
    assert ours == [(10 * look, pytest.approx(2.5 + look / 10)) for look in range(looks)]


WAITING = """
import os, sys, wandb
from ww_monitor.record import Snapshot
from ww_monitor.sinks.wandb import WandB

settings = wandb.Settings(console="off", x_disable_stats=True)
run = wandb.init(mode="offline", dir=sys.argv[1], settings=settings)
sink = WandB()
for step in range(4):
    sink.write(Snapshot((), summary={"alpha": 3.0}, step=step))
"""
"""A process in whose W&B run rows of ours wait."""

FORKED = """
child = os.fork()
child or sys.exit()
os.waitpid(child, 0)
for step in range(4):
    run.log({"loss": step}, step=step)
run.finish()
"""


@pytest.fixture
def rows_after(tmp_path, read_wandb):
    """The rows that W&B's file has after a process in which rows wait has gone on in some way."""
    pytest.importorskip("wandb", reason="wandb, the tracker, is not installed")

    def run(rest):
        done = run_python("-c", WAITING + rest, str(tmp_path), WANDB_SILENT="true")
        assert done.returncode == 0, done.stderr
        return read_wandb(tmp_path)["rows"]

    return run


def test_rows_that_wait_are_written_by_a_process_that_ends_without_finish(rows_after):
    assert [row["ww/step"] for row in rows_after("")] == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_that_ends_writes_nothing_into_the_run_of_its_parent(rows_after):
    rows = rows_after(FORKED)
    assert [(row["_step"], row["loss"]) for row in rows if "loss" in row] == [(step, step) for step in range(4)]
    assert [row["ww/step"] for row in rows if "ww/step" in row] == [0, 1, 2, 3]


def test_rows_that_wait_take_bounded_memory(tmp_path, start_wandb, monkeypatch):
    monkeypatch.setattr("ww_monitor.sinks.wandb.QUEUED_ROWS", 8)
    monkeypatch.setattr("ww_monitor.sinks.wandb.QUEUED_MEDIA", 2)
    run = start_wandb(tmp_path)
    board = Dashboard()
    for step in range(40):
        board.update(run, snapshot(step), step, values={"ww/alpha": 3.0})
    waiting = _QueuedRows.of(run, "ww/step")._queue
    assert len(waiting) <= 8
    assert waiting[-1]["ww/step"] == 39
    assert sum("ww_esd/encoder.fc" in row for row in waiting) <= 3


def test_own_rows_are_there_at_once(tmp_path, start_wandb, read_wandb):
    run = start_wandb(tmp_path)
    sink = WandB(own_rows=True)
    for step in (10, 20):
        sink.write(snapshot(step))
        assert run.step == step / 10
    run.finish()
    assert [row["ww/step"] for row in read_wandb(tmp_path)["rows"]] == [10, 20]


@pytest.mark.parametrize(("what", "when"), [("Image", "__init__"), ("Table", "bind_to_run"), ("Histogram", "__init__")])
def test_a_medium_that_fails_costs_itself_alone(tmp_path, start_wandb, read_wandb, monkeypatch, what, when):
    def broken(*args, **kwargs):
        raise TypeError("no ink")

    run = start_wandb(tmp_path)
    monkeypatch.setattr(wandb, what, type(what, (getattr(wandb, what),), {when: broken}))
    with pytest.raises(TypeError, match="no ink"):
        WandB().write(snapshot(10))
    run.finish()
    (row,) = read_wandb(tmp_path)["rows"]
    assert (row["ww/step"], row["ww/alpha"]) == (10, pytest.approx(2.6))
    media = {"Image": "ww/alpha_map", "Table": "ww/layers", "Histogram": "ww_esd/encoder.fc"}
    there = {name for name, key in media.items() if any(one.startswith(key) for one in row)}
    assert there == media.keys() - {what}


@pytest.mark.parametrize("most", [1000, 0])
def test_our_axis_is_declared_key_by_key_where_there_are_few(tmp_path, start_wandb, read_wandb, monkeypatch, most):
    monkeypatch.setattr("ww_monitor.sinks.wandb.MOST_DECLARED", most)
    run = start_wandb(tmp_path)
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    run.log({"loss": 1.0, "trainer/global_step": 3})
    WandB().write(snapshot(10))
    run.finish()
    written = read_wandb(tmp_path)
    (row,) = (row for row in written["rows"] if "ww/alpha" in row)
    assert row["ww/step"] == 10
    declared = {name for name, axis in written["steps"] if axis == "ww/step"}
    assert declared >= ({"ww/alpha", "ww_alpha/encoder.fc", "ww_esd/encoder.fc"} if most else {"ww/*", "ww_*"})


def test_the_axis_of_the_runs_owner_can_be_told(tmp_path, start_wandb, read_wandb):
    run = start_wandb(tmp_path)
    WandB(run, step_key="global_step").write(snapshot(10))
    run.finish()
    written = read_wandb(tmp_path)
    assert written["rows"][0]["global_step"] == 10
    assert written["steps"] == []


def test_without_scalars_the_row_has_media_alone(tmp_path, start_wandb, read_wandb):
    run = start_wandb(tmp_path)
    WandB(run, scalars=False).write(snapshot(10))
    run.finish()
    (row,) = read_wandb(tmp_path)["rows"]
    assert plain(row) == {"ww/step": 10}
    assert of_key(row, "ww_esd/encoder.fc")["_type"] == "histogram"


# --- media


def of_key(row: dict[str, Any], key: str) -> dict[str, Any]:
    """A medium of a row, whether its fields were written as one value or as nested keys."""
    nested = {name.removeprefix(f"{key}/"): value for name, value in row.items() if name.startswith(f"{key}/")}
    return nested or row[key]


def test_media_of_a_real_net_are_in_the_row_and_on_disk(tmp_path, start_wandb, read_wandb):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(60, 40), torch.nn.Linear(40, 30))
    run = start_wandb(tmp_path)
    monitor = Monitor(every_n_steps=1, sinks=[WandB(figures=lambda s: {"0": np.zeros((4, 5, 3), np.uint8)})])
    seen = [monitor.observe(walk(net), step=step) for step in (0, 1)]
    monitor.close()
    run.finish()
    written = read_wandb(tmp_path)
    assert len(written["rows"]) == 2
    for row, one in zip(written["rows"], seen, strict=True):
        for layer in one.layers:
            esd = of_key(row, f"ww_esd/{layer.name}")
            assert (esd["_type"], esd["values"]) == ("histogram", list(layer.esd.counts))
            assert esd["bins"] == pytest.approx(layer.esd.edges)
        assert of_key(row, "ww/alpha_map")["_type"] == "image-file"
        spectrum = of_key(row, "ww_spectrum/0")
        assert (spectrum["width"], spectrum["height"]) == (5, 4)
        (path,) = tmp_path.glob(f"**/{of_key(row, 'ww/layers')['path']}")
        table = json.loads(path.read_text())
        assert table["columns"][:5] == ["layer", "kind", "shape", "status", "verdict"]
        lines = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
        assert [line["layer"] for line in lines] == ["0", "1"]
        assert [line["shape"] for line in lines] == ["1×40×60", "1×30×40"]
        assert [line["alpha"] for line in lines] == [layer.value("alpha") for layer in one.layers]
        assert [line["trap_p_value"] for line in lines] == [None, None]


def test_table_and_picture_get_rarer_in_a_long_run(tmp_path, start_wandb, read_wandb, monkeypatch):
    monkeypatch.setattr("ww_monitor.sinks.wandb.is_milestone", lambda count: count == 1)
    run = start_wandb(tmp_path)
    sink = WandB(run)
    for step in range(3):
        sink.write(snapshot(step))
    run.finish()
    rows = read_wandb(tmp_path)["rows"]
    assert [any(key.startswith("ww/layers") for key in row) for row in rows] == [True, False, False]
    assert [any(key.startswith("ww_esd") for key in row) for row in rows] == [True, True, True]


# --- alerts


def alerts(tmp_path: Path, run: Any, read_wandb: Any) -> list[tuple[str, list[str], str]]:
    run.finish()
    read = read_wandb(tmp_path)["alerts"]
    return [(title, [line.split(": ")[1] for line in text.splitlines()], level) for title, text, level in read]


def test_a_finding_alerts_once_a_rule_and_layer(tmp_path, start_wandb, read_wandb):
    run = start_wandb(tmp_path)
    dashboard = Dashboard()
    dashboard.alert_seconds = 0
    dashboard.update(run, snapshot(0), 0)
    dashboard.update(run, snapshot(1, finding("trap", "a"), finding("trap", "b")), 1)
    dashboard.update(run, snapshot(2, finding("trap", "a", state="end")), 2)
    dashboard.update(run, snapshot(3, finding("trap", "a"), finding("over_trained", "a", severity="warning")), 3)
    dashboard.update(run, snapshot(4, finding("mean_shift", "a", severity="info")), 4)
    dashboard.finish(run)
    assert alerts(tmp_path, run, read_wandb) == [
        ("ww_monitor: trap", ["a", "b"], "ERROR"),
        ("ww_monitor: over_trained", ["a"], "WARN"),
    ]


def test_findings_of_a_rule_wait_for_one_another(tmp_path, start_wandb, read_wandb):
    run = start_wandb(tmp_path)
    sink = WandB(run)
    for step, layer in enumerate("abcd"):
        sink.write(snapshot(step, finding("trap", layer)))
    sink.close()
    sink.close()
    assert alerts(tmp_path, run, read_wandb) == [
        ("ww_monitor: trap", ["a"], "ERROR"),
        ("ww_monitor: trap", ["b", "c", "d"], "ERROR"),
    ]


# --- whose run it is


def test_without_a_run_there_is_one_clear_warning_and_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert wandb.run is None
    with pytest.raises(WWMonitorError, match=r"expected an active run, got none; call wandb.init\(\) first"):
        WandB().write(snapshot())
    monitor = Monitor(every_n_steps=1, sinks=[WandB()])
    with pytest.warns(ww_monitor.SpectralWarning, match="sink WandB failed: WWMonitorError"):
        monitor.observe(walk(torch.nn.Linear(20, 20)), step=0)
    monitor.observe(walk(torch.nn.Linear(20, 20)), step=1)
    monitor.close()
    assert wandb.run is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_stays_its_owners(tmp_path, start_wandb):
    run = start_wandb(tmp_path)
    sink = WandB()
    sink.write(snapshot())
    sink.close()
    assert wandb.run is run
    run.log({"loss": 1.0})


def test_two_monitors_of_a_run_share_no_key_and_no_alert(tmp_path, start_wandb, read_wandb):
    def written(folder: Path, *prefixes: str) -> tuple[dict[str, Any], Any]:
        run = start_wandb(folder)
        for prefix in prefixes:
            sink = WandB(prefix=prefix, figures=lambda _: {"fc": np.zeros((4, 4, 3), np.uint8)})
            sink.write(snapshot(10, finding("trap", "fc")))
            sink.close()
        run.finish()
        read = read_wandb(folder)
        return {key: value for row in read["rows"] for key, value in row.items() if key[0] != "_"}, read

    (alone, _), (both, read) = written(tmp_path / "alone", ""), written(tmp_path / "both", "teacher/", "student/")
    assert both.keys() == {prefix + key for prefix in ("teacher/", "student/") for key in alone}
    assert {"ww/layers/_type", "ww/alpha_map/_type", "ww_esd/encoder.fc/_type", "ww_spectrum/fc/_type"} <= alone.keys()
    assert ("student/ww_esd/encoder.fc", "student/ww/step") in read["steps"]
    assert [title for title, *_ in read["alerts"]] == ["ww_monitor: teacher/trap", "ww_monitor: student/trap"]


def test_a_run_that_is_given_goes_before_the_active_one(tmp_path, start_wandb, read_wandb):
    active, given = start_wandb(tmp_path / "active"), start_wandb(tmp_path / "given", active=False)
    WandB(given).write(snapshot())
    active.log({"loss": 1.0})
    for run in (given, active):
        run.finish()
    assert "ww/alpha" in read_wandb(tmp_path / "given")["rows"][0]
    assert [plain(row) for row in read_wandb(tmp_path / "active")["rows"]] == [{}]


def test_a_second_active_run_begins_anew(tmp_path, start_wandb, read_wandb):
    sink = WandB()
    for name in ("a", "b"):
        run = start_wandb(tmp_path / name)
        sink.write(snapshot(10))
        run.finish()
    for name in ("a", "b"):
        written = read_wandb(tmp_path / name)
        assert written["rows"][0]["ww/step"] == 10
        assert ("ww/alpha", "ww/step") in written["steps"]


def test_a_disabled_run_is_no_error():
    run = wandb.init(mode="disabled")
    sink = WandB(run)
    sink.write(snapshot(1, finding("trap", "a")))
    sink.close()
    run.finish()


def test_without_wandb_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ww-monitor\[wandb\]'"):
        WandB()

"""Records: plain frozen data, key names, JSON Lines, tables."""

import copy
import dataclasses
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import ww_monitor
from ww_monitor.errors import SpectralWarning, WWMonitorError
from ww_monitor.metric import TABLE
from ww_monitor.record import (
    SCHEMA,
    Finding,
    Histogram,
    History,
    Layer,
    Skipped,
    Snapshot,
    TrapEntry,
    layer_key,
    summary_key,
)

NAN = math.nan


def layer(name: str = "fc", **values: float) -> Layer:
    return Layer(name, "dense", (1, 32, 16), metrics=values)


def full_snapshot() -> Snapshot:
    """Every field in use, every kind of number among the metrics."""
    whole = Layer(
        "encoder.0",
        "conv",
        (9, 32, 16),
        status="ok",
        verdict="poor_fit",
        metrics={"alpha": 2.5, "num_traps": 1.0, "sigma": NAN, "ratio": math.inf},
        role="up",
        phase="bulk+spikes",
        esd=Histogram(-3.5, 1.25, (1, 0, 4), num_zero=2),
        trap_entries=(TrapEntry(4, 3, 7, -1.5, 1.2),),
        eigenvalues=(0.1, 0.2),
    )
    failed = Layer(
        "encoder.1", "dense", (1, 8, 8), status="error: OSError: gone", verdict="error", metrics={"alpha": NAN}
    )
    return Snapshot(
        (whole, failed),
        (Skipped("bias", "other", (3,), "one dimension"),),
        {"alpha": 2.5, "sigma": NAN},
        (Finding("trap", "encoder.0", "critical", "1 trap", step=40), Finding("x", "", "info", "over", 40, "end")),
        step=40,
        epoch=2,
        preset="weightwatcher",
        seconds=0.25,
    )


# --- keys


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (summary_key("alpha"), "ww/alpha"),
        (layer_key("alpha", "fc"), "ww_alpha/fc"),
        (layer_key("num_traps", "encoder.layers.0.q"), "ww_num_traps/encoder.layers.0.q"),
    ],
)
def test_keys_open_one_section_a_metric(key, expected):
    assert key == expected


def test_scalars_are_the_known_values_as_plain_floats():
    snapshot = Snapshot(
        (Layer("a", "dense", (1, 8, 8), metrics={"alpha": 3, "sigma": NAN, "ratio": -math.inf}), layer("b", alpha=2.5)),
        summary={"alpha": 2.75, "ks": NAN},
    )
    assert snapshot.scalars() == {"ww/alpha": 2.75, "ww_alpha/a": 3.0, "ww_alpha/b": 2.5}
    assert snapshot.scalars(layers=False) == {"ww/alpha": 2.75}
    assert {type(value) for value in snapshot.scalars().values()} == {float}


# --- snapshots


def test_a_json_round_trip_keeps_all_but_the_eigenvalues():
    snapshot = full_snapshot()
    again = Snapshot.from_dict(json.loads(snapshot.to_json()))
    assert again.layers[0].eigenvalues is None
    assert again.layers[0].esd == snapshot.layers[0].esd
    assert again.layers[0].trap_entries == snapshot.layers[0].trap_entries
    for field in ("skipped", "findings", "step", "epoch", "preset", "seconds"):
        assert getattr(again, field) == getattr(snapshot, field)
    for one, other in zip(again.layers, snapshot.layers, strict=True):
        plain = {"metrics": {}, "eigenvalues": None}
        assert dataclasses.replace(one, **plain) == dataclasses.replace(other, **plain)
    assert again.to_json() == snapshot.to_json()


def test_what_is_not_known_is_null_in_the_file_and_nan_in_memory():
    snapshot = full_snapshot()
    data = json.loads(snapshot.to_json())
    assert data["layers"][0]["metrics"] == {"alpha": 2.5, "num_traps": 1.0, "sigma": None, "ratio": None}
    assert data["summary"] == {"alpha": 2.5, "sigma": None}
    again = Snapshot.from_dict(data)
    assert math.isnan(again.layers[0].metrics["sigma"])
    assert math.isnan(again.summary["sigma"])
    assert math.isnan(Snapshot.from_dict(json.loads(Snapshot(()).to_json())).seconds)


def test_json_is_strict_and_one_line():
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = full_snapshot().to_json()
    assert json.loads(line, parse_constant=refuse)["schema"] == SCHEMA
    assert "\n" not in line


def test_a_real_analysis_survives_the_round_trip():
    torch.manual_seed(0)
    snapshot = ww_monitor.analyze(torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Conv2d(16, 16, 3)))
    again = Snapshot.from_dict(json.loads(snapshot.to_json()))
    assert again.scalars() == snapshot.scalars()
    assert again.to_json() == snapshot.to_json()


def test_a_file_from_before_a_field_was_added_is_read_with_its_default():
    data = full_snapshot().to_dict()
    for row in data["layers"]:
        del row["phase"], row["role"]
    assert [(row.phase, row.role) for row in Snapshot.from_dict(data).layers] == [("", ""), ("", "")]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (full_snapshot(), "step"),
        (full_snapshot().layers[0], "status"),
        (full_snapshot().layers[0].esd, "low"),
        (full_snapshot().layers[0].trap_entries[0], "value"),
        (full_snapshot().skipped[0], "reason"),
        (full_snapshot().findings[0], "message"),
    ],
)
def test_records_cannot_be_changed(record, field):
    with pytest.raises(dataclasses.FrozenInstanceError, match=field):
        setattr(record, field, 0)


def test_with_findings_makes_another_snapshot():
    before = Snapshot((layer(),), step=1)
    after = before.with_findings(iter([Finding("trap", "fc", "critical", "1 trap")]))
    assert before.findings == ()
    assert [finding.rule for finding in after.findings] == ["trap"]
    assert (after.layers, after.step) == (before.layers, before.step)


def test_a_snapshot_of_a_later_schema_is_refused():
    data = {**Snapshot(()).to_dict(), "schema": SCHEMA + 1}
    with pytest.raises(WWMonitorError, match=f"schema {SCHEMA + 1} is newer than this version's {SCHEMA}"):
        Snapshot.from_dict(data)


def test_a_layer_is_found_by_name():
    snapshot = Snapshot((layer("a"), layer("b", alpha=2.0)))
    assert snapshot["b"].value("alpha") == 2.0
    assert math.isnan(snapshot["a"].value("alpha"))


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(KeyError, match=r"no layer 'c'; there are \['a', 'b'\]"):
        Snapshot((layer("a"), layer("b")))["c"]


def test_bin_edges_are_equal_steps_from_low_to_high():
    assert Histogram(-1.0, 1.0, (3, 0, 0, 2)).edges == (-1.0, -0.5, 0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (Finding("trap", "fc", "critical", "fc: 2 traps", step=10), "trap at step 10: fc: 2 traps"),
        (
            Finding("trap", "fc", "critical", "fc: 2 traps", step=10, state="end"),
            "trap is over at step 10: fc: 2 traps",
        ),
        (Finding("trap", "fc", "critical", "fc: 2 traps"), "trap: fc: 2 traps"),
        (Finding("trap", "fc", "critical", "fc: 2 traps", step=0), "trap at step 0: fc: 2 traps"),
    ],
)
def test_a_finding_reads_as_a_sentence(finding, text):
    assert str(finding) == text


# --- histories


def history() -> History:
    """Layer b comes later; the model's alpha is not known at step 20."""
    return History(
        [
            Snapshot(
                (layer("a", alpha=3.0),), summary={"alpha": 3.0}, step=10, findings=(Finding("x", "a", "info", "1"),)
            ),
            Snapshot((layer("a", alpha=NAN), layer("b", alpha=5.0)), summary={"alpha": NAN}, step=20),
            Snapshot(
                (layer("b", alpha=4.0), layer("a", alpha=2.0)),
                summary={"alpha": 3.0},
                step=40,
                findings=(Finding("x", "a", "info", "1", state="end"), Finding("y", "b", "info", "2")),
            ),
        ]
    )


@pytest.mark.parametrize(
    ("metric", "name", "expected"),
    [
        ("alpha", "a", ([10, 20, 40], [3.0, NAN, 2.0])),
        ("alpha", "b", ([20, 40], [5.0, 4.0])),
        ("alpha", None, ([10, 20, 40], [3.0, NAN, 3.0])),
        ("beta", "b", ([20, 40], [NAN, NAN])),
        ("beta", None, ([10, 20, 40], [NAN, NAN, NAN])),
        ("alpha", "c", ([], [])),
    ],
)
def test_a_series_has_the_steps_and_values_where_the_layer_is(metric, name, expected):
    steps, values = history().series(metric, layer=name)
    assert steps == expected[0]
    assert values == pytest.approx(expected[1], nan_ok=True)


def test_a_series_without_steps_counts_snapshots():
    steps, values = History([Snapshot((layer("a", alpha=value),)) for value in (3.0, 2.0)]).series("alpha", layer="a")
    assert (steps, values) == ([0, 1], [3.0, 2.0])


def test_a_history_lists_layers_by_first_occurrence_and_findings_in_order():
    assert history().layer_names == ["a", "b"]
    assert [row.value("alpha") for row in history().of_layer("b")] == [5.0, 4.0]
    assert [(finding.rule, finding.state) for finding in history().findings] == [
        ("x", "begin"),
        ("x", "end"),
        ("y", "begin"),
    ]


def test_a_history_is_a_sequence_of_its_snapshots():
    run = history()
    assert (len(run), run[0].step, run[-1].step, run.last.step, [s.step for s in run]) == (3, 10, 40, 40, [10, 20, 40])


def write(path, snapshots, tail: str = "") -> None:
    path.write_text("".join(snapshot.to_json() + "\n" for snapshot in snapshots) + tail, encoding="utf-8")


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, history())
    read = History.read(path)
    assert [snapshot.to_json() for snapshot in read] == [snapshot.to_json() for snapshot in history()]
    assert [s.step for s in History.read(str(path))] == [10, 20, 40]


@pytest.mark.parametrize("cut", [1, 10, 200, -2, -1])
def test_a_torn_last_line_is_left_out(tmp_path, cut):
    line = full_snapshot().to_json()
    path = tmp_path / "run.jsonl"
    write(path, history(), tail=line[:cut])
    assert [snapshot.step for snapshot in History.read(path)] == [10, 20, 40]


def test_a_whole_last_line_counts_without_its_newline(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, history(), tail=Snapshot((), step=50).to_json())
    assert [snapshot.step for snapshot in History.read(path)] == [10, 20, 40, 50]


DAMAGED = [
    b"{", b"[]", b"3", b"null", b'"text"', b'{"schema":1}', b'{"schema":1,"layers":3}', b'{"schema":"1","layers":[]}',
    b"\xff\xfe\x00", b"\0" * 64, b"[" * 200_000, b"1" * 5000, b'{"schema":1,"layers":[{"name":"a"}]}',
    b'{"schema":1,"layers":[],"step":"3"}', b'{"schema":1,"layers":[],"summary":{"alpha":"high"}}',
    b'{"schema":1,"layers":[],"findings":[{"rule":"r","layer":"a","severity":"odd","message":"m"}]}',
    b'{"schema":1,"layers":[{"name":"a","kind":"dense","shape":[1,2]}]}',
]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: str(line[:30]))
def test_a_damaged_line_is_said_and_the_others_are_read(tmp_path, line):
    path = tmp_path / "run.jsonl"
    lines = [snapshot.to_json().encode() for snapshot in history()]
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]) + b"\n")
    with pytest.warns(
        SpectralWarning, match=r"History.read: line 2 of .*run\.jsonl is no snapshot \(\w+Error"
    ) as caught:
        assert [snapshot.step for snapshot in History.read(path)] == [10, 20, 40]
    assert len(caught) == 1


def test_a_file_of_runs_that_were_killed_before_their_first_line_was_whole_is_an_empty_history(tmp_path):
    line = full_snapshot().to_json().encode()
    (tmp_path / "run.jsonl").write_bytes(line[:1] + b"\n" + line[:200] + b"\n" + line[:30])
    with pytest.warns(SpectralWarning, match="line 1, 2 of"):
        assert len(History.read(tmp_path / "run.jsonl")) == 0


@pytest.mark.parametrize("between", [b"", b"\r"])
def test_a_file_whose_lines_have_grown_together_does_not_read_as_empty(tmp_path, between):
    (tmp_path / "run.jsonl").write_bytes(between.join(one.to_json().encode() for one in history()))
    with pytest.raises(WWMonitorError, match=r"line 1 of .*run\.jsonl is no snapshot \(JSONDecodeError: Extra data"):
        History.read(tmp_path / "run.jsonl")


@pytest.mark.parametrize("line", DAMAGED[1:], ids=lambda line: str(line[:30]))
def test_a_file_of_nothing_else_is_refused_by_name_and_line(tmp_path, line):
    (tmp_path / "run.jsonl").write_bytes(line + b"\n")
    with pytest.raises(WWMonitorError, match=r"line 1 of .*run\.jsonl is no snapshot"):
        History.read(tmp_path / "run.jsonl")


def test_a_line_longer_than_any_snapshot_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("ww_monitor.record.history._LONGEST_LINE", 4000)
    path, (first, *others) = tmp_path / "run.jsonl", (snapshot.to_json() for snapshot in history())
    path.write_text("\n".join([first, "x" * 3_000_000, *others]) + "\n")
    with pytest.warns(SpectralWarning, match="line 2 of"):
        assert len(History.read(path)) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None), lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_refused_and_not_opened(tmp_path, make):
    make(tmp_path / "run.jsonl")
    with pytest.raises(WWMonitorError, match=r"History.read: .*run\.jsonl' cannot be read: "):
        History.read(tmp_path / "run.jsonl")


@pytest.mark.parametrize("path", ["x" * 5000, "run\0.jsonl", "/dev/full", f"{__file__}/run.jsonl"])
def test_a_path_that_cannot_be_opened_is_refused(path):
    with pytest.raises(WWMonitorError, match=r"History.read: .* cannot be read: "):
        History.read(path)


@pytest.mark.parametrize("where", ["snapshot", "layer", "histogram", "entry", "skipped", "finding"])
def test_a_key_of_a_later_version_is_left_out(tmp_path, where):
    data = full_snapshot().to_dict()
    places = {
        "snapshot": data, "layer": data["layers"][0], "histogram": data["layers"][0]["esd"],
        "entry": data["layers"][0]["trap_entries"][0], "skipped": data["skipped"][0], "finding": data["findings"][0],
    }  # fmt: skip
    places[where]["colour"] = {"red": [1, 2]}
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(data) + "\n")
    (read,) = History.read(path)
    assert read.to_json() == full_snapshot().to_json()


@pytest.mark.parametrize("line", [1, 3])
def test_a_line_of_a_later_schema_is_refused_wherever_it_stands(tmp_path, line):
    rows = [snapshot.to_dict() for snapshot in history()]
    rows[line - 1]["schema"] = SCHEMA + 1
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(WWMonitorError, match=rf"line {line} of .*run\.jsonl: .*newer than this version"):
        History.read(path)


class Odd:
    """A value that no library's and no JSON's: it has not even a text."""

    def __str__(self):
        raise RuntimeError("no text")

    def __float__(self):
        raise RuntimeError("no number")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (torch.tensor(2.5), 2.5), (np.float32(2.5), 2.5), (np.int64(3), 3), (torch.ones(2), NAN), ("high", NAN),
        (Odd(), NAN), (1j, NAN), (None, NAN), (True, 1), (10**400, 10**400),
    ],
)  # fmt: skip
def test_a_metric_that_is_no_number_costs_its_value_only(value, read):
    one = Snapshot((layer(odd=value, alpha=3.0),), summary={"odd": value}, step=np.int64(4), seconds=np.float64(0.5))
    again = Snapshot.from_dict(json.loads(one.to_json()))
    assert again.layers[0].metrics == pytest.approx({"odd": read, "alpha": 3.0}, nan_ok=True)
    assert again.summary == pytest.approx({"odd": read}, nan_ok=True)
    assert (again.step, again.seconds) == (4, 0.5)


@pytest.mark.parametrize(
    ("steps", "read"),
    [
        ([0, 2, 4, 6], [0, 2, 4, 6]),
        ([0, 2, 4, 6, 3, 4, 6, 8], [0, 2, 3, 4, 6, 8]),
        ([0, 2, 2, 4], [0, 2, 4]),
        ([0, 2, 4, 0, 2], [0, 2]),
        ([None, None], [None, None]),
        ([4, None, 2], [4, None, 2]),
    ],
)
def test_what_a_resumed_run_saw_again_replaces_what_was_seen_first(tmp_path, steps, read):
    path = tmp_path / "run.jsonl"
    write(path, [Snapshot((), step=step, epoch=index) for index, step in enumerate(steps)])
    history = History.read(path)
    assert [snapshot.step for snapshot in history] == read
    assert history.last.epoch == len(steps) - 1


def test_an_empty_file_is_an_empty_history(tmp_path):
    (tmp_path / "run.jsonl").write_text("")
    assert len(History.read(tmp_path / "run.jsonl")) == 0


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.jsonl"):
        History.read(tmp_path / "run.jsonl")


# --- tables


@pytest.mark.parametrize(
    ("preset", "first"),
    [
        ("default", ["name", "kind", "role", "slices", "N", "M", "status", "verdict", "phase"]),
        (
            "weightwatcher",
            ["layer_id", "name", "longname", "layer_type", "N", "M", "Q", "rf", "has_esd", "status", "warning"],
        ),
    ],
)
def test_a_table_has_one_row_a_layer_and_one_column_a_metric(preset, first):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Conv2d(16, 24, 3))
    snapshot = ww_monitor.analyze(net, preset=preset)
    table = snapshot.to_pandas()
    assert list(table.columns) == first + [name for name, metric in TABLE[preset].items() if metric.standard]
    assert table[["N", "M"]].to_numpy().tolist() == [[40, 30], [24, 16]]
    assert table["alpha"].tolist() == [row.value("alpha") for row in snapshot.layers]
    named = "longname" if preset == "weightwatcher" else "name"
    assert table[named].tolist() == ["0", "1"]


@pytest.mark.parametrize(
    ("alpha", "status", "warning"),
    [
        (1.99, "success", "over-trained"),
        (2.0, "success", ""),
        (6.0, "success", ""),
        (6.01, "success", "under-trained"),
        (NAN, "failed", ""),
    ],
)
def test_the_weightwatcher_table_has_that_tools_labels_and_calls_no_failure_over_trained(alpha, status, warning):
    table = Snapshot(
        (Layer("a.fc", "dense", (1, 40, 20), metrics={"alpha": alpha}),), preset="weightwatcher"
    ).to_pandas()
    row = table.iloc[0]
    assert (row["status"], row["warning"], row["name"], row["longname"], row["Q"]) == (
        status,
        warning,
        "fc",
        "a.fc",
        2.0,
    )


# --- the index of layers by name


def test_a_snapshot_that_was_asked_for_a_layer_is_the_same_snapshot():
    """Equality, text, pickle and copies know nothing of the index."""
    asked, fresh = full_snapshot(), full_snapshot()
    before = pickle.dumps(asked)
    assert asked["encoder.1"] is asked.layers[1]
    assert asked == fresh
    assert (repr(asked), asked.to_dict()) == (repr(fresh), fresh.to_dict())
    assert pickle.dumps(asked) == before
    assert repr(pickle.loads(before)) == repr(copy.deepcopy(asked)) == repr(asked)
    assert vars(copy.deepcopy(asked)).keys() == vars(fresh).keys() < vars(asked).keys()
    other = dataclasses.replace(asked, layers=asked.layers[:1])
    with pytest.raises(KeyError, match=r"no layer 'encoder\.1'"):
        other["encoder.1"]


@pytest.mark.parametrize("names", [["a", "b"], ["b"], [], ["a", "b", "a"]])
def test_a_layer_is_found_by_name_as_by_looking_at_every_row(names):
    history = History(
        Snapshot(tuple(layer(name, alpha=10.0 * step + at) for at, name in enumerate(names[:count])), step=step)
        for step, count in enumerate((3, 1, 2, 0))
    )
    for name in ("a", "b", "c"):
        rows = [(one.step, row) for one in history for row in one.layers if row.name == name]
        assert history.of_layer(name) == [row for _, row in rows]
        assert history.series("alpha", layer=name) == ([step for step, _ in rows], [r.value("alpha") for _, r in rows])


def test_a_history_file_of_the_last_release_is_read():
    """Written by version 0.1 (commit 1929194), before rows told where they were solved: every value comes back."""
    path = Path(__file__).parent / "states" / "history.jsonl"
    written, read = map(json.loads, path.read_text().splitlines()), History.read(path)
    for line, snapshot in zip(written, read, strict=True):
        now = snapshot.to_dict()
        assert [layer.pop("solved_on") for layer in now["layers"]] == [""] * len(line["layers"])
        assert json.loads(json.dumps(now)) == line
    assert [snapshot.step for snapshot in read] == [0, 2, 4]
    assert [finding.rule for finding in read.findings if finding.severity == "critical"] == ["trap"]

"""The commands: what they print, where it goes, and the status they end with."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import warnings

import pytest
import torch

import ww_monitor
from tests.processes import run_python
from ww_monitor import History, Snapshot
from ww_monitor.record import Finding, Layer

CliRunner = pytest.importorskip("typer.testing").CliRunner
pytest.importorskip("rich")

from ww_monitor.cli import app  # noqa: E402 - needs typer
from ww_monitor.cli.watching import Following, drawn, view, worst  # noqa: E402

EVIL = "[red]<script>.weight"


def called(*arguments, status=0):
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == status, found.output
    return found


def refused(*arguments):
    """The one line of an error; status 2, nothing on standard output."""
    found = called(*arguments, status=2)
    assert found.stdout == ""
    said = [line for line in found.stderr.splitlines() if "note:" not in line]
    assert len(said) == 1, found.stderr
    return said[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file with a random layer whose name is markup, and a layer with a trap."""
    torch.manual_seed(0)
    trapped = torch.randn(48, 24)
    trapped[0, 0] = 40.0
    path = tmp_path_factory.mktemp("model") / "net.pt"
    torch.save({EVIL: torch.randn(48, 24), "fc.weight": trapped}, path)
    return path


def history_of(path, steps=(0, 10, 20)):
    rows = [
        Snapshot(
            (
                Layer("fine", "dense", (1, 9, 9), verdict="ok", metrics={"alpha": 3.0 + step / 100, "num_traps": 0.0}),
                Layer(
                    "bad", "dense", (1, 9, 9), verdict="ok", metrics={"alpha": 3.0, "num_traps": float(step > 0) * 2}
                ),
            ),
            findings=(Finding("trap", "bad", "critical", "bad: 2 traps", step=10),) if step == 10 else (),
            step=step,
            seconds=0.5,
        )
        for step in steps
    ]
    path.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
    return path


# --- analyze


def test_a_keras_file_is_read_without_tensorflow_and_its_lines(tmp_path, monkeypatch):
    """Whatever backend Keras has by default; the environment is what it was in the end."""
    keras = pytest.importorskip("keras")
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # for the writer of legacy files
    net = keras.Sequential([keras.layers.Dense(24)])
    net.build((None, 48))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.save(tmp_path / "epoch_1.keras")
        net.save(tmp_path / "epoch_2.h5")
    (tmp_path / "tensorflow.py").write_text("import os; os.write(2, b'TensorFlow greets\\n')")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    code = "import os, sys; from ww_monitor.cli import app; before = dict(os.environ), 'tensorflow' in sys.modules\n"
    code += "try: app()\nfinally: assert before == (dict(os.environ), 'tensorflow' in sys.modules)"
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    done = run_python("-c", code, "replay", str(tmp_path), PYTHONPATH=paths, KERAS_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert [one.step for one in History.read(tmp_path / "ww_replay.jsonl")] == [1, 2]


def test_analyze_shows_a_row_a_layer_its_names_as_they_are_and_the_findings(model):
    output = called("analyze", model).stdout
    assert "[red]<script>" in output
    assert re.search(r"fc +│ \S+ +│ 48×24", output)
    assert "‼ trap: fc:" in output


def test_json_and_csv_are_the_snapshot_and_nothing_else(model):
    expected = ww_monitor.analyze(model)
    found = Snapshot.from_dict(json.loads(called("analyze", model, "--json").stdout))
    assert [layer.name for layer in found.layers] == ["[red]<script>", "fc"]
    assert found["fc"].value("alpha") == expected["fc"].value("alpha")
    rows = list(csv.DictReader(io.StringIO(called("analyze", model, "--csv").stdout)))
    assert [float(row["num_traps"]) for row in rows] == [layer.value("num_traps") for layer in expected.layers]
    assert list(rows[0]) == list(expected.to_pandas().columns)
    assert "nan" not in {value for row in rows for value in row.values()}


def test_the_table_has_the_columns_that_a_preset_measures(model):
    lines = called("analyze", model, "--preset", "weightwatcher").stdout.splitlines()
    head, last = (
        next(line for line in lines if line.startswith("┃")),
        lines[-1],
    )  # a slow machine has a line of progress
    assert [cell.strip() for cell in head.strip("┃").split("┃")][3:] == ["alpha", "alpha-hat", "spikes", "headroom"]
    assert "–" not in last
    assert "alpha_weighted" in called("analyze", model, "--preset", "weightwatcher").stdout


def test_a_note_goes_to_standard_error(model, tmp_path):
    both = torch.load(model)
    torch.save({"model": both, "ema": dict(both)}, tmp_path / "two.pt")
    found = called("analyze", tmp_path / "two.pt", "--json")
    json.loads(found.stdout)
    assert found.stderr.startswith("ww-monitor: note: walk_files: ")
    assert called("analyze", tmp_path / "two.pt", "--json", "--part", "ema").stderr == ""
    assert called("describe", tmp_path / "two.pt", "--json", "--part", "ema").stderr == ""
    found = called("compare", tmp_path / "two.pt", tmp_path / "two.pt", "--json", "--part", "ema", "--part-b", "model")
    assert (found.stderr, json.loads(found.stdout)["summary"]["frobenius"]) == ("", 0)


def test_analyze_selects_and_writes_a_page(model, tmp_path):
    pytest.importorskip("plotly")
    arguments = ["analyze", model, "--include", "fc", "--json", "--html", tmp_path / "out.html"]
    found = called(*arguments, "--device", "cpu")
    assert [layer["name"] for layer in json.loads(found.stdout)["layers"]] == ["fc"]
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert f"<title>{model}: spectral report</title>" in page
    found = json.loads(called("analyze", model, "--exclude", "fc", "--preset", "weightwatcher", "--json").stdout)
    assert ([layer["name"] for layer in found["layers"]], found["preset"]) == (["[red]<script>"], "weightwatcher")


def test_the_status_is_3_where_what_was_asked_about_is_found(model, tmp_path):
    found = called("analyze", model, "--json", "--fail-on", "traps", status=3)
    json.loads(found.stdout)
    assert found.stderr == "ww-monitor: --fail-on traps: fc\n"
    called("analyze", model, "--fail-on", "over-trained")
    called("analyze", model, "--fail-on", "traps", "--exclude", "fc")
    torch.save({"a.weight": torch.full((16, 16), float("nan"))}, tmp_path / "nan.pt")
    for gate in ("broken-layers", "traps", "over-trained"):  # what has no spectrum has not passed
        assert called("analyze", tmp_path / "nan.pt", "--fail-on", gate, status=3).stderr.endswith(f"{gate}: a\n")


def test_over_trained_layers_fail_too(tmp_path):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(rows, 200, generator=generator))[0] for rows in (300, 200))
    sizes = (torch.arange(200) + 0.5).div(200) ** (-1 / (2 * 0.4))  # λ = quantiles of λ^-1.4
    torch.save({"fc.weight": u * sizes @ v.T}, tmp_path / "heavy.pt")
    found = called("analyze", tmp_path / "heavy.pt", "--fail-on", "over-trained", status=3)
    assert "--fail-on over-trained: fc" in found.stderr


def test_a_gate_that_nothing_measures_is_refused(model):
    said = called("analyze", model, "--preset", "weightwatcher", "--fail-on", "traps", status=2).stderr
    assert "--fail-on traps needs num_traps" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["analyze", "gone.pt"], "no file or directory 'gone.pt'"),
        (["analyze", "{model}", "--preset", "ww"], "preset must be one of 'default', 'weightwatcher'; got 'ww'"),
        (["analyze", "{model}", "--device", "gpu"], "device must be one that torch has here; got 'gpu'"),
        (["analyze", "{model}", "--device", "meta"], "got 'meta'"),
        (["analyze", "{model}", "--part", "ema"], "part must be one of those in it; got 'ema'"),
        (["analyze", "{model}", "--json", "--csv"], "expected one of --json and --csv, got both"),
        (["analyze", "{model}", "--fail-on", "trap"], "must be one of traps, over-trained, broken-layers; got 'trap'"),
        (["analyze", "{notes}"], "notes.txt"),
        (["analyze", "{model}", "--jsno"], "--jsno"),
        (["analyze"], "issing argument"),
        (["analyse", "{model}"], "analyse"),
        (
            ["analyze", "{model}", "--include", "zz*", "--fail-on", "traps"],
            "net.pt: expected a matrix to analyse, got none of 2, such as",
        ),
        (["analyze", "{model}", "--html", "{empty}"], "--html must be a file; got the folder"),
        (["compare", "{model}", "{model}", "--exclude", "*"], "expected a matrix to compare, got none"),
        (["compare", "{model}", "gone.pt"], "gone.pt"),
        (["compare", "{model}", "{model}", "--unpaired", "x"], "unpaired must be one of 'error', 'skip'; got 'x'"),
        (["describe", "gone.pt"], "gone.pt"),
        (["metrics", "--preset", "x"], "got 'x'"),
        (["report", "gone"], "gone"),
        (["report", "{run}", "-o", "{empty}"], "report: path must be a file, got the folder"),
        (["watch", "gone"], "watch: no such file or folder: gone"),
        (["watch", "{empty}"], "expected a snapshot, got none"),
        (["watch", "{empty}", "--interval", "0"], "expected --interval > 0"),
        (["replay", "gone"], "'gone'"),
        (["replay", "gone/*.ckpt"], "gone/*.ckpt"),
        (["replay", "{notes}"], "notes.txt"),
        (["replay", "{empty}"], "expected one history file (ww_history.jsonl), got none; and no checkpoint (.safet"),
        (
            ["replay", "{model}", "--include", "zz*", "-o", "{empty}/a.jsonl"],
            "net.pt: expected a matrix to analyse, got none of 2, such as",
        ),
        (["replay", "{empty}/none.jsonl"], "none.jsonl"),
        (["replay", "{model}", "-o", "{notes}"], "notes.txt"),
        (["plan", "gpt3"], "got 'gpt3'"),
    ],
)
def test_bad_input_is_one_line_that_says_what_and_where(model, tmp_path, arguments, said):
    if arguments[0] == "plan":
        pytest.importorskip("transformers")
    places = {"model": model, "notes": tmp_path / "notes.txt", "empty": tmp_path / "empty"}
    places["run"] = history_of(tmp_path / "run.jsonl")
    places["notes"].write_text("hello\n")
    places["empty"].mkdir()
    line = refused(*(argument.format(**places) for argument in arguments))
    assert line.startswith("ww-monitor: ")
    assert said in line


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe\x00", b"[" * 100_000 + b"\n{}\n", b"{}\n{}\n", b'{"schema": 99}\n', b"", b'{"layers": 3}\n\n[]\n'],
    ids=["binary", "deep", "empty objects", "later schema", "empty", "wrong types"],
)
@pytest.mark.parametrize("command", ["replay", "report", "watch"])
def test_a_damaged_history_is_one_line_with_its_name(tmp_path, damage, command):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(damage)
    assert "bad.jsonl" in refused(command, path)


def test_a_value_of_another_type_is_one_line_too(tmp_path):
    path = history_of(tmp_path / "bad.jsonl")
    path.write_text(path.read_text().replace('"alpha":3.0', '"alpha":"x"'))
    for command in ("replay", "watch"):
        found = CliRunner().invoke(app, [command, str(path)])
        assert found.exit_code == 2 or found.exception is None
        assert "Traceback" not in found.output


def test_a_control_character_in_a_name_does_not_reach_the_terminal():
    assert "\x1b" not in refused("analyze", "a\x1b[31m\nb.pt")


def test_the_program_ends_with_the_status_and_without_a_traceback():
    done = run_python("-m", "ww_monitor.cli", "analyze", "gone.pt")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"ww-monitor: walk_files: no file .*\n", done.stderr)


# --- replay


def test_replay_of_a_history_gives_what_todays_rules_see(tmp_path):
    pytest.importorskip("plotly")
    path = history_of(tmp_path / "ww_history.jsonl")
    for given in (path, tmp_path):
        output = called("replay", given).stdout
        assert "trap at step 10: bad:" in output
        assert "3 snapshots, steps 0 to 20" in output
    assert "the options are for checkpoints" in refused("replay", path, "--include", "fc")


def test_replay_of_checkpoints_writes_a_history_beside_them_and_goes_on(tmp_path):
    for step in range(3):
        torch.save({"state_dict": {"fc.weight": torch.randn(20, 16)}, "global_step": step}, tmp_path / f"{step}.ckpt")
    output = called("replay", f"{tmp_path}/*.ckpt").stdout
    assert output.splitlines()[-1] == str(tmp_path / "ww_replay.jsonl")
    torch.save({"state_dict": {"fc.weight": torch.randn(20, 16)}, "global_step": 7}, tmp_path / "7.ckpt")
    assert "4 snapshots, steps 0 to 7" in called("replay", tmp_path).stdout
    assert [one.step for one in History.read(tmp_path / "ww_replay.jsonl")] == [0, 1, 2, 7]
    assert (
        "3 snapshots"
        in called("replay", *(tmp_path / f"{step}.ckpt" for step in range(3)), "-o", tmp_path / "o").stdout
    )


# --- compare, describe, and what they have in common


def test_compare_gives_a_row_a_pair(model, tmp_path):
    other = {name: 2 * weight for name, weight in torch.load(model).items()}
    torch.save(other, tmp_path / "b.pt")
    found = json.loads(called("compare", model, tmp_path / "b.pt", "--json", "--include", "fc").stdout)
    assert found["summary"]["relative"] == pytest.approx(1)
    rows = list(csv.DictReader(io.StringIO(called("compare", model, tmp_path / "b.pt", "--csv").stdout)))
    assert [(row["name"], row["shape"]) for row in rows] == [("[red]<script>", "1x48x24"), ("fc", "1x48x24")]
    assert "[red]<script>" in called("compare", model, tmp_path / "b.pt").stdout
    del other["fc.weight"]
    torch.save(other, tmp_path / "b.pt")
    assert "fc" in refused("compare", model, tmp_path / "b.pt")
    assert "left out fc: only in a" in called("compare", model, tmp_path / "b.pt", "--unpaired", "skip").stdout


def test_describe_gives_the_plan(model):
    assert "2 matrices, 48 eigenvalues" in called("describe", model).stdout
    found = json.loads(called("describe", model, "--json", "--exclude", "fc").stdout)
    assert [row["name"] for row in found["rows"]] == ["[red]<script>"]


def test_the_version_and_the_commands_are_told():
    assert called("--version").stdout.strip() == ww_monitor.__version__
    words = called("--help").stdout
    commands = ("analyze", "replay", "compare", "report", "watch", "describe", "plan", "metrics", "install-completion")
    assert all(command in words for command in commands)


# --- watch


def test_watch_shows_the_worst_layers_findings_and_what_is_next(tmp_path):
    history_of(tmp_path / "ww_history.jsonl")
    output = called("watch", tmp_path, "--layers", "1").stdout
    assert "bad" in output
    assert "fine" not in output
    assert "‼ trap at step 10: bad: 2 traps" in output
    assert "next analysis: about step 30; the last took 0.5 s" in output
    history_of(tmp_path / "ww_history.jsonl", steps=range(0, 400, 10))
    assert "40 snapshots, step 390" in called("watch", tmp_path).stdout


def test_a_run_is_followed_as_it_grows_and_begins_anew(tmp_path):
    path = tmp_path / "ww_history.jsonl"
    run = Following(path)
    assert not run.read(now=0.0)
    assert "no snapshot yet" in " ".join(drawn(view(run, layers=3, now=0.0)).split())
    lines = history_of(path, steps=(0, 10, 20, 30)).read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30])
    assert run.read(now=0.0)
    for now, data in ((10.0, lines[1][30:]), (20.0, lines[2] + b"damaged\n" + lines[3][:5])):
        with path.open("ab") as file:
            file.write(data)
        assert run.read(now=now)
    assert not run.read(now=21.0)
    shown = drawn(view(run, layers=3, now=24.0))
    assert "3 snapshots, step 20" in shown
    assert "about step 30, in about 6 s" in shown
    assert "1 damaged lines left out" in shown
    with path.open("ab") as file:
        file.write(lines[3][5:] + lines[1])  # resumed from step 10
    assert run.read(now=30.0)
    assert [one.step for one in run.history] == [0, 10]
    path.write_bytes(lines[0])
    assert run.read(now=40.0)
    assert (len(run.history), run.active) == (1, {})


def test_a_finding_that_ended_is_no_longer_shown(tmp_path):
    path = history_of(tmp_path / "ww_history.jsonl", steps=(0, 10))
    ended = Snapshot((), findings=(Finding("trap", "bad", "critical", "bad", step=20, state="end"),), step=20)
    path.write_text(path.read_text() + ended.to_json() + "\n")
    assert "no findings" in called("watch", path).stdout


def test_the_worst_are_broken_then_trapped_then_far_from_the_band():
    def layer(name, status="ok", **metrics):
        return Layer(name, "dense", (1, 9, 9), status=status, metrics=metrics)

    rows = (
        layer("fine", alpha=3.0, num_traps=0.0),
        layer("high", alpha=9.0, num_traps=0.0),
        layer("trapped", alpha=3.0, num_traps=2.0),
        layer("broken", status="not_finite"),
        layer("above", alpha=3.0, num_traps=0.0, trap_headroom=1.5),
    )
    assert [one.name for one in worst(Snapshot(rows), 9)] == ["broken", "trapped", "above", "high", "fine"]

"""Sinks: one contract for every sink of the folder, and what each of them writes."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import pickle
import pkgutil
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ww_monitor
from ww_monitor import sinks
from ww_monitor.errors import SpectralWarning, WWMonitorError
from ww_monitor.record import Finding, Histogram, History, Layer, Snapshot
from ww_monitor.sinks import Sink
from ww_monitor.sinks.console import Console, table
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.sinks.memory import Memory
from ww_monitor.sinks.tensorboard import TensorBoard
from ww_monitor.sinks.wandb import WandB

NAN = float("nan")


def snapshot(step: int | None = 10, **fields: Any) -> Snapshot:
    row = Layer(
        "encoder.fc",
        "dense",
        (1, 32, 16),
        verdict="ok",
        metrics={"alpha": 2.5 + (step or 0) / 100, "num_traps": 0.0, "sigma": NAN, "trap_headroom": 0.7},
        esd=Histogram(-2.0, 1.0, (3, 0, 5, 8)),
    )
    defaults = {
        "layers": (row,),
        "summary": {"alpha": row.metrics["alpha"], "sigma": NAN},
        "findings": (Finding("trap", "encoder.fc", "critical", "encoder.fc: 2 traps", step=step),),
    }
    return Snapshot(**{**defaults, **fields}, step=step)


# --- the contract

Factory = Callable[[Path], tuple[Sink, Callable[[], int] | None]]


def make_memory(folder: Path):
    sink = Memory()
    return sink, lambda: len(sink.history)


def make_json_lines(folder: Path):
    path = folder / "deep" / "run.jsonl"
    return JsonLines(path), lambda: len(History.read(path))


def make_console(folder: Path):
    lines: list[str] = []
    return Console(lines.append), lambda: len(lines)


def make_tensorboard(folder: Path):
    return TensorBoard(folder), lambda: len(scalars(folder).get("ww/alpha", []))


@pytest.fixture
def make_wandb(start_wandb, read_wandb):
    def make(folder: Path):
        run = start_wandb(folder)

        def count() -> int:
            run.finish()
            return sum("ww/alpha" in row for row in read_wandb(folder)["rows"])

        return WandB(run), count

    return make


FACTORIES = {
    "Memory": make_memory,
    "JsonLines": make_json_lines,
    "Console": make_console,
    "TensorBoard": make_tensorboard,
    "WandB": "make_wandb",
}
"""How the contract tests make a sink, and count the snapshots that arrived (a function, or the name of a fixture that
gives one); a new sink enters here."""


@pytest.fixture
def make_sink(request):
    def make(name: str, folder: Path):
        factory = FACTORIES[name]
        return (request.getfixturevalue(factory) if isinstance(factory, str) else factory)(folder)

    return make


def sink_classes() -> dict[str, type]:
    """Every public class with `write` that a module of the folder defines."""
    found = {}
    for module in pkgutil.iter_modules(sinks.__path__, prefix=f"{sinks.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and value.__module__ == module.name and not name.startswith("_"):
                found[name] = value
    return {name: value for name, value in found.items() if hasattr(value, "write")}


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = events(folder)
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_every_sink_of_the_folder_is_under_contract():
    assert sink_classes().keys() == FACTORIES.keys()


@pytest.mark.parametrize("name", sink_classes())
def test_a_sink_has_write_and_close_and_says_what_it_does(name):
    kind = sink_classes()[name]
    assert list(inspect.signature(kind.write).parameters) == ["self", "snapshot"]
    assert list(inspect.signature(kind.close).parameters) == ["self"]
    assert kind.__doc__
    assert kind.write.__doc__
    assert kind.close.__doc__


@pytest.mark.parametrize("name", FACTORIES)
def test_a_sink_takes_snapshots_of_every_kind(name, tmp_path, make_sink):
    sink, count = make_sink(name, tmp_path)
    assert isinstance(sink, Sink)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Conv2d(16, 16, 3), torch.nn.Linear(2, 2))
    net[0].weight.data[0, 0] = 9.0
    for one in (
        snapshot(),
        snapshot(None),
        Snapshot((), step=20),
        ww_monitor.analyze(net),
        ww_monitor.analyze(net, preset="weightwatcher"),
    ):
        sink.write(one)
    sink.close()
    assert count() >= 2


@pytest.mark.parametrize("name", FACTORIES)
def test_a_sink_can_be_closed_twice_and_unused(name, tmp_path, make_sink):
    used, count = make_sink(name, tmp_path / "used")
    used.write(snapshot())
    used.close()
    used.close()
    assert count() == 1
    unused, _ = make_sink(name, tmp_path / "unused")
    unused.close()
    unused.close()


@pytest.mark.parametrize("name", FACTORIES)
def test_a_write_after_close_opens_again(name, tmp_path, make_sink):
    sink, count = make_sink(name, tmp_path)
    for step in (10, 20, 30):
        sink.write(snapshot(step))
        sink.close()
    assert count() == 3


@pytest.mark.parametrize("name", FACTORIES)
def test_a_sink_leaves_the_snapshot_as_it_is(name, tmp_path, make_sink):
    one = snapshot()
    before = one.to_json()
    sink, _ = make_sink(name, tmp_path)
    sink.write(one)
    sink.close()
    assert one.to_json() == before


@pytest.mark.filterwarnings("ignore:.*writes there, so the keys of this one begin with '2/'")
@pytest.mark.parametrize("name", FACTORIES)
def test_a_sink_in_use_can_be_copied_and_the_copy_writes(name, tmp_path, make_sink):
    sink, _ = make_sink(name, tmp_path)
    sink.write(snapshot(10))
    for make_copy in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        made = make_copy(sink)
        made.write(snapshot(20))
        made.close()
    sink.write(snapshot(30))
    sink.close()


@pytest.mark.parametrize("name", ["TensorBoard", "WandB"])
def test_a_second_sink_in_use_on_a_log_has_keys_of_its_own_and_says_so_once(name, tmp_path, make_sink):
    first, count = make_sink(name, tmp_path)
    second = WandB(first.run) if name == "WandB" else TensorBoard(tmp_path)
    first.write(snapshot(0))
    with pytest.warns(SpectralWarning, match="the keys of this one begin with '2/'; give prefix="):
        second.write(snapshot(0))
    for sink in (first, second):
        sink.write(snapshot(1))
    first.close()
    third = WandB(first.run) if name == "WandB" else TensorBoard(tmp_path)
    third.write(snapshot(2))  # the first has left
    for sink in (second, third):
        sink.close()
    assert count() == 3


def test_a_copy_of_a_sink_has_not_the_writer_that_was_given_and_says_so(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        made = copy.deepcopy(TensorBoard(writer))
    with pytest.raises(WWMonitorError, match="got a copy without it; give a log folder"):
        made.write(snapshot())
    made.close()


@pytest.mark.parametrize("thing", [print, object(), "sink", {}, type("Half", (), {"write": print})()])
def test_what_lacks_write_or_close_is_no_sink(thing):
    assert not isinstance(thing, Sink)


# --- memory


def test_memory_keeps_the_snapshots_themselves():
    sink, one = Memory(), snapshot()
    sink.write(one)
    assert sink.history[0] is one
    assert not sink.closed
    sink.close()
    assert sink.closed


# --- JSON lines


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "a" / "b" / "run.jsonl"
    sink = JsonLines(path)
    assert not path.parent.exists()
    for count in (1, 2, 3):
        sink.write(snapshot(count))
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, count + 1))
    assert path.read_text().endswith("\n")
    sink.close()


def test_a_second_sink_appends(tmp_path):
    for step in (10, 20):
        sink = JsonLines(str(tmp_path / "run.jsonl"))
        sink.write(snapshot(step))
        sink.close()
    assert [one.step for one in History.read(tmp_path / "run.jsonl")] == [10, 20]


@pytest.mark.parametrize("torn", ["{", '{"schema":1,"layers":[', "x" * 5000])
@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_torn_last_line_stays_and_the_next_one_begins_behind_it(tmp_path, torn, whole):
    """A file that is only appended to loses nothing when the disk is full or the process is killed."""
    path = tmp_path / "run.jsonl"
    before = "".join(snapshot(step).to_json() + "\n" for step in range(whole)) + torn
    path.write_text(before)
    sink = JsonLines(path)
    sink.write(snapshot(50))
    sink.close()
    assert path.read_text() == before + "\n" + snapshot(50).to_json() + "\n"
    with pytest.warns(SpectralWarning, match=f"line {whole + 1} of .* is no snapshot"):
        assert [one.step for one in History.read(path)] == [*range(whole), 50]


def test_a_whole_last_line_without_its_newline_stays(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(snapshot(1).to_json())
    JsonLines(path).write(snapshot(2))
    assert [one.step for one in History.read(path)] == [1, 2]


@pytest.fixture
def small_disk(monkeypatch):
    """A function: from now on the disk has room for so many bytes."""
    room, write = [1 << 40], os.write

    def written(file, data):
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        count = write(file, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr("ww_monitor.sinks.jsonl.os.write", written)
    return lambda left: room.__setitem__(0, left)


@pytest.mark.parametrize("left", [0, 1, 500, -2, -1])
def test_a_disk_that_is_full_for_a_moment_costs_no_snapshot(tmp_path, small_disk, left):
    path, sink, length = tmp_path / "run.jsonl", JsonLines(tmp_path / "run.jsonl"), len(snapshot(1).to_json()) + 1
    sink.write(snapshot(1))
    for step in (2, 3):
        small_disk(left % length)
        with pytest.raises(OSError, match="No space"):
            sink.write(snapshot(step))
    small_disk(1 << 40)
    sink.write(snapshot(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralWarning)
        assert [one.step for one in History.read(path)] == [1, 2, 3, 4]


def test_a_resume_on_a_full_disk_leaves_the_file_as_it_is(tmp_path, small_disk):
    path = tmp_path / "run.jsonl"
    before = "".join(snapshot(step).to_json() + "\n" for step in range(50)) + '{"schema":1,'
    path.write_text(before)
    small_disk(0)
    with pytest.raises(OSError, match="No space"):
        JsonLines(path).write(snapshot(60))
    assert path.read_text() == before


@pytest.mark.parametrize("block", ["a file", "a folder in its place", "a name too long"])
def test_what_could_not_be_written_is_written_as_soon_as_it_can_be(tmp_path, block, monkeypatch):
    path = tmp_path / "folder" / "run.jsonl"
    if block == "a name too long":
        monkeypatch.setattr("ww_monitor.sinks.jsonl.os.makedirs", lambda *a, **k: os.mkdir("x" * 5000))
    (path.parent.write_text("") if block == "a file" else path.mkdir(parents=True)) if block[2] == "f" else None
    sink = JsonLines(path)
    for step in (1, 2):
        with pytest.raises(OSError):  # noqa: PT011 - which one the system says
            sink.write(snapshot(step))
    monkeypatch.undo()
    if block[2] == "f":
        path.parent.unlink() if block == "a file" else path.rmdir()
    sink.close()
    assert [one.step for one in History.read(path)] == [1, 2]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("how", [copy.deepcopy, lambda sink: pickle.loads(pickle.dumps(sink)), "fork"])
def test_lines_that_wait_are_written_once_by_the_sink_that_was_given_them(tmp_path, small_disk, how):
    """Twice in the file they would look like a resume, and what came after them would be left out."""
    sink = JsonLines(tmp_path / "run.jsonl")
    small_disk(0)
    with pytest.raises(OSError, match="No space"):
        sink.write(snapshot(1))
    small_disk(1 << 40)
    go_on, told = os.pipe()
    child = os.fork() if how == "fork" else 1
    if not child:
        os.read(go_on, 1)
        sink.close()
        os._exit(0)
    other = sink if how == "fork" else how(sink)
    sink.write(snapshot(2))
    os.write(told, b".")
    assert how != "fork" or os.waitpid(child, 0)[1] == 0
    other.close()
    assert [one.step for one in History.read(sink.path)] == [1, 2]
    assert len(sink.path.read_text().splitlines()) == 2


def test_a_folder_that_a_link_leads_to_is_made(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "not" / "there")
    JsonLines(tmp_path / "link" / "run.jsonl").write(snapshot(1))
    assert len(History.read(tmp_path / "not" / "there" / "run.jsonl")) == 1


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_what_somebody_has_removed_is_made_again(tmp_path, gone):
    path = tmp_path / "folder" / "run.jsonl"
    sink = JsonLines(path)
    sink.write(snapshot(1))
    path.unlink()
    if gone == "folder":
        path.parent.rmdir()
    sink.write(snapshot(2))
    assert [one.step for one in History.read(path)] == [2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_in_the_place_of_the_file_swallows_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    sink = JsonLines(path)
    os.mkfifo(path)
    for step in (0, 1):
        with pytest.raises(OSError, match="is a pipe"):
            sink.write(snapshot(step))
    path.unlink()
    sink.write(snapshot(2))
    assert [one.step for one in History.read(path)] == [0, 1, 2]


def test_lines_that_wait_are_bounded_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("ww_monitor.sinks.jsonl.MOST_WAITING", 3 * len(snapshot(10).to_json()) + 10)
    path = tmp_path / "run.jsonl"
    path.mkdir()
    sink = JsonLines(path)
    for step in range(10, 20):
        with pytest.raises(IsADirectoryError):
            sink.write(snapshot(step))
    path.rmdir()
    sink.close()
    assert [one.step for one in History.read(path)] == [17, 18, 19]


@pytest.mark.parametrize(
    ("there", "own", "expected"),
    [
        ([], True, "run.jsonl"),
        (["run.jsonl"], True, "run-1.jsonl"),
        (["run.jsonl", "run-1.jsonl"], True, "run-2.jsonl"),
        (["run-1.jsonl"], True, "run.jsonl"),
        (["run.jsonl"], False, "run.jsonl"),
    ],
)
def test_a_run_gets_a_file_of_its_own_or_the_one_it_continues(tmp_path, there, own, expected):
    for name in there:
        (tmp_path / name).write_text("")
    sink = JsonLines(tmp_path / "run.jsonl", own=own)
    for step in (1, 2):
        sink.write(snapshot(step))
    assert sink.path == tmp_path / expected
    assert [one.step for one in History.read(sink.path)] == [1, 2]


def test_runs_that_begin_at_the_same_moment_never_share_a_file(tmp_path):
    sinks = [JsonLines(tmp_path / "run.jsonl", own=True) for _ in range(8)]
    barrier = threading.Barrier(8)

    def run(number):
        barrier.wait()
        for step in range(20):
            sinks[number].write(snapshot(step, epoch=number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({sink.path for sink in sinks}) == 8
    for number, sink in enumerate(sinks):
        assert [(one.step, one.epoch) for one in History.read(sink.path)] == [(step, number) for step in range(20)]


# --- console


@pytest.mark.parametrize(
    ("severity", "state", "info", "line"),
    [
        ("critical", "begin", False, "ww_monitor ‼ trap at step 10: fc: 2 traps"),
        ("critical", "end", False, "ww_monitor ‼ trap is over at step 10: fc: 2 traps"),
        ("warning", "begin", False, "ww_monitor ! trap at step 10: fc: 2 traps"),
        ("info", "begin", False, None),
        ("info", "begin", True, "ww_monitor · trap at step 10: fc: 2 traps"),
    ],
)
def test_the_console_prints_a_line_a_finding(severity, state, info, line):
    lines: list[str] = []
    finding = Finding("trap", "fc", severity, "fc: 2 traps", step=10, state=state)
    Console(lines.append, info=info).write(snapshot(findings=(finding,)))
    assert lines == ([] if line is None else [line])


def test_the_console_prints_to_the_screen_by_default(capsys):
    Console().write(snapshot())
    assert capsys.readouterr().out == "ww_monitor ‼ trap at step 10: encoder.fc: 2 traps\n"


def test_the_console_is_silent_where_nothing_was_found(capsys):
    Console().write(snapshot(findings=()))
    assert capsys.readouterr().out == ""


def layer(name: str, *, shape=(1, 32, 16), verdict="ok", **metrics: float) -> Layer:
    return Layer(name, "dense", shape, verdict=verdict, metrics=metrics)


def cells(text: str) -> list[list[str]]:
    """The rows of a table without its frame."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_the_table_shows_alpha_from_the_first_snapshot_to_the_last():
    history = History(
        [
            Snapshot((layer("a", alpha=6.5), layer("b", alpha=NAN)), step=0),
            Snapshot((layer("a", alpha=99.0),), step=50),
            Snapshot(
                (
                    layer("a", alpha=3.25, trap_headroom=0.804, num_traps=0.0),
                    layer("b", shape=(9, 32, 16), verdict="poor_fit", alpha=4.0, trap_headroom=NAN, num_traps=1.667),
                    layer("new", alpha=2.0),
                ),
                step=100,
            ),
        ]
    )
    text = table(history)
    assert text.splitlines()[0].strip() == "ww_monitor: 3 snapshots, steps 0 to 100"
    assert cells(text) == [
        ["a", "32×16", "6.5 → 3.25", "ok", "0.8", "0"],
        ["b", "9×32×16", "– → 4", "poor_fit", "–", "1.67"],
        ["new", "32×16", "2 → 2", "ok", "–", "–"],
    ]


def test_the_table_of_many_layers_keeps_the_worst_in_model_order():
    rows = tuple(layer(f"l{i}", alpha=3.0, num_traps=float(i in (2, 7))) for i in range(10))
    text = table(History([Snapshot(rows, step=0)]), limit=3)
    assert [row[0] for row in cells(text)] == ["l0", "l2", "l7"]
    assert "7 more layers in the history" in text
    assert "more layers" not in table(History([Snapshot(rows, step=0)]), limit=10)


@pytest.mark.parametrize(("steps", "title"), [([None], "1 snapshot"), ([5], "1 snapshot, steps 5 to 5")])
def test_the_title_tells_the_span(steps, title):
    history = History([Snapshot((layer("a", alpha=3.0),), step=step) for step in steps])
    assert table(history).splitlines()[0].strip() == f"ww_monitor: {title}"


def test_the_table_of_nothing_is_empty():
    assert table(History()) == ""


def test_a_name_in_brackets_is_no_markup():
    assert cells(table(History([Snapshot((layer("blocks[red].fc", alpha=3.0),), step=0)])))[0][0] == "blocks[red].fc"


@pytest.mark.parametrize("name", FACTORIES)
def test_a_sink_touches_no_random_state_and_no_filter(name, tmp_path, make_sink):
    def surroundings():
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist(), list(warnings.filters)

    sink, _ = make_sink(name, tmp_path)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    first, second = ww_monitor.analyze(net), ww_monitor.analyze(net)
    sink.write(first)  # what imports do, they do once
    before = surroundings()
    sink.write(second)
    sink.close()
    assert surroundings() == before


def test_a_finding_of_many_layers_is_one_line():
    lines: list[str] = []
    findings = [Finding("under_trained", f"h.{i}", "warning", f"h.{i}: random", step=6) for i in range(73)]
    few = [Finding("over_trained", f"h.{i}", "warning", f"h.{i}: low", step=6) for i in range(2)]
    Console(lines.append).write(Snapshot((), findings=(*findings, *few), step=6))
    assert lines == [
        "ww_monitor ! under_trained at step 6: 73 layers (h.0, h.1, h.2, …), the first: h.0: random",
        "ww_monitor ! over_trained at step 6: h.0: low",
        "ww_monitor ! over_trained at step 6: h.1: low",
    ]

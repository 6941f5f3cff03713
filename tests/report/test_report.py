"""What a report says and holds, read from the page without a browser."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from html import unescape

import numpy as np
import pytest

import ww_monitor
from ww_monitor import Finding, History, InvalidArgument, Layer, Snapshot, WWMonitorError, write_report
from ww_monitor.record import Histogram, TrapEntry
from ww_monitor.report import recording
from ww_monitor.report.packing import packed

pytest.importorskip("plotly", reason="its script is in the page; `pip install plotly`")

NAN = float("nan")


def layer(name, **metrics):
    esd = Histogram(-2.0, 1.0, tuple(range(1, 9)))
    return Layer(name, "dense", (1, 64, 32), verdict="ok", metrics={"alpha": 3.0, **metrics}, esd=esd)


def snapshot(step, *layers, findings=(), alpha=3.0):
    return Snapshot(
        layers or (layer("fc1"), layer("fc2")), step=step, findings=tuple(findings), summary={"alpha": alpha}
    )


def saved(path, snapshots):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(one.to_json() + "\n" for one in snapshots), encoding="utf-8")
    return path


def block(page, name):
    text = re.search(f'<script type="text/plain" id="block-{name}">(.*?)</script>', page)[1]
    return zlib.decompress(base64.b64decode(text))


def facts(page):
    return json.loads(block(page, "meta"))["runs"]


@pytest.fixture
def write(tmp_path):
    """A function: the text of the page about some runs."""

    def made(*runs):
        return write_report(*runs, path=tmp_path / "pages" / "report.html").read_text(encoding="utf-8")

    return made


def sentences(page):
    inner = re.search(r'<ol id="lead">(.*?)</ol>', page, re.DOTALL)[1]
    return [unescape(re.sub("<[^>]+>", "", one)).strip() for one in re.findall(r"<li>(.*?)</li>", inner, re.DOTALL)]


def notes(page):
    return unescape(re.search(r'<ul class="quiet" id="notes">(.*?)</ul>', page, re.DOTALL)[1])


# --- where a run is found


def test_a_file_a_folder_and_snapshots_at_hand_are_runs(write, tmp_path):
    path = saved(tmp_path / "mine" / "ww_history.jsonl", [snapshot(0), snapshot(100)])
    runs = [path, str(path), path.parent, History.read(path), list(History.read(path))]
    assert [facts(write(run))[0]["steps"] for run in runs] == [[0, 100]] * 5
    assert [facts(write(run))[0]["name"] for run in runs[:3]] == ["mine"] * 3
    assert facts(write(snapshot(7)))[0]["steps"] == [7]


def test_a_folder_with_one_history_among_other_files_is_a_run(write, tmp_path):
    saved(tmp_path / "run" / "second.jsonl", [snapshot(5)])
    (tmp_path / "run" / "log.jsonl").write_text('{"loss": 1.0}\n')
    assert facts(write(tmp_path / "run"))[0]["steps"] == [5]
    saved(tmp_path / "deep" / "lightning_logs" / "version_0" / "ww_history.jsonl", [snapshot(6)])
    assert facts(write(tmp_path / "deep"))[0]["steps"] == [6]


def test_a_folder_with_several_histories_names_them(write, tmp_path):
    for name in ("one", "two"):
        saved(tmp_path / "run" / f"{name}.jsonl", [snapshot(5)])
    with pytest.raises(
        InvalidArgument, match=r"expected one history file .*, got 2; name one of .*one\.jsonl, .*two\.jsonl"
    ):
        write(tmp_path / "run")


def test_what_is_no_run_is_refused_in_one_line(write, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InvalidArgument, match=r"nothing: expected one history file \(ww_history\.jsonl\), got none"):
        write(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="report: no such file or folder"):
        write(tmp_path / "gone")
    for text in ("", "\n\n", "{", "no json\n", "[1]\n", '{"layers": 3}\n', b"\xff\xfe\n"):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InvalidArgument, match="expected a snapshot, got none"):
            write(path)
    with pytest.raises(InvalidArgument, match="the history: expected a snapshot, got none"):
        write(History())
    path.write_text(snapshot(0).to_json().replace('"schema":1', '"schema":99'))
    with pytest.raises(WWMonitorError, match=r"line 1 of .*schema 99 is newer"):
        write(path)
    assert not (tmp_path / "pages").exists()


def test_a_damaged_line_costs_itself_and_is_told(write, tmp_path):
    path = saved(tmp_path / "ww_history.jsonl", [snapshot(0), snapshot(1), snapshot(2)])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1][:40], lines[2], lines[0][:30]]))
    page = write(path)
    assert facts(page)[0]["steps"] == [0, 2]
    assert "Left out: 2 lines, the first 2, of the file, damaged or cut off." in notes(page)


@pytest.mark.parametrize(
    "odd",
    [
        {"step": "ten"},
        {"findings": [{"rule": "trap", "layer": "fc1", "severity": "info", "message": 3}]},
        {"summary": {"alpha": "high"}},
        {"layers": [{"name": "fc1"}]},
        {"layers": [{**snapshot(0).to_dict()["layers"][0], "metrics": {"alpha": 10**400}}]},
        {"layers": [{**snapshot(0).to_dict()["layers"][0], "metrics": {"alpha": "high"}}]},
    ],
)
def test_a_line_that_is_no_snapshot_costs_itself(write, tmp_path, odd):
    path = saved(tmp_path / "ww_history.jsonl", [snapshot(0)])
    with path.open("a") as file:
        file.write(json.dumps({**snapshot(1).to_dict(), **odd}) + "\n")
    page = write(path)
    assert facts(page)[0]["steps"] == [0]
    assert "Left out: line 2 of the file, damaged or cut off." in notes(page)


def test_where_a_run_was_resumed_the_later_account_holds(write, tmp_path):
    trap = Finding("trap", "fc1", "critical", "fc1: 2 traps", step=20)
    path = saved(
        tmp_path / "a.jsonl", [snapshot(0), snapshot(10), snapshot(20, findings=[trap]), snapshot(10, alpha=4.0)]
    )
    (run,) = facts(write(path))
    assert (run["steps"], run["summary"]["alpha"], run["spans"]) == ([0, 10], [3.0, 4.0], [])


# --- what it says


def test_every_resume_of_a_run_is_told(write, tmp_path):
    notes = [Finding("continues", "", "info", f"continues the run in folder {step}", step=step) for step in (10, 20)]
    path = saved(tmp_path / "run.jsonl", [snapshot(0), *(snapshot(one.step, findings=[one]) for one in notes)])
    (run,) = facts(write(path))
    assert [one.message for one in notes] == [span[3] for span in run["spans"]]


def test_three_sentences_say_what_to_look_at():
    begun = Finding("trap", "fc2", "critical", "fc2: 2 traps", step=10)
    drift = Finding("mean_shift", "fc1", "info", "fc1: the mean is large", step=10)
    run = [snapshot(0, alpha=5.0), snapshot(10, findings=[begun, drift]), snapshot(20)]
    first, second, third = map(unescape_tags, lead_of(run))
    assert first.startswith("Look first at fc2, which has had correlation traps since step 10: ")
    assert second.startswith("Then look at fc1, which has had a large mean weight since step 10: ")
    assert third == (
        "At step 20 a power law fits 2 of 2 layers, and mean alpha is 3.00, as in trained layers (2 to 6), "
        "after 5.00 at step 0."
    )


def lead_of(*runs):
    from ww_monitor.report.recording import recorded
    from ww_monitor.report.words import lead

    return lead([recorded(run) for run in runs])


def unescape_tags(html):
    return unescape(re.sub("<[^>]+>", "", html))


@pytest.mark.parametrize(
    ("run", "first", "second"),
    [
        (
            [snapshot(5)],
            "Nothing needs a look: no finding holds at step 5.",
            "How near the layers are to a correlation trap is not known here.",
        ),
        (
            [snapshot(5, layer("a", trap_headroom=0.3), layer("b", trap_headroom=NAN))],
            "Nothing needs a look: no finding holds at step 5.",
            "Nearest to a correlation trap is a: its largest weight is at 0.30 of the size that makes one.",
        ),
        (
            [snapshot(0, findings=[Finding("mine", "a", "warning", "a: 3 < 5.", step=0)]), snapshot(9)],
            "Look first at a since step 0: 3 < 5.",
            "How near the layers are to a correlation trap is not known here.",
        ),
        (
            [
                snapshot(0, findings=[Finding("trap", "a", "critical", "a: 1 trap")]),
                snapshot(9, findings=[Finding("trap", "a", "critical", "a: 1 trap", state="end")]),
            ],
            "Nothing needs a look: no finding holds at step 9.",
            "The finding “trap” in a was over at step 9.",
        ),
        (
            [snapshot(0, findings=[Finding("trap", f"l{i}", "critical", "x") for i in range(5)])],
            (
                "Look first at l0, l1, l2 and 2 more layers, which have correlation traps: "
                "weights grown so large that they act alone, a sign of memorising."
            ),
            "How near the layers are to a correlation trap is not known here.",
        ),
        (
            [snapshot(0, findings=[Finding("mine", "", "info", "all is well")])],
            "Look first at the model: all is well.",
            None,
        ),
        (
            [
                snapshot(0, findings=[Finding("actions", "", "info", "LayerwiseRate() acts", step=0)]),
                snapshot(9, findings=[Finding("mean_shift", "a", "info", "a: x", step=9)]),
            ],
            (
                "Look first at a, which has had a large mean weight since step 9: "
                "it makes an outlier of its own and does no harm by itself."
            ),
            "Then look at the model since step 0: LayerwiseRate() acts.",
        ),
    ],
)
def test_sentences_are_made_from_the_findings(run, first, second):
    told = list(map(unescape_tags, lead_of(run)))
    assert len(told) == 3
    assert told[0] == first
    assert second is None or told[1] == second


def test_two_runs_are_told_side_by_side(write):
    a, b = [snapshot(0), snapshot(10), snapshot(20)], [snapshot(0), snapshot(10, alpha=2.5)]
    told = sentences(write(a, b))
    assert [one[:6] for one in told[:2]] == ["Run A ", "Run B "]
    assert told[2] == "At step 10, the last that both have, mean alpha is 3.00 in A and 2.50 in B."


def test_names_that_attack_are_text_and_nothing_else(write):
    names = [
        "<script>alert(1)</script>",
        "../../x",
        "a\u2028b\u2029",
        "\"'`&amp;</script><img src=x onerror=alert(1)>",
        "\ud800{{script}}",
    ]
    findings = [Finding("trap", name, "critical", f"{name}: </script><script>alert(2)</script>") for name in names]
    page = write(snapshot(0, *map(layer, names), findings=findings))
    assert [one[0] for one in facts(page)[0]["layers"]] == names
    assert not re.search(r"<script>alert|<img|onerror=(?!alert\(1\)&gt;)", page)
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page)) == 2 + page.count('type="text/plain"')


def test_the_policy_of_the_page_forbids_the_network_and_other_scripts(write):
    page = write(snapshot(0))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in re.search("script-src (.*?);", policy)[1]
    assert not re.search(r"""(src|href)=["'](?!data:)""", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))


# --- the numbers


@pytest.mark.parametrize(
    ("values", "bits", "within"),
    [
        (np.random.default_rng(0).normal(3, 1, (40, 50)), 16, 1e-4),
        (np.random.default_rng(0).normal(3, 1, (600, 500)), 12, 2e-3),
        (np.random.default_rng(0).lognormal(0, 4, (40, 50)), 16, 1e-3),
        (np.arange(2000.0).reshape(40, 50), 16, 0.0),
        (np.full((3, 4), np.nan), 16, 0.0),
        (np.full((3, 4), 2.5), 16, 1e-12),
        (np.array([[np.nan, 1.0, np.inf, -2.0]]), 16, 0.0),
        (np.empty((0, 3)), 16, 0.0),
    ],
)
def test_what_the_page_unpacks_is_what_was_measured(values, bits, within):
    how, text = packed(values)
    low, high = (
        np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(2, *values.shape).astype(np.uint16)
    )
    codes = np.cumsum(low | high << 8, axis=1, dtype=np.uint16)
    y = how["low"] + how["step"] * (codes - 1.0)
    found = np.where(codes == 0, np.nan, how["scale"] * np.sinh(y / 1) if how["scale"] else y)
    known = np.isfinite(values)
    assert how["bits"] == bits
    assert (codes < 2**bits).all()
    assert (np.isnan(found) == ~known).all()
    sizes = np.maximum(1.0, np.abs(values[known]))
    assert (np.abs(found[known] - values[known]) <= within * sizes).all()


def test_a_long_run_of_a_large_model_is_thinned_and_says_so(write, monkeypatch):
    monkeypatch.setattr(recording, "MAX_SPECTRA", 8)
    monkeypatch.setattr(recording, "MAX_ROWS", 20)
    page = write([snapshot(step) for step in range(19)])
    (run,) = facts(page)
    assert run["columns"]["spectra"] == [0, 8, 16, 18]
    assert run["columns"]["all"] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert len(run["summary"]["alpha"]) == 19
    assert "all numbers are those of one snapshot in 2, and of the last" in notes(page)
    assert "spectra are those of one snapshot in 8, and of the last" in notes(page)


def test_trap_entries_that_are_left_out_are_counted(write, monkeypatch):
    monkeypatch.setattr(recording, "MAX_ENTRIES", 40)
    trapped = replace(layer("fc1"), trap_entries=tuple(TrapEntry(0, row, 3, 9.0 - row, 1.5) for row in range(5)))
    page = write([snapshot(step, trapped, layer("fc2")) for step in (*range(20), 19)])
    (run,) = facts(page)
    assert list(run["entries"]) == ["0", "4", "8", "12", "16", "19"]
    assert "70 of 100 trap entries are left out, of all but one snapshot in 4 and the last." in notes(page)
    assert "trap entries" not in notes(write([snapshot(step, trapped) for step in range(8)]))


def test_layers_and_metrics_that_come_and_go_keep_their_places(write):
    run = [
        snapshot(0, layer("a")),
        snapshot(1, layer("b", late=7.0), layer("a", late=8.0)),
        snapshot(2, layer("b"), layer("b")),
    ]
    (facts_,) = facts(write(run))
    assert [one[0] for one in facts_["layers"]] == ["a", "b", "b (2)"]
    how = facts_["metrics"]["late"]
    assert how["shape"] == [3, 3]
    assert [word.partition(":")[0] for word in facts_["judged"]] == ["until step 1", "well trained", "well trained"]


def test_snapshots_that_a_run_went_back_behind_are_counted(write):
    page = write([snapshot(step) for step in (0, 10, 10, 20, 30, 15)])
    assert facts(page)[0]["steps"] == [0, 10, 15]
    assert "3 snapshots were replaced: the run went back to an earlier step." in notes(page)
    assert "replaced" not in notes(write([snapshot(0), snapshot(1)]))


def test_a_finding_of_an_analysis_holds_until_one_lacks_it(write):
    """Analyses by themselves say what holds at them; a run says what begins and what ends."""
    trap = Finding("trap", "fc1", "critical", "fc1: 1 trap")
    run = [snapshot(step, findings=[trap] if step in (10, 20, 40) else ()) for step in range(0, 60, 10)]
    (found,) = facts(page := write(run))
    assert [(begin, end) for *_, begin, end in found["spans"]] == [(1, 3), (4, 5)]
    assert sentences(page)[0] == "Nothing needs a look: no finding holds at step 50."
    (found,) = facts(write([snapshot(0), snapshot(10, findings=[replace(trap, step=10)]), snapshot(20)]))
    assert [(begin, end) for *_, begin, end in found["spans"]] == [(1, None)]


def test_numbers_in_sentences_are_short(write):
    assert "mean alpha is 1e+200, above 6" in sentences(write([snapshot(0, alpha=1e200)]))[2]


def test_two_runs_without_a_common_layer_say_so(write):
    told = sentences(write([snapshot(0, layer("a"))], [snapshot(0, layer("b"))]))[2]
    assert told.endswith("; no layer of A has a partner of its name in B.")


def test_the_command_writes_the_page_and_refuses_in_one_line(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from ww_monitor.cli import app

    path = saved(tmp_path / "ww_history.jsonl", [snapshot(0), snapshot(100)])
    done = testing.CliRunner().invoke(app, ["report", str(tmp_path), str(path), "-o", str(tmp_path / "out.html")])
    assert (done.exit_code, done.output.split()) == (0, [str(tmp_path / "out.html")])
    assert len(facts((tmp_path / "out.html").read_text(encoding="utf-8"))) == 2
    done = testing.CliRunner().invoke(app, ["report", str(tmp_path / "gone")])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_a_report_of_an_analysis_needs_no_training(write):
    import torch

    page = write(ww_monitor.analyze(torch.nn.Linear(64, 32)))
    (run,) = facts(page)
    assert "Spectral report: 1 layer, one analysis<" in page
    assert not re.search(r"\bstep\b", " ".join(sentences(page)))
    assert run["bins"] == 64
    assert run["steps"] == [0]


def test_the_benchmarks_history_is_one_that_the_package_reads(write, tmp_path):
    from benchmarks.report import generate

    generate(tmp_path / "ww_history.jsonl", layers=3, snapshots=10)
    history = History.read(tmp_path / "ww_history.jsonl")
    assert [len(one.layers) for one in history] == [3] * 10
    (run,) = facts(write(tmp_path))
    assert set(run["metrics"]) == {entry.name for entry in ww_monitor.metrics() if entry.standard}
    assert len(run["spans"]) == 1

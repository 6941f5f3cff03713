"""TensorBoard's event files, read back by its own reader: scalars, charts, histograms, text and pictures."""

from __future__ import annotations

import gc
import io
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ww_monitor
from tests.processes import run_python
from ww_monitor import Monitor, plots
from ww_monitor.record import Finding, Histogram, Layer, Snapshot
from ww_monitor.sinks.heatmap import alpha_colours
from ww_monitor.sinks.tensorboard import Dashboard, TensorBoard
from ww_monitor.sinks.trackers import Dashboards
from ww_monitor.walk.torch import walk

pytest.importorskip("tensorboard", reason="tensorboard, the reader of the files, is not installed")

from torch.utils.tensorboard import SummaryWriter

NAN = float("nan")
BAND = {"ww_band/alpha_low": 2.0, "ww_band/alpha_high": 6.0}


def layer(name: str, **metrics: float) -> Layer:
    return Layer(name, "dense", (1, 32, 16), verdict="ok", metrics=metrics, esd=Histogram(-2.0, 1.0, (3, 0, 5, 8)))


def snapshot(step: int | None = 10, *findings: Finding, **fields: Any) -> Snapshot:
    row = layer("encoder.fc", alpha=2.5 + (step or 0) / 100, num_traps=0.0, sigma=NAN, trap_headroom=0.7)
    summary = {"alpha": row.metrics["alpha"], "sigma": NAN}
    return Snapshot(**{"layers": (row,), "summary": summary, **fields}, findings=findings, step=step)


def trap(name: str, step: int, state: str = "begin") -> Finding:
    return Finding("trap", name, "critical", f"{name}: 2 traps, w[3, 4] = 9", step=step, state=state)


@pytest.fixture
def scalars(read_events):
    def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
        events = read_events(folder)
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read


@pytest.fixture
def layouts(read_events):
    """Every layout that an event file has: charts with their kind and tags."""

    def read(folder: Path) -> list[dict[str, tuple[str, list[str]]]]:
        from tensorboard.plugins.custom_scalar import layout_pb2

        found = []
        for event in read_events(folder).Tensors("custom_scalars__config__"):
            layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
            charts = {}
            for category in layout.category:
                for chart in category.chart:
                    series = [tag for s in chart.margin.series for tag in (s.value, s.lower, s.upper)]
                    charts[category.title.partition("ww_monitor")[0] + chart.title] = (
                        chart.WhichOneof("content"),
                        [*chart.multiline.tag, *series],
                    )
            found.append(charts)
        return found

    return read


@pytest.fixture
def texts(read_events):
    def read(folder: Path, tag: str) -> list[tuple[int, str]]:
        events = read_events(folder).Tensors(f"{tag}/text_summary")
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]

    return read


@pytest.fixture
def images(read_events):
    def read(folder: Path, tag: str) -> list[tuple[int, np.ndarray]]:
        from PIL import Image

        events = read_events(folder).Images(tag)
        return [(e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))) for e in events]

    return read


# --- scalars and histograms


def test_every_value_is_at_its_step(tmp_path, scalars):
    sink = TensorBoard(str(tmp_path))
    sink.write(snapshot(10))
    sink.write(snapshot(25))
    sink.close()
    read = scalars(tmp_path)
    expected = {
        "ww/alpha": [(10, 2.6), (25, 2.75)],
        "ww_verdict/ok": [(10, 1.0), (25, 1.0)],
        "ww_alpha/encoder.fc": [(10, 2.6), (25, 2.75)],
        "ww_num_traps/encoder.fc": [(10, 0.0), (25, 0.0)],
        "ww_trap_headroom/encoder.fc": [(10, 0.7), (25, 0.7)],
        **{tag: [(10, edge), (25, edge)] for tag, edge in BAND.items()},
    }
    assert read.keys() == expected.keys()
    for tag, values in expected.items():
        assert read[tag] == [(step, pytest.approx(value)) for step, value in values]


def test_the_esd_of_a_real_layer_is_a_histogram(tmp_path, read_events):
    torch.manual_seed(0)
    row = ww_monitor.analyze(torch.nn.Linear(200, 120)).layers[0]
    sink = TensorBoard(tmp_path)
    sink.write(Snapshot((row,), step=7))
    sink.close()
    (event,) = read_events(tmp_path).Histograms(f"ww_esd/{row.name}")
    histogram = event.histogram_value
    assert event.step == 7
    assert histogram.bucket == list(row.esd.counts)
    assert histogram.bucket_limit == pytest.approx(row.esd.edges[1:])
    assert (histogram.min, histogram.max, histogram.num) == pytest.approx((row.esd.low, row.esd.high, 120))
    logs = torch.tensor(row.eigenvalues).log10()
    width = (row.esd.high - row.esd.low) / len(row.esd.counts)
    assert abs(histogram.sum / histogram.num - float(logs.mean())) < width
    assert histogram.sum_squares / histogram.num == pytest.approx(float(logs.square().mean()), abs=2 * width)


def test_a_layer_without_a_spectrum_has_no_histogram_and_no_value(tmp_path, read_events):
    sink = TensorBoard(tmp_path)
    sink.write(Snapshot((Layer("fc", "dense", (1, 8, 8), status="not_finite", metrics={"alpha": NAN}),), step=1))
    sink.close()
    tags = read_events(tmp_path).Tags()
    assert tags["histograms"] == []
    assert set(tags["scalars"]) == set(BAND)


def test_a_writer_that_was_given_stays_open(tmp_path, scalars):
    writer = SummaryWriter(tmp_path)
    sink = TensorBoard(writer)
    sink.write(snapshot(10))
    sink.close()
    assert "ww/alpha" in scalars(tmp_path)
    writer.add_scalar("loss", 1.0, 11)
    writer.close()
    assert scalars(tmp_path)["loss"] == [(11, 1.0)]
    assert len(list(tmp_path.iterdir())) == 1


def test_where_a_logger_writes_the_scalars_the_sink_does_not(tmp_path, scalars, read_events):
    sink = TensorBoard(tmp_path, scalars=False)
    sink.write(snapshot(10))
    sink.close()
    assert scalars(tmp_path).keys() == BAND.keys()
    assert read_events(tmp_path).Tags()["histograms"] == ["ww_esd/encoder.fc"]


# --- charts


def test_the_layout_is_written_once_a_writer(tmp_path, layouts):
    sink = TensorBoard(tmp_path)
    for step in (0, 10, 20):
        sink.write(snapshot(step))
    sink.close()
    (charts,) = layouts(tmp_path)
    assert charts == {
        "alpha of every layer and the band from 2 to 6": ("multiline", ["ww_alpha/.+", "ww_band/alpha_.+"]),
        "alpha of the model in the band from 2 to 6": (
            "margin",
            ["ww/alpha", "ww_band/alpha_low", "ww_band/alpha_high"],
        ),
        "correlation traps of every layer": ("multiline", ["ww_num_traps/.+"]),
        "trap headroom of every layer (above 1 a trap is expected)": (
            "multiline",
            ["ww_trap_headroom/.+", "ww/trap_headroom$", "ww_band/headroom$"],
        ),
    }


def test_the_edge_of_headroom_is_in_sight_where_a_layer_passes_it_although_tensorboard_leaves_outliers_out(
    tmp_path, layouts, scalars
):
    """One layer of 16 rises in the last third of the run; the outermost 5 % of all points are left out."""
    sink = TensorBoard(tmp_path)
    for step in range(60):
        highest = 0.9 + max(0, step - 40) / 40
        rows = tuple(layer(f"fc{i}", trap_headroom=highest if i == 0 else 0.5) for i in range(16))
        sink.write(Snapshot(rows, summary={"trap_headroom": highest}, step=step))
    sink.close()
    (charts,) = layouts(tmp_path)
    _, patterns = charts["trap headroom of every layer (above 1 a trap is expected)"]
    tags = {tag: points for tag, points in scalars(tmp_path).items() if any(re.match(one, tag) for one in patterns)}
    shown = [value for points in tags.values() for _, value in points]
    assert np.quantile(shown, 0.95) >= 1.0


def test_charts_follow_the_prefix_of_the_writers_owner(tmp_path, layouts, scalars):
    with SummaryWriter(tmp_path) as writer:
        Dashboard(prefix="train/").update(writer, snapshot(), 10)
    (charts,) = layouts(tmp_path)
    tags = [tag for _, tags in charts.values() for tag in tags]
    assert all(tag.startswith("train/ww") for tag in tags)
    assert scalars(tmp_path).keys() == {f"train/{tag}" for tag in BAND}


def test_only_metrics_that_there_are_have_charts(tmp_path, layouts):
    sink = TensorBoard(tmp_path)
    sink.write(Snapshot((layer("fc", alpha=NAN),), step=0))
    sink.close()
    (charts,) = layouts(tmp_path)
    assert len(charts) == 2
    assert all("alpha" in title for title in charts)


def test_a_first_snapshot_without_layers_does_not_settle_the_charts(tmp_path, layouts):
    sink = TensorBoard(tmp_path)
    sink.write(Snapshot((), step=0))
    sink.write(snapshot(10))
    sink.close()
    (charts,) = layouts(tmp_path)
    assert len(charts) == 4


def test_a_layout_of_the_owners_is_left_alone(tmp_path, layouts, scalars):
    with SummaryWriter(tmp_path) as writer:
        writer.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})
        TensorBoard(writer, layout=False).write(snapshot())
    assert layouts(tmp_path) == [{"mineloss": ("multiline", ["loss"])}]
    assert "ww_band/alpha_low" not in scalars(tmp_path)


# --- findings


def test_what_begins_ends_and_holds_is_text(tmp_path, texts):
    sink = TensorBoard(tmp_path)
    sink.write(snapshot(0))
    sink.write(snapshot(10, trap("fc_1", 10)))
    sink.write(snapshot(20))
    sink.write(snapshot(30, trap("fc_2", 30)))
    sink.write(snapshot(40, trap("fc_1", 40, "end"), trap("fc_2", 40, "end")))
    sink.close()
    read = texts(tmp_path, "ww/findings")
    assert [step for step, _ in read] == [10, 30, 40]
    assert "**critical** trap at step 10: fc\\_1: 2 traps, w\\[3, 4\\] = 9" in read[0][1]
    began, holding = read[1][1].split("Holding now:")
    assert "fc\\_2" in began
    assert "fc\\_1" not in began
    assert ["fc\\_1" in holding, "fc\\_2" in holding] == [True, True]
    assert "trap is over at step 40" in read[2][1]
    assert read[2][1].rstrip().endswith("Nothing holds now.")


def test_the_text_shows_a_layers_name_as_it_is(tmp_path, texts):
    markdown = pytest.importorskip("markdown", reason="markdown, TensorBoard's own renderer, is not installed")
    sink = TensorBoard(tmp_path)
    sink.write(snapshot(10, trap("blocks[0].__fc__*x*", 10)))
    sink.close()
    assert "blocks[0].__fc__*x*: 2 traps" in markdown.markdown(texts(tmp_path, "ww/findings")[0][1])


# --- pictures


def test_alpha_by_layer_and_step_is_a_picture_with_its_legend(tmp_path, images, texts):
    sink = TensorBoard(tmp_path)
    for step in (0, 10, 20):
        sink.write(Snapshot((layer("a", alpha=2.5), layer("b", alpha=5.0)), step=step))
    sink.close()
    read = images(tmp_path, "ww/alpha_map")
    assert [step for step, _ in read] == [0, 10, 20]
    for count, (_, picture) in enumerate(read, start=1):
        for alpha in (2.5, 5.0):
            cells = (picture == alpha_colours(np.array([alpha]))[0]).all(-1).sum()
            assert count * 36 * 18 <= cells < count * 36 * 18 + 200  # the scale of colours has some too
    assert [step for step, _ in texts(tmp_path, "ww/alpha_map")] == [0]
    assert "| 2 | `b` |" in texts(tmp_path, "ww/alpha_map")[0][1]


def test_the_picture_of_a_long_run_is_drawn_rarely_and_at_the_end(tmp_path, images):
    sink = TensorBoard(tmp_path, layout=False)
    for step in range(131):
        sink.write(Snapshot((Layer("a", "dense", (1, 8, 8), metrics={"alpha": 3.0}),), step=step))
    sink.close()
    steps = [step for step, _ in images(tmp_path, "ww/alpha_map")]
    assert steps == [*range(63), *range(63, 128, 2), 130]
    sink.close()
    assert len(images(tmp_path, "ww/alpha_map")) == len(steps)


def test_a_run_without_layers_has_no_picture(tmp_path, read_events):
    sink = TensorBoard(tmp_path)
    sink.write(Snapshot((), step=0))
    sink.close()
    assert read_events(tmp_path).Tags()["images"] == []


def test_dashboards_keep_their_writers_apart(tmp_path, texts, images, layouts):
    dashboard = Dashboards()
    for name in ("first", "second"):
        with SummaryWriter(tmp_path / name) as writer:
            dashboard.update(writer, Snapshot((layer(name, alpha=3.0),), step=5), 5, {})
    for name in ("first", "second"):
        assert len(layouts(tmp_path / name)) == 1
        assert f"| 1 | `{name}` |" in texts(tmp_path / name, "ww/alpha_map")[0][1]
        assert [step for step, _ in images(tmp_path / name, "ww/alpha_map")] == [5]


def test_two_monitors_of_a_writer_share_no_key_and_both_have_charts(tmp_path, read_events, layouts):
    def picture(_: Snapshot) -> dict[str, np.ndarray]:
        return {"fc": np.zeros((4, 4, 3), np.uint8)}

    def written(folder: Path, *prefixes: str) -> set[tuple[str, str]]:
        with SummaryWriter(folder) as writer:
            for prefix in prefixes:
                TensorBoard(writer, prefix=prefix, figures=picture).write(snapshot(10, trap("fc", 10)))
        return {
            (kind, tag) for kind, tags in read_events(folder).Tags().items() if isinstance(tags, list) for tag in tags
        }

    layout = ("tensors", "custom_scalars__config__")  # one for both
    alone = written(tmp_path / "alone", "") - {layout}
    both = written(tmp_path / "both", "teacher/", "student/")
    assert both == {layout, *((kind, prefix + tag) for prefix in ("teacher/", "student/") for kind, tag in alone)}
    assert {"scalars", "histograms", "images", "tensors"} <= {kind for kind, _ in alone}
    tags = {tag for _, series in layouts(tmp_path / "both")[-1].values() for tag in series}
    assert {"teacher/ww/alpha", "student/ww/alpha"} <= tags


def test_a_dashboard_does_not_keep_a_writer_alive(tmp_path):
    dashboard = Dashboards()
    writer = SummaryWriter(tmp_path)
    dashboard.update(writer, snapshot(), 0, {})
    writer.close()
    gone = weakref.ref(writer)
    del writer
    gc.collect()
    assert gone() is None


def test_figures_of_real_layers_are_pictures_of_their_spectrum(tmp_path, images):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(60, 40), torch.nn.Linear(40, 30))
    figures = plots.SpectralFigures(["1"], every=2, matrices=lambda: walk(net))
    monitor = Monitor(every_n_steps=1, sinks=[TensorBoard(tmp_path, figures=figures)])
    for step in range(3):
        monitor.observe(walk(net), step=step)
    monitor.close()
    read = images(tmp_path, "ww_spectrum/1")
    assert [step for step, _ in read] == [0, 2]
    assert read[0][1].shape == (440, 660, 3)
    assert len(np.unique(read[0][1].reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("method", ["add_custom_scalars", "add_histogram_raw", "add_text", "add_image"])
def test_a_kind_of_content_that_fails_costs_itself_alone(tmp_path, monkeypatch, scalars, read_events, method):
    sink = TensorBoard(tmp_path)

    def broken(*args, **kwargs):
        raise OSError("no ink")

    monkeypatch.setattr(sink.writer, method, broken)
    with pytest.raises(OSError, match="no ink"):
        sink.write(snapshot(10, trap("fc", 10)))
    monkeypatch.undo()
    sink.write(snapshot(20))
    sink.close()
    assert [step for step, _ in scalars(tmp_path)["ww_alpha/encoder.fc"]] == [10, 20]
    tags = read_events(tmp_path).Tags()
    lost = {
        "add_histogram_raw": "ww_esd",
        "add_text": "ww/findings",
        "add_custom_scalars": "custom",
        "add_image": "map",
    }
    first = [tag for kind in ("histograms", "tensors", "images") for tag in tags[kind]]
    for other in {"add_histogram_raw", "add_text", "add_image"} - {method}:
        assert any(lost[other] in tag for tag in first), other


def test_no_line_of_tensorflow_appears_when_a_folder_is_written_to(tmp_path):
    """TensorFlow and oneDNN greet on the standard error of whoever imports them, as PyTorch's own writer does."""
    code = (
        "import sys; from ww_monitor.record import Layer, Snapshot;"
        "from ww_monitor.sinks.tensorboard import TensorBoard;"
        "layer = Layer('fc', 'dense', (1, 8, 8), metrics={'alpha': 3.0});"
        "sink = TensorBoard(sys.argv[1]); sink.write(Snapshot((layer,), summary={'alpha': 3.0}, step=1)); sink.close();"
        "print([name for name in sys.modules if name.split('.')[0] == 'tensorflow'])"
    )
    done = run_python("-c", code, str(tmp_path))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_sink_that_was_closed_goes_on_in_another_file(tmp_path, scalars):
    sink = TensorBoard(tmp_path)
    for step in (10, 20):
        sink.write(snapshot(step))
        sink.close()
    assert [step for step, _ in scalars(tmp_path)["ww/alpha"]] == [10, 20]


def test_a_drawing_that_fails_loses_nothing_else(tmp_path, scalars, images):
    def broken(snapshot):
        raise ValueError("no ink")

    net = torch.nn.Linear(40, 30)
    monitor = Monitor(every_n_steps=1, sinks=[TensorBoard(tmp_path, figures=broken)])
    with pytest.warns(ww_monitor.SpectralWarning, match="sink TensorBoard failed: ValueError: no ink"):
        monitor.observe(walk(net), step=0)
    monitor.close()
    assert "ww/alpha" in scalars(tmp_path)
    assert len(images(tmp_path, "ww/alpha_map")) == 1

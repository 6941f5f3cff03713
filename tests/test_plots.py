"""Figures: the densities they draw integrate to what they claim, and every line is where the numbers say."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import ww_monitor
from ww_monitor import InvalidArgument, MissingDependency, plots
from ww_monitor.record import Finding, Histogram, History, Layer, Snapshot
from ww_monitor.walk.torch import walk

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

NAN = float("nan")


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    """A layer with correlations, a random kernel, and a layer with a trap."""
    torch.manual_seed(0)
    parts = torch.nn.Linear(200, 150), torch.nn.Conv2d(32, 48, 3), torch.nn.Linear(300, 80)
    with torch.no_grad():
        parts[0].weight += 0.02 * torch.randn(150, 30) @ torch.diag(torch.rand(30) ** -0.3) @ torch.randn(30, 200)
        parts[2].weight[3, 4] = 3.0
    return torch.nn.Sequential(*parts)


@pytest.fixture(scope="module")
def snapshot(net) -> Snapshot:
    return ww_monitor.analyze(net)


def line(axes, label):
    """x and y of the line whose label begins so."""
    (found,) = (line for line in axes.get_lines() if str(line.get_label()).startswith(label))
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def labels(axes) -> set[str]:
    return {text.get_text().split(",")[0] for text in axes.get_legend().get_texts()}


def mass(x: np.ndarray, y: np.ndarray) -> float:
    """∫ y dx over bins equal in log x, by their geometric middles: a bin is x · 2 sinh(h/2) wide."""
    return float((y * x).sum() * 2 * math.sinh(np.diff(np.log(x)).min() / 2))


def integral(x: np.ndarray, y: np.ndarray) -> float:
    """∫ y dx by the trapezoid rule."""
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


# --- the spectrum of a layer


@pytest.mark.parametrize("kept", [True, False])
def test_the_density_of_the_eigenvalues_integrates_to_one(snapshot, kept):
    for layer in snapshot.layers:
        drawn = layer if kept else replace(layer, eigenvalues=None)
        x, y = line(plots.spectrum(drawn), "eigenvalues")
        assert mass(x, y) == pytest.approx(1, rel=1e-6)
        known = np.asarray(layer.eigenvalues)
        assert known.min() * 0.9 < x.min() < x.max() < known.max() * 1.1


@pytest.mark.parametrize("index", [0, 1])
def test_the_bulk_is_the_law_of_the_random_part(snapshot, index):
    layer = snapshot.layers[index]
    x, y = line(plots.spectrum(layer), "Marchenko")
    spikes = layer.value("num_spikes") / len(layer.eigenvalues)
    assert integral(x, y) == pytest.approx(1 - spikes, abs=0.02)
    assert (x.min(), x.max()) == pytest.approx((layer.value("bulk_min"), layer.value("bulk_max")), rel=0.1)


def test_the_bulk_runs_through_the_eigenvalues_of_a_random_layer(snapshot):
    axes = plots.spectrum(snapshot.layers[1])
    (x, y), (bulk_x, bulk_y) = line(axes, "eigenvalues"), line(axes, "Marchenko")
    inside = (x > 2 * bulk_x.min()) & (x < 0.8 * bulk_x.max())
    ratio = y[inside] / np.interp(x[inside], bulk_x, bulk_y)
    assert abs(np.median(ratio) - 1) < 0.15


@pytest.mark.parametrize("kept", [True, False])
def test_the_power_law_has_its_exponent_and_the_weight_of_its_tail(snapshot, kept):
    layer = snapshot.layers[0]
    alpha, xmin = layer.value("alpha"), layer.value("xmin")
    x, y = line(plots.spectrum(layer if kept else replace(layer, eigenvalues=None)), "power law")
    slope = np.diff(np.log(y)) / np.diff(np.log(x))
    assert slope == pytest.approx(np.full(len(slope), -alpha), rel=1e-6)
    assert x[0] == pytest.approx(xmin)
    to_infinity = y[0] * xmin / (alpha - 1)
    share = layer.value("n_tail") / len(layer.eigenvalues)
    assert to_infinity == pytest.approx(share, rel=1e-6 if kept else 0.15)


def test_a_shuffled_trap_stands_outside_the_bulk_and_shuffled_correlations_do_not(net, snapshot):
    for index, trapped in ((0, False), (2, True)):
        layer, matrix = snapshot.layers[index], next(m for m in walk(net) if m.name == str(index))
        values = plots.shuffled_eigenvalues(matrix)
        assert len(values) == len(layer.eigenvalues)
        rows, columns = layer.shape[1:]
        edge = values.sum() / (rows * columns) * (rows**0.5 + columns**0.5) ** 2
        assert (values[-1] > 1.2 * edge) == trapped
        x, y = line(plots.spectrum(layer, shuffled=values), "shuffled")
        assert mass(x, y) == pytest.approx(1, rel=1e-6)
        assert x.max() == pytest.approx(values[-1], rel=0.25)


def test_a_shuffle_keeps_the_entries_and_the_scale_of_the_layer(net):
    for matrix in walk(net):
        weights = matrix.load().double()
        values = plots.shuffled_eigenvalues(matrix)
        centred = weights - weights.mean((1, 2), keepdim=True)
        assert values.sum() == pytest.approx(matrix.eigenvalue_factor * float(centred.square().sum()), rel=1e-3)
        assert (np.diff(values) >= 0).all()


def test_a_shuffle_touches_no_random_state_and_repeats(net):
    matrix = next(iter(walk(net)))
    before = torch.get_rng_state()
    first, second = plots.shuffled_eigenvalues(matrix, seed=1), plots.shuffled_eigenvalues(matrix, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, plots.shuffled_eigenvalues(matrix, seed=2))


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        (Layer("fc", "dense", (1, 8, 8), status="not_finite", metrics={"alpha": NAN}), set()),
        (Layer("fc", "dense", (1, 8, 8), esd=Histogram(-1, 1, (1, 2)), metrics={"alpha": NAN}), {"eigenvalues"}),
        (
            Layer("fc", "dense", (1, 8, 8), esd=Histogram(-1, 1, (1, 2)), metrics={"alpha": 2.5, "xmin": 0.5}),
            {"eigenvalues", "power law", "xmin = 0.5"},
        ),
        (Layer("fc", "dense", (1, 8, 8), eigenvalues=(0.0, 1.0, 1.0, 2.0)), {"eigenvalues"}),
    ],
)
def test_what_is_not_known_is_not_drawn(layer, shown):
    axes = plots.spectrum(layer)
    assert (set() if axes.get_legend() is None else labels(axes)) == shown
    assert plots.render(axes).shape == (440, 660, 3)


@pytest.mark.parametrize("value", [NAN, float("inf"), 0.0])
def test_a_layer_without_eigenvalues_is_drawn_or_refused_by_name(value):
    layer = ww_monitor.analyze({"fc.weight": torch.full((90, 80), value)}).layers[0]
    for scale in ("log-log", "log-lin", "lin-lin"):
        assert plots.render(plots.spectrum(layer, scale=scale)).ndim == 3
    assert plots.correlation_boundary(layer).get_lines()[:] == []
    assert plots.real_and_shuffled(layer, [1.0, 2.0]).get_xlabel() == "eigenvalue λ (weight²)"
    with pytest.raises(InvalidArgument, match="'fc'"):
        plots.xmin_scan(layer)


def test_a_layer_of_the_other_preset_is_drawn_too(net):
    axes = plots.spectrum(ww_monitor.analyze(net, preset="weightwatcher").layers[0])
    assert {"eigenvalues", "power law"} <= labels(axes)


# --- which layers, and when


def test_the_worst_have_traps_or_an_alpha_outside_its_band():
    def layer(name: str, **metrics: float) -> Layer:
        return Layer(name, "dense", (1, 9, 9), metrics=metrics, esd=Histogram(0, 1, (1,)))

    rows = (
        layer("fine", alpha=3.0, num_traps=0.0),
        layer("high", alpha=9.0),
        layer("low", alpha=1.0),
        layer("trapped", alpha=3.0, num_traps=2.0),
        layer("unknown", alpha=NAN),
        Layer("broken", "dense", (1, 9, 9), metrics={"num_traps": 9.0}),
    )
    names = [layer.name for layer in plots.worst(Snapshot(rows), count=9)]
    assert names == ["trapped", "high", "low", "fine", "unknown"]
    assert [layer.name for layer in plots.worst(Snapshot(rows), count=2)] == names[:2]


def test_figures_are_of_the_layers_that_were_chosen(snapshot):
    assert list(plots.SpectralFigures(["0", "[2-9]"])(snapshot)) == ["0", "2"]
    assert list(plots.SpectralFigures(count=1)(snapshot)) == ["2"]
    assert plots.SpectralFigures(["none"])(snapshot) == {}


def test_figures_come_at_the_first_snapshot_and_every_so_many(snapshot):
    figures = plots.SpectralFigures(["0"], every=3)
    assert [len(figures(snapshot)) for _ in range(7)] == [1, 0, 0, 1, 0, 0, 1]


def test_with_matrices_at_hand_the_shuffled_spectrum_is_drawn(net, snapshot):
    plain = plots.SpectralFigures(["0"])(snapshot)["0"]
    shuffled = plots.SpectralFigures(["0"], matrices=lambda: walk(net))(snapshot)["0"]
    assert plain.shape == shuffled.shape
    assert not np.array_equal(plain, shuffled)


@pytest.mark.parametrize("argument", ["count", "every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_count_must_be_a_positive_integer(argument, value):
    with pytest.raises(InvalidArgument, match=f"{argument} must be an integer >= 1"):
        plots.SpectralFigures(**{argument: value})


def test_pyplot_stays_out_of_it(snapshot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert list(plots.SpectralFigures(["0"])(snapshot)) == ["0"]


# --- curves


def test_curves_are_the_series_of_every_layer_and_traps_are_marked():
    snapshots = [
        Snapshot(
            tuple(Layer(name, "dense", (1, 9, 9), metrics={"alpha": step + off}) for name, off in (("a", 2), ("b", 4))),
            findings=(Finding("trap", "a", "critical", "a: 1 trap", step=step),) if step == 20 else (),
            step=step,
        )
        for step in (0, 10, 20)
    ]
    axes = plots.curves(History(snapshots))
    assert line(axes, "b")[0].tolist() == [0, 10, 20]
    assert line(axes, "b")[1].tolist() == [4, 14, 24]
    marks = [line.get_xdata() for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert [list(x) for x in marks] == [[20, 20]]
    assert labels(axes) == {"a", "b", "a trap begins"}


@pytest.mark.parametrize("draw", [lambda: plots.curves(History()), lambda: plots.spectrum(Layer("a", "d", (1, 2, 2)))])
def test_without_matplotlib_the_message_names_the_extra(monkeypatch, draw):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ww-monitor\[plots\]'"):
        draw()


def test_axes_that_are_given_are_drawn_into(snapshot):
    axes = plots.spectrum(snapshot.layers[0])
    before = len(axes.get_lines())
    assert plots.spectrum(snapshot.layers[1], ax=axes) is axes
    assert len(axes.get_lines()) > before


# --- legends, colours and names


def boxes(axes):
    """The boxes of the legend and of the axes, in pixels."""
    plots.render(axes)
    return axes.get_legend().get_window_extent(), axes.get_window_extent()


def run_of(count: int, *, steps=(0, 10, 20), offset: float = 0.0) -> History:
    return History(
        Snapshot(
            tuple(
                Layer(f"$fc_{number}", "dense", (1, 9, 9), metrics={"alpha": number + step + offset, "ks": 0.1})
                for number in range(count)
            ),
            summary={"alpha": 3.0 + step, "ks": 0.2},
            step=step,
        )
        for step in steps
    )


@pytest.mark.parametrize("count", [1, 14, 300])
def test_a_legend_of_curves_covers_no_data_however_many_layers(count):
    axes = plots.curves(run_of(count))
    legend, inside = boxes(axes)
    assert legend.x0 >= inside.x1
    named = len(axes.get_legend().get_texts())
    assert named == count if count <= 14 else named <= 15
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines() if count < 20}
    assert len(styles) == (count if count < 20 else 0)


def test_names_in_legends_are_as_they_are(snapshot):
    """matplotlib leaves a label with an underscore in front out, and reads formulas between dollars."""
    names = ["_enc", "__proto__", "$a$", "<b>"]
    rows = tuple(Layer(name, "dense", (1, 9, 9), metrics={"alpha": 3.0}) for name in names)
    axes = plots.curves(History([Snapshot(rows, step=0), Snapshot(rows, step=9)]))
    plots.render(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    axes = plots.histogram_of_two(snapshot, snapshot, names=("_ema", "$x$"))
    plots.render(axes)
    assert [text.get_text().split()[0] for text in axes.get_legend().get_texts()] == ["_ema", "$x$"]
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize("draw", ["spectrum", "log-lin", "lin-lin", "real", "detx", "histogram"])
def test_a_legend_of_other_pictures_covers_no_data(net, snapshot, draw):
    layer = snapshot.layers[0]
    axes = {
        "spectrum": lambda: plots.spectrum(layer),
        "log-lin": lambda: plots.spectrum(layer, scale="log-lin"),
        "lin-lin": lambda: plots.spectrum(layer, scale="lin-lin"),
        "real": lambda: plots.real_and_shuffled(layer, plots.shuffled_eigenvalues(next(iter(walk(net))))),
        "detx": lambda: plots.correlation_boundary(layer),
        "histogram": lambda: plots.histogram_of_two(snapshot, snapshot),
    }[draw]()
    legend, inside = boxes(axes)
    assert legend.y1 <= inside.y0
    label = axes.xaxis.label.get_window_extent()
    assert legend.y1 <= label.y0
    assert legend.y0 >= 0


# --- the other scales


def at(axes, label: str) -> float:
    """Where the vertical line of that label is."""
    (x, _) = line(axes, label)
    assert x[0] == x[1]
    return float(x[0])


def test_the_lines_of_a_spectrum_stand_where_the_snapshot_has_them_and_are_named(snapshot):
    for layer in snapshot.layers:
        axes = plots.spectrum(layer)
        assert at(axes, "xmin = ") == layer.value("xmin")
        assert at(axes, "its edge = ") == layer.value("bulk_max")
        assert {f"xmin = {layer.value('xmin'):.3g}", f"its edge = {layer.value('bulk_max'):.3g}"} <= labels(axes)


@pytest.mark.parametrize("scale", ["log-lin", "lin-lin"])
def test_densities_on_other_scales_are_shares_too(snapshot, scale):
    for layer in snapshot.layers[:2]:
        axes = plots.spectrum(layer, scale=scale)
        assert (axes.get_xscale(), axes.get_yscale()) == ({"log-lin": "log", "lin-lin": "linear"}[scale], "linear")
        x, y = line(axes, "eigenvalues")
        width = np.diff(np.log10(x) if scale == "log-lin" else x).min()
        assert float(y.sum() * width) == pytest.approx(1, rel=1e-6)
        bulk_x, bulk_y = line(axes, "Marchenko")
        share = 1 - layer.value("num_spikes") / len(layer.eigenvalues)
        assert integral(np.log10(bulk_x) if scale == "log-lin" else bulk_x, bulk_y) == pytest.approx(share, abs=0.02)
        assert any(list(mark.get_xdata()) == [layer.value("bulk_max")] * 2 for mark in axes.get_lines())
    with pytest.raises(InvalidArgument, match="scale must be one of 'log-log', 'log-lin', 'lin-lin'; got 'lin'"):
        plots.spectrum(layer, scale="lin")


def test_real_against_shuffled_marks_where_the_shuffled_end(net, snapshot):
    layer, values = snapshot.layers[0], plots.shuffled_eigenvalues(next(iter(walk(net))))
    axes = plots.real_and_shuffled(layer, values)
    assert at(axes, "largest shuffled") == values.max()
    assert at(axes, "Marchenko–Pastur edge") == layer.value("bulk_max")
    areas = [patch.get_data() for patch in axes.patches if patch.get_label() in ("eigenvalues", "shuffled")]
    assert [float((one.values * np.diff(np.log10(one.edges))).sum()) for one in areas] == pytest.approx([1, 1])
    with pytest.raises(InvalidArgument, match="expected shuffled eigenvalues above 0"):
        plots.real_and_shuffled(layer, [])


@pytest.mark.parametrize("preset", ["default", "weightwatcher"])
def test_the_correlation_space_begins_at_the_purple_line_and_the_tail_at_the_red(net, snapshot, preset):
    layer = ww_monitor.analyze(net, preset=preset)["0"]
    axes = plots.correlation_boundary(layer)
    assert at(axes, "xmin") == layer.value("xmin")
    assert at(axes, "detX") == pytest.approx(snapshot["0"].value("erg_lambda"), rel=1e-6)
    colours = {mark.get_label().split(" ")[0]: mark.get_color() for mark in axes.get_lines()}
    assert (colours["xmin"], colours["detX"]) == ("red", "purple")


@pytest.mark.parametrize("index", [0, 2])
def test_the_scan_has_its_smallest_distance_and_the_layers_alpha_at_xmin(snapshot, index):
    layer = snapshot.layers[index]
    above, below = plots.xmin_scan(layer).axes
    assert (above.get_xscale(), below.get_xlabel()) == ("log", "xmin (weight²)")
    (x, distance), (_, alpha) = (
        (one.get_lines()[0].get_xdata(), one.get_lines()[0].get_ydata()) for one in (above, below)
    )
    assert x[np.argmin(distance)] == pytest.approx(layer.value("xmin"))
    assert distance.min() == pytest.approx(layer.value("ks"))
    assert alpha[np.argmin(distance)] == pytest.approx(layer.value("alpha"))
    assert at(above, "xmin") == at(below, "xmin") == layer.value("xmin")
    with pytest.raises(InvalidArgument, match="expected eigenvalues in the row of"):
        plots.xmin_scan(replace(layer, eigenvalues=None))


# --- runs and models


def test_two_runs_are_on_the_same_axes():
    left, right = plots.curves_of_two(run_of(2), run_of(2, offset=90), names=("a", "b")).axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_xlim() == right.get_xlim()
    assert (left.get_title(), right.get_title()) == ("a", "b")


def test_depth_and_time_has_a_cell_a_layer_and_snapshot():
    history = run_of(3, steps=(0, 10))
    history.append(Snapshot((Layer("late", "dense", (1, 9, 9), metrics={"alpha": 4.0}),), step=20))
    axes = plots.depth_and_time(history)
    (image,) = axes.get_images()
    expected = [[0, 10, np.nan], [1, 11, np.nan], [2, 12, np.nan], [np.nan, np.nan, 4]]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), expected)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["$fc_0", "$fc_1", "$fc_2", "late"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "10", "20"]
    assert image.get_clim() == (2, 6)
    plots.render(axes)
    with pytest.raises(InvalidArgument, match="expected a history with layers, got none"):
        plots.depth_and_time(History())


def test_alpha_and_its_distance_over_the_checkpoints():
    history = run_of(2)
    above, below = plots.fit_over_time(history, layer="$fc_1").axes
    assert above.get_lines()[0].get_xydata().tolist() == [[0, 1], [10, 11], [20, 21]]
    assert below.get_lines()[0].get_ydata().tolist() == [0.1] * 3
    assert plots.fit_over_time(history).axes[0].get_lines()[0].get_ydata().tolist() == [3, 13, 23]
    with pytest.raises(InvalidArgument, match="layer must be one of the history; got 'x'"):
        plots.fit_over_time(history, layer="x")


def test_two_models_are_counted_in_the_same_bins():
    a, b = run_of(12)[0], run_of(30)[0]
    axes = plots.histogram_of_two(a, b, names=("a", "b"))
    assert labels(axes) == {"a (12 layers)", "b (30 layers)"}
    assert [mark.get_xdata()[0] for mark in axes.get_lines()] == [5.5, 14.5]
    outlines = [patch.get_xy() for patch in axes.patches if str(patch.get_label()).startswith(("a (", "b ("))]
    assert sorted(set(outlines[0][:, 0])) == sorted(set(outlines[1][:, 0]))
    with pytest.raises(InvalidArgument, match="expected layers with 'nothing', got none"):
        plots.histogram_of_two(a, b, "nothing")


def test_a_series_of_models_is_a_point_each_with_its_name():
    models = {name: Snapshot((), summary={"alpha_hat": value}) for name, value in (("s", 3.0), ("m", 2.0), ("l", 1.0))}
    axes = plots.metric_and_error(models, {"l": 10.0, "m": 20.0, "s": 30.0})
    assert axes.get_lines()[0].get_xydata().tolist() == [[3, 30], [2, 20], [1, 10]]
    assert [text.get_text() for text in axes.texts] == ["s", "m", "l"]
    assert axes.get_title() == "Kendall's τ = 1.00"
    assert axes.get_ylabel() == "test error (%)"
    with pytest.raises(InvalidArgument, match=r"the same names .* got \['x'\] in one"):
        plots.metric_and_error(models, {"l": 1.0, "m": 2.0, "s": 3.0, "x": 1.0})
    with pytest.raises(InvalidArgument, match="expected 'beta' of every model"):
        plots.metric_and_error(models, {"l": 1.0, "m": 2.0, "s": 3.0}, "beta")


# --- notebooks


def test_a_notebook_shows_a_figure_without_pyplot(snapshot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figure = snapshot.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.axes[0].get_title().startswith("2: ")
    assert snapshot.plot("0").axes[0].get_title().startswith("0: ")
    drawn = run_of(2).plot("ks")
    assert [axes.get_ylabel() for axes in drawn.axes] == ["ks", "layer", "ks"]
    with pytest.raises(KeyError, match="no layer 'x'"):
        snapshot.plot("x")


def test_a_notebook_shows_tables_whose_texts_are_escaped():
    evil = "<script>alert(1)</script>"
    layer = Layer(evil, "dense", (1, 9, 9), verdict="ok", metrics={"alpha": 3.25})
    one = Snapshot((layer,) * 70, findings=(Finding("trap", evil, "critical", f"{evil}: 1 trap", step=3),), step=3)
    for record in (one, History([one])):
        shown = record._repr_html_()
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown
        assert "<td>3.25</td>" in shown
        assert "10 more layers" in shown
    assert "0 snapshots" in History()._repr_html_()

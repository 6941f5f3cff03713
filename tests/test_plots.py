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
            {"eigenvalues", "power law"},
        ),
        (Layer("fc", "dense", (1, 8, 8), eigenvalues=(0.0, 1.0, 1.0, 2.0)), {"eigenvalues"}),
    ],
)
def test_what_is_not_known_is_not_drawn(layer, shown):
    axes = plots.spectrum(layer)
    assert (set() if axes.get_legend() is None else labels(axes)) == shown
    assert plots.render(axes).shape == (440, 660, 3)


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

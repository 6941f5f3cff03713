"""Alpha by depth and time: which cell has which colour, and that a long run costs no more than a short one."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest

from ww_monitor.record import Layer, Snapshot
from ww_monitor.sinks.heatmap import AlphaMap, alpha_colours, is_milestone

NAN = float("nan")
WHITE = [255, 255, 255]


def snapshot(**alphas: float) -> Snapshot:
    return Snapshot(tuple(Layer(name, "dense", (1, 64, 64), metrics={"alpha": a}) for name, a in alphas.items()))


pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")


def filled(*snapshots: Snapshot) -> AlphaMap:
    picture = AlphaMap()
    for index, one in enumerate(snapshots):
        picture.add(one, 10 * index)
    return picture


def has_colour(picture: np.ndarray, colour: list[int]) -> int:
    return int((picture == colour).all(-1).sum())


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (0.5, 1.99, lambda r, g, b: r > 1.3 * g and r > 1.3 * b),
        (2.0, 4.0, lambda r, g, b: b > r),
        (5.0, 6.0, lambda r, g, b: g > b),
        (6.01, 50.0, lambda r, g, b: r == g == b < 255),
    ],
)
def test_the_hue_tells_the_band(low, high, kind):
    for colour in alpha_colours(np.linspace(low, high, 50)).astype(int):
        assert kind(*colour), colour


def test_unknown_is_white_and_nothing_else_is():
    assert alpha_colours(np.array([NAN])).tolist() == [WHITE]
    assert not (alpha_colours(np.linspace(0, 100, 5001)) == 255).all(-1).any()


def test_rows_are_layers_in_model_order_and_columns_are_steps():
    picture = filled(snapshot(b=3.0, a=4.0), snapshot(b=NAN, a=5.0), snapshot(b=2.5, a=6.0, late=7.0))
    assert picture.layer_names == ["b", "a", "late"]
    assert picture.steps == [0, 10, 20]
    expected = [[3.0, NAN, 2.5], [4.0, 5.0, 6.0], [NAN, NAN, 7.0]]
    np.testing.assert_array_equal(picture.values, expected)


def test_each_cell_has_the_colour_of_its_alpha():
    values = {"first": 2.2, "second": 5.4}
    picture = filled(*[snapshot(**values)] * 5).draw()
    assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
    at = {}
    for name, alpha in values.items():
        colour = alpha_colours(np.array([alpha]))[0].tolist()
        assert has_colour(picture, colour) >= 5 * 36 * 18
        at[name] = np.argwhere((picture[:, :-90] == colour).all(-1))[0]  # without the scale at the right
    assert at["second"][0] - at["first"][0] == 18


def test_a_layer_that_is_not_known_leaves_its_row_white():
    def unknown_row(alpha: float) -> np.ndarray:
        picture = filled(snapshot(a=3.0, b=alpha)).draw()
        row, column = np.argwhere((picture == alpha_colours(np.array([3.0]))[0]).all(-1))[0]
        return picture[row + 18 : row + 36, column : column + 36]

    assert (unknown_row(NAN) == 255).all()
    assert not (unknown_row(4.0) == 255).any()


def test_a_long_run_is_kept_in_bounded_columns_with_its_first_and_last_step():
    picture = AlphaMap(max_columns=16)
    for step in range(1001):
        picture.add(snapshot(a=float(step)), step)
        assert len(picture.steps) <= 17
        assert (picture.steps[0], picture.steps[-1]) == (0, step)
    assert picture.values[0].tolist() == picture.steps
    gaps = np.diff(picture.steps[:-1])
    assert gaps.min() == gaps.max() == 64


def test_what_a_resumed_run_repeats_replaces_what_was_there():
    picture = filled(*[snapshot(a=2.0)] * 4)
    picture.add(snapshot(a=5.0), 20)
    picture.add(snapshot(a=6.0), 30)
    assert picture.steps == [0, 10, 20, 30]
    assert picture.values.tolist() == [[2.0, 2.0, 5.0, 6.0]]


@pytest.mark.parametrize(("layers", "snapshots"), [(1, 1), (300, 3), (3, 300), (1000, 1)])
def test_the_picture_stays_of_a_size_for_a_screen(layers, snapshots):
    picture = filled(*[snapshot(**{f"block.{i}.attention.query_projection": 3.0 for i in range(layers)})] * snapshots)
    height, width, _ = picture.draw().shape
    assert height <= max(700, 2 * layers + 60)
    assert 200 <= width <= 1100


def test_names_of_any_alphabet_are_drawn():
    assert filled(snapshot(**{"层.重み": 3.0, "blocks[0]·q": 4.0})).draw().shape[2] == 3


def test_nothing_seen_is_an_empty_picture():
    assert filled(Snapshot(())).values.shape == (0, 1)
    assert AlphaMap().draw().shape[2] == 3


def test_without_matplotlib_there_is_no_picture(monkeypatch):
    monkeypatch.setattr("ww_monitor.sinks.heatmap.find_spec", lambda name: None)
    assert filled(snapshot(a=3.0)).draw() is None


def test_a_picture_leaves_matplotlib_as_it_was(monkeypatch):
    """No pyplot, and no setting of the user's changes."""
    import matplotlib

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = dict(matplotlib.rcParams)
    filled(snapshot(a=3.0)).draw()
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules


def test_the_legend_numbers_the_rows():
    legend = filled(snapshot(a=3.0, b=4.0)).legend()
    assert "| 1 | `a` |" in legend
    assert "| 2 | `b` |" in legend


def test_milestones_get_rarer_but_never_stop():
    counts = [count for count in range(1, 4097) if is_milestone(count)]
    assert counts[:63] == list(range(1, 64))
    assert all(later - earlier <= max(1, earlier // 32) for earlier, later in pairwise(counts))
    assert len(counts) == 64 + 6 * 32

"""A measurement of a user's own: where its values go, what it may give, and that it costs no other layer anything."""

import math

import numpy as np
import pytest
import torch

from tests.matrices import matrix, normal
from tests.stand_in import use_stand_in
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.errors import InvalidArgument
from ww_monitor.metric import MEASUREMENTS, TABLE, Loaded, measurement
from ww_monitor.metric.table import metric
from ww_monitor.spectra.elements import moments

NAN = float("nan")


@pytest.fixture
def entered(monkeypatch):
    """A maker of a measurement with a metric that reads it."""

    def enter(function, read=lambda batch: batch.column("mine"), **options):
        function.__name__ = "mine"
        measurement(**options)(function)
        monkeypatch.setitem(MEASUREMENTS, "mine", MEASUREMENTS.pop("mine"))
        read.__name__, read.__doc__ = "of_mine", "Of this test."
        monkeypatch.setitem(TABLE["default"], "of_mine", None)
        metric(source="this test", needs="mine", standard=False)(read)

    return enter


def corners(loaded, known, definitions):
    return {"mine": torch.stack([layer[0, 0, 0].double() for layer in loaded.layers])}


def items():
    shapes = [(40, 30), (60, 30), (30, 50), (40, 30), (20, 10)]
    found = [matrix(f"{k}", normal(*shape, seed=k)) for k, shape in enumerate(shapes)]
    return [*found, matrix("nan", torch.full((40, 30), NAN)), matrix("nan alone", torch.full((17, 9), NAN))]


def values(**options):
    found = analyze_matrices(items(), Options(metrics=["of_mine"], **options))
    return {layer.name: (layer.status, layer.value("of_mine")) for layer in found.layers}


@pytest.mark.parametrize("on_device", [False, True])
def test_the_values_reach_the_metric_by_name_whatever_the_shape(entered, monkeypatch, on_device):
    entered(corners)
    if on_device:
        use_stand_in(monkeypatch)
    found = values()
    assert [found[f"{k}"][1] for k in range(5)] == [float(item.load()[0, 0, 0]) for item in items()[:5]]
    for name in ("nan", "nan alone"):
        assert found[name][0] == "not_finite"
        assert math.isnan(found[name][1])


GIVES = {
    "whole numbers": lambda loaded: torch.tensor([layer.shape[1] for layer in loaded.layers]),
    "truths": lambda loaded: torch.tensor([True] * len(loaded.layers)),
    "as many as there are rows": lambda loaded: torch.stack([layer[0].sum(1)[:10].double() for layer in loaded.layers]),
    "a width of the shape": lambda loaded: torch.stack([layer[0].sum(1).double() for layer in loaded.layers]),
}


@pytest.mark.parametrize("give", GIVES.values(), ids=GIVES)
def test_it_may_give_any_kind_of_tensor(entered, give):
    def first(batch):
        column = batch.column("mine")
        return column if column.ndim == 1 else column[:, 0]

    entered(lambda loaded, known, definitions: {"mine": give(loaded)}, first)
    found = values()
    assert [status for status, _ in found.values()] == ["ok"] * 5 + ["not_finite"] * 2
    assert [math.isnan(value) for _, value in found.values()] == [False] * 5 + [True] * 2


def test_it_may_give_objects(entered):
    entered(
        lambda loaded, known, definitions: {"mine": [one.name for one in loaded.matrices]},
        lambda batch: batch.per_row([NAN if name is None else len(name) for name in batch.entries("mine")]),
    )
    assert [value for _, value in values().values()][:5] == [1.0] * 5


@pytest.mark.parametrize("on_device", [False, True])
def test_one_that_raises_for_a_layer_costs_that_layer_only(entered, monkeypatch, on_device):
    def picky(loaded, known, definitions):
        if any(one.name == "1" for one in loaded.matrices):
            raise ArithmeticError("no")
        return corners(loaded, known, definitions)

    entered(picky)
    if on_device:
        use_stand_in(monkeypatch)
    statuses = {name: status for name, (status, _) in values().items()}
    assert statuses.pop("1") == "error: ArithmeticError: no"
    assert set(statuses.values()) == {"ok", "not_finite"}


def test_one_that_leaves_a_layer_out_is_refused_not_shifted(entered):
    entered(lambda loaded, known, definitions: {"mine": torch.zeros(len(loaded.layers) - 1, dtype=torch.float64)})
    assert (
        values()["0"][0]
        == "error: ValueError: measurement 'mine': expected 1 values under a name of its own, got 0 under 'mine'"
    )


def test_one_that_takes_the_name_of_anothers_values_is_refused(entered):
    entered(
        lambda loaded, known, definitions: {"trap_headroom": known["trap_headroom"]},
        lambda batch: batch.column("trap_headroom"),
        after=("elements",),
    )
    assert "under a name of its own" in values()["0"][0]


def test_a_name_that_is_taken_and_an_unknown_predecessor_are_refused():
    with pytest.raises(InvalidArgument, match=r"after must be one of .*; got 'nothing'"):

        @measurement(after=("nothing",))
        def mine(loaded, known, definitions):
            return {}

    def elements(loaded, known, definitions):
        return {}

    with pytest.raises(InvalidArgument, match="there is one named 'elements' already"):
        measurement()(elements)


def test_a_metric_that_needs_what_nobody_measures_is_refused_where_it_is_chosen(monkeypatch):
    def of_nothing(batch):
        """Of nothing."""
        return batch.long_side

    monkeypatch.setitem(TABLE["default"], "of_nothing", None)
    metric(source="this test", needs="nothing", standard=False)(of_nothing)
    with pytest.raises(InvalidArgument, match=r"needs one of the measurements .*; got 'nothing'"):
        Options(metrics=["of_nothing"])


def test_rows_of_many_shapes_are_joined_once_each(monkeypatch):
    """As many tensors are put together for forty shapes as for twenty: each name once, not once a shape."""
    joined, cat = [], torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda tensors, *args, **kwargs: joined.append(1) or cat(tensors, *args, **kwargs)
    )

    def calls(count):
        joined.clear()
        analyze_matrices([matrix(f"{k}", normal(17 + k, 16, seed=k)) for k in range(count)], Options())
        return len(joined)

    assert calls(40) == calls(20)


@pytest.mark.parametrize(
    ("dead", "sides"),
    [
        (np.s_[:0], [100, 60]),
        (np.s_[3], [99, 60]),
        (np.s_[:, 7], [100, 59]),
        (np.s_[:45], [60, 55]),
        (np.s_[:30, 5:7], [100, 60]),  # as many zeros as a row has, in none
    ],
    ids=["none", "a row", "a column", "rows, so that fewer are left than columns", "a patch"],
)
def test_sides_are_counted_without_rows_and_columns_of_zeros(dead, sides):
    weights = normal(100, 60, seed=0)
    weights[dead] = 0
    loaded = Loaded([matrix("w", weights)], [weights[None, None]], weights.dtype, moments(weights[None]))
    found = MEASUREMENTS["live_sides"].function(loaded, {}, Options())
    assert found["live_sides"].tolist() == [sides]

"""Differences of two models are paired by name, computed late, and never silently left out."""

import functools

import pytest
import torch
from torch import nn

from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.settings import Select
from ww_monitor.walk.delta import delta, pair
from ww_monitor.walk.torch import walk


def matrix(name, shape=(1, 8, 8), value=1.0, dtype=torch.float32, kind="dense", role=""):
    return Matrix(name, kind, shape, functools.partial(torch.full, shape, value, dtype=dtype), role)


def test_pairs_by_name_whatever_the_order_and_keeps_kind_and_role():
    items = [matrix("a", kind="conv", role="conv", value=3.0), matrix("b", value=5.0)]
    found = list(delta(items, [matrix("b", value=1.0), matrix("a", value=1.0)]))
    assert [(item.name, item.kind, item.role, item.shape) for item in found] == [
        ("a", "conv", "conv", (1, 8, 8)),
        ("b", "dense", "", (1, 8, 8)),
    ]
    assert [item.load().unique().item() for item in found] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_subtracts_in_float32_at_least(ours, theirs, expected):
    (found,) = delta([matrix("a", value=257.0, dtype=ours)], [matrix("a", value=1.0, dtype=theirs)])
    assert found.load().dtype == expected
    assert found.load().unique().item() == matrix("a", value=257.0, dtype=ours).load().double().unique().item() - 1.0


def test_reads_nothing_before_it_is_asked_to():
    broken = Matrix("a", "dense", (1, 8, 8), lambda: 1 / 0)
    (found,) = delta([broken], [broken])
    with pytest.raises(ZeroDivisionError, match="division"):
        found.load()


def test_an_unchanged_layer_has_a_zero_spectrum_and_says_so():
    net = nn.Sequential(nn.Linear(16, 12), nn.Conv2d(3, 9, 3))
    layers = analyze_matrices(delta(walk(net), walk(net)), Options()).layers
    assert [layer.status for layer in layers] == ["zero", "zero"]


def test_names_what_does_not_pair_on_either_side():
    ours = [matrix("both"), matrix("new_head"), matrix("late")]
    theirs = [matrix("both"), matrix("old_head"), Skipped("late", "dense", (8, 8), "complex weights")]
    message = (
        r"delta: expected every matrix .* 'new_head': only in the model; 'late': only in the model, left out of the "
        r"base \(complex weights\); 'old_head': only in the base; leave such layers out with exclude"
    )
    with pytest.raises(InvalidArgument, match=message):
        delta(ours, theirs)


def test_names_the_layer_and_both_shapes_of_a_mismatch():
    with pytest.raises(InvalidArgument, match=r"'fc': shape \(1, 8, 4\) in the model and \(1, 4, 8\) in the base"):
        delta([matrix("fc", (1, 8, 4))], [matrix("fc", (1, 4, 8))])


def test_names_no_more_than_twenty():
    with pytest.raises(InvalidArgument, match=r"'19': only in the model; and 5 more; leave"):
        delta([matrix(str(i)) for i in range(25)], [])


def test_a_base_that_loads_in_another_shape_is_an_error_not_a_broadcast():
    base = Matrix("a", "dense", (1, 8, 8), lambda: torch.ones(1, 1, 8))
    (found,) = delta([matrix("a")], [base])
    with pytest.raises(ValueError, match=r"expected a base of shape \(1, 8, 8\), got \(1, 1, 8\)"):
        found.load()


def test_what_both_sides_leave_out_passes_through():
    old, new = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 9)), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
    select = Select(exclude=["1"])
    first, second = delta(select.apply(walk(new)), select.apply(walk(old)))
    assert isinstance(first, Matrix)
    assert second == Skipped("1", "dense", (1, 10, 8), "excluded by pattern '1'")


def test_pairing_can_be_read_without_an_error():
    pairs = pair([matrix("a"), matrix("b")], [matrix("b"), matrix("c")], called=("x", "y"))
    assert [(one.name, other.name) for one, other in pairs.matched] == [("b", "b")]
    assert pairs.unpaired == {"a": "only in x", "c": "only in y"}

"""What include and exclude select: every printed name itself, and a pattern that selects nothing is told."""

import warnings

import pytest
import torch
from torch import nn

from ww_monitor import Monitor, analyze
from ww_monitor.errors import SpectralWarning
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.settings import Select
from ww_monitor.walk.torch import walk

NAMES = ["fc", "fc.lora[default]", "fc.lora[d]", "fc.lorad", "a[1]", "a1", "h.*", "h.x", "what?", "whats", "[", "a!b"]


def items(names=NAMES):
    return [Matrix(name, "dense", (1, 20, 20), lambda: torch.eye(20)[None]) for name in names]


def kept(**options):
    return [item.name for item in Select(**options).apply(items()) if isinstance(item, Matrix)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_selects_exactly_itself(name):
    assert kept(include=[name]) == [name]
    assert kept(exclude=[name]) == [other for other in NAMES if other != name]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.lora[default]", ["fc.lora[default]"]),
        ("*.lora[d]", ["fc.lora[d]"]),
        ("*.lora[*]", ["fc.lora[default]", "fc.lora[d]"]),
        ("[ah]?[1x]", ["h.x"]),
        ("fc*", ["fc", "fc.lora[default]", "fc.lora[d]", "fc.lorad"]),
    ],
)
def test_brackets_are_a_name_s_own_where_it_has_them_and_a_choice_elsewhere(pattern, expected):
    assert kept(include=[pattern]) == expected
    assert kept(exclude=[pattern]) == [name for name in NAMES if name not in expected]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_warns_in_an_analysis(argument):
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20))
    with pytest.warns(
        SpectralWarning, match=rf"{argument}='body\.\*' matches no layer; the first are '0', '1'"
    ) as said:
        analyze(net, **{argument: ["body.*", "1"]}, base=net)
    assert len(said) == 1


def test_a_monitor_says_it_once():
    net = nn.Sequential(nn.Linear(20, 30))
    monitor = Monitor(every_n_steps=1, select=Select(exclude=["head"]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            monitor.observe(walk(net), step=step)
    assert [str(one.message) for one in said] == ["ww_monitor: exclude='head' matches no layer; the first are '0'"]


def test_a_pattern_that_matches_what_is_left_out_anyway_is_no_mistake():
    given = [*items(["fc"]), Skipped("norm", "other", (4, 4), "integer weights")]
    said = []
    assert len(list(Select(exclude=["norm"]).apply(given, say=said.append))) == 2
    assert list(Select(include=["x"]).apply([], say=said.append)) == []
    assert said == []

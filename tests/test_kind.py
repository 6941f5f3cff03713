"""Kinds of layers stand in one enumeration, and what depends on a kind hangs on its member."""

from __future__ import annotations

import ast
import doctest
import json
import pickle
from pathlib import Path

import pytest
import torch

import ww_monitor
from ww_monitor import kind as module
from ww_monitor.errors import InvalidArgument
from ww_monitor.kind import About, Kind
from ww_monitor.matrix import Matrix
from ww_monitor.record import Layer, Snapshot

ROOT = Path(ww_monitor.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py") if path.name != "kind.py"}


def words(source: str) -> list[int]:
    """The lines where a kind is written as a word."""
    known = set(map(str, Kind))
    constants = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [node.lineno for node in constants if isinstance(node.value, str) and node.value in known]


@pytest.mark.parametrize("name", SOURCES)
def test_no_other_module_writes_a_kind_as_a_word(name):
    assert words(SOURCES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source", ["kind == 'conv'", "kind in ('dense',)", "{'embedding': 1}", "Matrix('fc', 'attention')"]
)
def test_a_kind_written_as_a_word_would_be_seen(source):
    assert words(source) == [1]


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_says_what_holds_for_it(kind):
    assert isinstance(kind.about, About)
    assert kind.about.label
    assert kind.about.layer_type
    assert kind.about.role is None or isinstance(kind.about.role, str)
    least, most = kind.about.ndim
    assert 2 <= least <= most
    assert kind.about.eigenvalue_factor > 0


@pytest.mark.parametrize("kind", Kind)
def test_a_kind_is_its_word_wherever_it_is_written(kind):
    assert kind == kind.value == str(kind) == f"{kind}"
    assert json.dumps(kind) == f'"{kind.value}"'
    assert pickle.loads(pickle.dumps(kind)) is kind


def test_a_matrix_takes_a_kind_by_its_word_and_refuses_what_is_none():
    assert Matrix("fc", "conv", (1, 2, 2), torch.empty).kind is Kind.CONV
    with pytest.raises(InvalidArgument, match=r"Matrix 'fc': kind must be one of 'dense', .*; got 'linear'"):
        Matrix("fc", "linear", (1, 2, 2), torch.empty)


def test_records_hold_the_plain_word():
    snapshot = ww_monitor.analyze(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 2)))
    kinds = [row.kind for row in (*snapshot.layers, *snapshot.skipped)]
    assert kinds == ["dense", "dense"]
    assert {type(kind) for kind in kinds} == {str}


def test_a_record_of_an_unknown_kind_is_shown_as_a_dense_layer_in_the_other_tools_table():
    pytest.importorskip("pandas", reason="pandas, which makes the table, is not installed")
    rows = (Layer("a", "conv", (9, 8, 8)), Layer("b", "of a later version", (1, 8, 8)))
    assert list(Snapshot(rows, preset="weightwatcher").to_pandas()["layer_type"]) == ["conv2d", "dense"]


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(module).attempted

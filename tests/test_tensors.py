"""Every tensor that the package makes names its device and its type: a user's defaults are another's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ww_monitor

ROOT = Path(ww_monitor.__file__).parent

MAKERS = {
    "tensor", "as_tensor", "zeros", "ones", "full", "empty", "arange", "eye", "linspace", "logspace", "rand", "randn",
    "randint", "randperm", "where",
}  # fmt: skip


def number(node: ast.AST) -> bool:
    """Whether it is a floating-point number to the eye: a constant, `NAN`, `float(…)`, `torch.inf`."""
    if isinstance(node, ast.UnaryOp):
        return number(node.operand)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "float"
    constant = isinstance(node, ast.Constant) and isinstance(node.value, float)
    named = isinstance(node, ast.Name) and node.id.upper().strip("_") == "NAN"
    return constant or named or (isinstance(node, ast.Attribute) and node.attr in ("inf", "nan"))


def unnamed(tree: ast.AST) -> list[str]:
    """Calls of torch's factories that leave device or type to the defaults, by line."""
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        if node.func.attr == "where":
            found += [f"line {node.lineno}: torch.where of two numbers"] if all(map(number, node.args[1:])) else []
            continue
        missing = {"device", "dtype"} - {keyword.arg for keyword in node.keywords}
        if missing:
            found.append(f"line {node.lineno}: torch.{node.func.attr} without {' and '.join(sorted(missing))}")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_tensor_names_its_device_and_type(path):
    assert unnamed(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3)",
        "torch.eye(3, dtype=torch.float64)",
        "torch.arange(3, device=d)",
        "torch.where(x > 0, 0.0, NAN)",
        'torch.where(x > 0, float("nan"), -torch.inf)',
    ],
)
def test_one_that_does_not_is_found(line):
    assert len(unnamed(ast.parse(line))) == 1


def test_one_that_does_passes():
    assert (
        unnamed(ast.parse("torch.eye(3, dtype=torch.float64, device=d), numpy.zeros(3), torch.where(x > 0, x, 0.0)"))
        == []
    )

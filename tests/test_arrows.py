"""Imports point strictly downward, frameworks stay in the file about them, and every module says what it is."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ww_monitor

ROOT = Path(ww_monitor.__file__).parent
PACKAGE = "ww_monitor"

LEVELS = (
    {"errors", "kind"},
    {"record", "signatures"},
    {"matrix", "spectra"},
    {"settings"},
    {"walk", "metric", "schedule"},
    {"engine", "rules", "sinks", "baseline", "actions"},
    {"distributed"},
    {"monitor", "analysis", "description", "harm"},
    {"callbacks", "plots", "report", "compare", "checkpoints", "plan", "transforms"},
    {"cli"},
)
"""What stands where; a folder is one word. A module may import what stands below it, and its own folder."""

WALKERS = {"_adapter": {"sources"}, "_keras_steps": {"keras", "parts"}}
"""Who of the callbacks knows a walker: what they share, and what changes the variables of matrices."""

FRAMEWORKS = {
    "keras": {"callbacks.keras", "callbacks._keras_steps", "walk.keras"},
    "jax": {"walk.keras"},
    "tensorflow": {"walk.keras"},
    "pytorch_lightning": {"callbacks.lightning"},
    "lightning": {"callbacks.lightning"},
    "transformers": {"callbacks.huggingface", "plan.models"},
    "accelerate": {"callbacks.huggingface"},
    "peft": set(),
    "wandb": {"sinks.wandb"},
    "tensorboard": {"sinks.event_file"},
    "torch.utils.tensorboard": {"sinks.tensorboard"},
    "matplotlib": {
        "plots",
        "plots.axes",
        "plots.models",
        "plots.pictures",
        "plots.runs",
        "plots.spectra",
        "record.notebook",
        "sinks.heatmap",
    },
    "PIL": {"sinks.event_file"},
    "plotly": {"report.page"},
    "pandas": {"record.snapshot", "compare", "description"},
    "rich": {"sinks.console", "cli", "cli.terminal", "cli.watching"},
    "typer": {"cli", "cli.models", "cli.runs", "cli.terminal", "cli.watching"},
    "tqdm": set(),
    "safetensors": {"walk.files"},
    "weightwatcher": set(),
}
"""Who may import what, anywhere in the file."""


def module_name(path: Path) -> str:
    """`sinks.console` for sinks/console.py, `sinks` for its __init__, `""` for the package's own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
INNER = sorted(name for name in SOURCES if name)


def imported(tree: ast.AST) -> set[str]:
    """Full names of what a tree imports, wherever in it: of `from a import b` both `a` and `a.b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def ours(tree: ast.AST) -> set[str]:
    """The modules of this package that a tree imports, by the names of `SOURCES`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if within(name) in SOURCES else node.module for name in inner}
    return {within(name) for name in names if name.split(".")[0] == PACKAGE}


def within(name: str) -> str:
    """The name of a module without the package's."""
    return name.removeprefix(PACKAGE).removeprefix(".")


def level(name: str) -> int:
    """The number of the level that a module, or the folder it is in, stands on."""
    return next(number for number, words in enumerate(LEVELS) if name.split(".")[0] in words)


def forbidden(name: str, tree: ast.AST) -> list[str]:
    """The imports of a module that do not point downward."""
    targets = ours(tree)
    folder = name.split(".")[0]
    wrong = {t for t in targets if t == "" or (t.split(".")[0] != folder and level(t) >= level(name))}
    if folder == "callbacks":
        allowed = {f"walk.{walker}" for walker in WALKERS.get(name.removeprefix("callbacks."), ())}
        wrong |= {t for t in targets if t.startswith("walk") and t not in allowed}
    return sorted(wrong)


def frameworks(tree: ast.AST) -> set[str]:
    """The words of `FRAMEWORKS` that a tree imports."""
    found = imported(tree)
    return {f for f in FRAMEWORKS if any(name == f or name.startswith(f"{f}.") for name in found)}


@pytest.mark.parametrize("name", INNER)
def test_every_module_has_a_level(name):
    assert [number for number, words in enumerate(LEVELS) if name.split(".")[0] in words] == [level(name)]


@pytest.mark.parametrize("name", INNER)
def test_imports_point_downward(name):
    assert forbidden(name, TREES[name]) == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_framework_is_imported_only_in_the_file_about_it(name):
    assert {framework for framework in frameworks(TREES[name]) if name not in FRAMEWORKS[framework]} == set()


def test_there_is_no_import_cycle():
    graph = {name: ours(tree) - {name} for name, tree in TREES.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"cycle: {' → '.join(error.args[1])}")
    assert set(order) == set(SOURCES)
    assert order.index("errors") < order.index("record") < order.index("monitor") < order.index("callbacks.lightning")


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_says_what_it_is_and_has_a_telling_name(name):
    assert (ast.get_docstring(TREES[name]) or "").strip()
    words = {"util", "utils", "helper", "helpers", "common", "misc", "tools"}
    assert not words & {part.strip("_") for part in name.split(".")}


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("record", "from ww_monitor.engine import Options", ["engine"]),
        ("record", "from ww_monitor.matrix import Matrix", ["matrix"]),
        ("record", "from ww_monitor.errors import WWMonitorError", []),
        ("rules", "from ww_monitor.sinks.console import Console", ["sinks.console"]),
        ("sinks.console", "def write():\n    from ww_monitor import engine", ["engine"]),
        ("sinks.console", "import ww_monitor", [""]),
        ("sinks.console", "from ww_monitor import analyze", [""]),
        ("sinks.console", "from ww_monitor.record import Snapshot\nfrom ww_monitor.sinks import Sink", []),
        ("engine", "from ww_monitor.spectra import weightwatcher", []),
        ("engine", "if TYPE_CHECKING:\n    from ww_monitor.monitor import Monitor", ["monitor"]),
        ("monitor", "import ww_monitor.callbacks.lightning", ["callbacks.lightning"]),
        ("monitor", "from ww_monitor.walk import torch", []),
        ("callbacks._adapter", "from ww_monitor.walk.sources import walk_source", []),
        ("callbacks.lightning", "from ww_monitor.walk.sources import walk_source", ["walk.sources"]),
        ("callbacks.lightning", "from ww_monitor.walk.roles import infer_role", ["walk.roles"]),
        ("spectra.traps", "from ww_monitor.spectra.status import Status", []),
        ("spectra.traps", "from ww_monitor.matrix import Matrix", ["matrix"]),
    ],
)
def test_an_arrow_that_points_up_or_aside_would_be_seen(name, source, wrong):
    assert forbidden(name, ast.parse(source)) == wrong


@pytest.mark.parametrize(
    ("source", "framework"),
    [
        ("import pandas as pd", "pandas"),
        ("def f():\n    from rich.table import Table", "rich"),
        ("from torch.utils.tensorboard import SummaryWriter", "torch.utils.tensorboard"),
        ("from torch.utils import tensorboard", "torch.utils.tensorboard"),
        ("import lightning.pytorch", "lightning"),
        ("import torch", None),
    ],
)
def test_an_import_of_a_framework_would_be_seen(source, framework):
    assert frameworks(ast.parse(source)) == ({framework} if framework else set())

"""What README and docs name is there: files, tests, modules, options, every code word."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import ww_monitor
from ww_monitor.settings import RunOptions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

CODE = ("ww_monitor/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "examples/**/*.py", "Makefile", "pyproject.toml")

OTHERS = {
    "SVDSharpness", "analyze_vectors", "channels", "conv2d_fft", "get_ESD", "glorot_fix", "intra",  # weightwatcher's
    "DDP", "checkout", "doctests", "lightning_logs", "tuned",  # of torch, git, pytest, Lightning, and a variable
}  # fmt: skip
"""Words in code that are not ours."""


def test_every_departure_names_a_test_that_is_there():
    text = (ROOT / "docs" / "weightwatcher.md").read_text(encoding="utf-8")
    table = text.split("## Where the default preset departs")[1].splitlines()
    rows = [line for line in table if line.startswith("| ") and "`tests/" in line]
    assert len(rows) >= 13
    for row in rows:
        for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row):
            assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


@pytest.fixture(scope="module")
def words():
    """Every word of the sources, of the names of files, and of the metrics."""
    files = [path for pattern in CODE for path in ROOT.glob(pattern)]
    shown = [*files, *ROOT.iterdir(), *(ROOT / "docs").iterdir()]
    found = {word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    found |= {word for path in shown for part in path.parts for word in re.findall(r"\w+", part)}
    metrics = {metric.name for preset in ("default", "weightwatcher") for metric in ww_monitor.metrics(preset)}
    metrics |= {"delta_norm", "left_rotation", "right_rotation", "update_ratio", "rate_factor", "decay_factor"}
    return found | metrics | {f"ww_{name}" for name in metrics} | OTHERS


def code_of(page: Path) -> list[str]:
    """The spans and blocks of code of a page."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_word_exists(page, words):
    named = {word for code in code_of(page) for word in re.findall(r"[A-Za-z_]\w{2,}", code)}
    gone = {*RunOptions.ignored, *RunOptions.renamed}
    assert sorted(named - words) == []
    assert sorted(named & gone) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_the_package_can_be_reached(page):
    for name in {one for code in code_of(page) for one in re.findall(r"\bww_monitor(?:\.[A-Za-z_]\w*)+", code)}:
        assert reached(name) is not None, name


def reached(name: str) -> object:
    """A module, or an attribute of the longest part of the name that is one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_into_the_project_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target

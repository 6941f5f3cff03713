"""The README tells today's truth."""

from __future__ import annotations

from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_table_of_metrics_is_the_one_that_the_code_makes():
    """`ww-monitor metrics` and the README agree, line for line."""
    pytest.importorskip("typer")
    from ww_monitor.cli import metrics_markdown

    table = README.read_text(encoding="utf-8").split("<!-- metrics: begin -->\n")[1].split("<!-- metrics: end -->")[0]
    assert table.strip() == metrics_markdown()


def test_the_table_of_findings_lists_every_rule():
    """A rule that users meet is in the README."""
    from ww_monitor.rules import TRAINING_RULES

    text = README.read_text(encoding="utf-8")
    assert [rule.__name__ for rule in TRAINING_RULES if f"| `{rule.__name__}` |" not in text] == []

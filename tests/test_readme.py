"""The pages of metrics and of findings tell today's truth."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_metrics_is_the_one_that_the_code_makes():
    """`ww-monitor metrics` and the page agree, line for line."""
    pytest.importorskip("typer")
    from ww_monitor.cli import metrics_markdown

    table = (DOCS / "metrics.md").read_text(encoding="utf-8").split("<!-- metrics: begin -->\n")[1]
    assert table.split("<!-- metrics: end -->")[0].strip() == metrics_markdown()


def test_the_table_of_findings_lists_every_rule():
    """A rule that users meet is in its page."""
    from ww_monitor.rules import TRAINING_RULES

    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    assert [rule.__name__ for rule in TRAINING_RULES if f"| `{rule.__name__}` |" not in text] == []

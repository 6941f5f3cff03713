"""The table of departures names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_departure_names_a_test_that_is_there():
    text = (ROOT / "docs" / "weightwatcher.md").read_text(encoding="utf-8")
    table = text.split("## Where the default preset departs")[1].splitlines()
    rows = [line for line in table if line.startswith("| ") and "`tests/" in line]
    assert len(rows) >= 13
    for row in rows:
        for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row):
            assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)

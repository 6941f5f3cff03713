"""What the scripts of all studies share: their arguments, and how results are shown and kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.judge import lines

RESULTS = Path(__file__).parent / "results"


def arguments(about: str | None, quick: str, *, folder: str = "") -> argparse.ArgumentParser:
    """A parser of `--quick` and `--jobs`, and of `--folder` where runs are kept there.

    Args:
        about: What the study is.
        quick: What is shortened.
        folder: Where trained runs stand, if they do.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--jobs", type=int, default=2)
    if folder:
        parser.add_argument("--folder", type=Path, default=Path(folder), help="what is there is not trained again")
    return parser


def folder_of(options: argparse.Namespace) -> Path:
    """Where the runs of a call stand; it is there."""
    folder: Path = options.folder / ("quick" if options.quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of all columns of its first row."""
    print(lines(rows, list(rows[0])))


def keep(name: str, found: Mapping[str, Any], runs: Sequence[Any] = ()) -> None:
    """Write results as JSON, a line a run."""
    text = json.dumps(found, indent=1)
    if runs:
        text = text[:-2] + ',\n "runs": [\n' + ",\n".join(map(json.dumps, runs)) + "\n ]\n}"
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written: {path}")

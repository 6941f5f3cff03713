"""A run, or two, as one self-contained page that opens from disk: `write_report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from ww_monitor.errors import InvalidArgument
from ww_monitor.record import History, Snapshot
from ww_monitor.report.page import html, plotly_script
from ww_monitor.report.recording import recorded

Run: TypeAlias = History | Iterable[Snapshot] | Snapshot | str | Path
"""A run: a history file, a folder that has one, or snapshots at hand."""


def write_report(
    run: Run, other: Run | None = None, *, path: str | Path = "report.html", names: Sequence[str] = ()
) -> Path:
    """Write what a run has shown as one page: what to look at, curves, a map of depth and time, layers, spectra.

    The page needs no server and no network and is at most some 20 MB: of very long runs of very large models it keeps
    every second, fourth, … snapshot, and says so. Numbers are rounded to 12 bits of their range or better.

    Args:
        run: A history, a history file, or a folder that has one (a run's `ww_history.jsonl`), or one snapshot.
        other: A second run, shown beside the first, aligned by step; layers are paired by name.
        path: Where the page goes; what is there is replaced.
        names: What the page calls the runs; else after their folders or files.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if there is no such run.
        InvalidArgument: if a folder has no history file or several, a run has no snapshot, or the path is a folder.
        WWMonitorError: if a later version wrote the history.
        MissingDependency: if plotly is not installed.

    >>> import tempfile, torch, ww_monitor
    >>> snapshot = ww_monitor.analyze(torch.nn.Linear(200, 100))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report(snapshot, path=f"{folder}/report.html")
    ...     page.name, page.stat().st_size < 3_000_000
    ('report.html', True)
    """
    target = Path(path)
    if target.is_dir():  # say so before a long file is read, and what is not installed too
        raise InvalidArgument(f"report: path must be a file, got the folder {target}")
    plotly_script()
    runs = [recorded(one) for one in (run, other) if one is not None]
    for one, name in zip(runs, names, strict=False):
        one.name = name
    page = html(runs).encode("utf-8", "replace")  # a name may hold what no text can
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(page)
    return target


__all__ = ["Run", "write_report"]

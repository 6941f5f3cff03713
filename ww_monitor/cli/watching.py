"""A run that is still writing, as a view in the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from pathlib import Path

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ww_monitor.cli.terminal import drawn, number, table_of
from ww_monitor.errors import InvalidArgument, WWMonitorError
from ww_monitor.record import HISTORY_FILE, Finding, History, Layer, Snapshot
from ww_monitor.report.recording import history_file
from ww_monitor.rules import BROKEN
from ww_monitor.sinks.console import MARK

COLOURS = {"info": "", "warning": "yellow", "critical": "red"}


class Following:
    """A history file read as it grows: the first and the last snapshots, the findings that hold, and its pace.

    Args:
        path: The file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.history, self.damaged = History(), 0
        self.active: dict[tuple[str, str], Finding] = {}
        self.seen_at: deque[float] = deque(maxlen=8)
        self._offset, self._rest = 0, b""

    def read(self, *, now: float) -> bool:
        """Take what is new; whether there was any. A file that became shorter is another run."""
        if not self.path.is_file():
            return False
        size = self.path.stat().st_size
        if size < self._offset:
            self._begin_anew()
        count, following = 0, self._offset > 0  # what is there at the first look says nothing of pace
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                self._offset += len(line)
                self._rest += line
                if self._rest.endswith(b"\n"):  # else it is still being written
                    count += self._take(self._rest)
                    self._rest = b""
        if count and following:
            self.seen_at.append(now)
        return bool(count)

    def _take(self, line: bytes) -> bool:
        try:
            snapshot = Snapshot.from_dict(json.loads(line))
        except WWMonitorError as error:
            raise WWMonitorError(f"watch: {self.path}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self.damaged += bool(line.strip())
            return False
        if snapshot.step is not None:  # a resumed run sees some steps again
            kept = [one for one in self.history if one.step is None or one.step < snapshot.step]
            self.history.snapshots = kept
        self.history.append(snapshot)
        self.history.forget(latest=3)
        for finding in snapshot.findings:
            self.active.pop((finding.rule, finding.layer), None)
            if finding.state == "begin":
                self.active[finding.rule, finding.layer] = finding
        return True

    def next_analysis(self, *, now: float) -> str:
        """When the next snapshot is due, from the last ones: the step, and the time where it was seen to pass."""
        steps = [snapshot.step for snapshot in self.history if snapshot.step is not None]
        if len(steps) < 2:
            return "next analysis: not known yet"
        text = f"next analysis: about step {2 * steps[-1] - steps[-2]:,}"
        if len(self.seen_at) > 1:
            pace = (self.seen_at[-1] - self.seen_at[0]) / (len(self.seen_at) - 1)
            left = self.seen_at[-1] + pace - now
            text += f", in about {left:.0f} s" if left > 0 else f", due for {-left:.0f} s"
        return text


def worst(snapshot: Snapshot, count: int) -> list[Layer]:
    """Layers without a spectrum, then those with the most traps or a headroom above 1, then by alpha outside 2 to 6."""

    def badness(layer: Layer) -> tuple[float, ...]:
        broken = layer.status in (*BROKEN, "solver_failed") or layer.status.startswith("error")
        traps, headroom, alpha = (layer.value(name) for name in ("num_traps", "trap_headroom", "alpha"))
        values = traps, max(headroom, 1.0), max(2.0 - alpha, alpha - 6.0)
        return (float(broken), *(-math.inf if math.isnan(value) else value for value in values))

    return sorted(snapshot.layers, key=badness, reverse=True)[:count]


def view(run: Following, *, layers: int, now: float) -> Group:
    """What is to be seen of a run now."""
    if not len(run.history):
        return Group(Text(f"{run.path}: no snapshot yet"))
    last = run.history.last
    count = len(run.history) + run.history.left_out
    where = "" if last.step is None else f", step {last.step:,}"
    rows = []
    for layer in worst(last, layers):
        before = [one.value("alpha") for one in run.history.of_layer(layer.name)][-2:]
        moved = layer.value("alpha") - before[0] if len(before) > 1 else math.nan
        change = "" if math.isnan(moved) else f"{moved:+.2f}"
        cells = [number(layer.value(name)) for name in ("alpha", "trap_headroom", "num_traps")]
        rows.append([layer.name, layer.verdict or layer.status, cells[0], change, *cells[1:]])
    title = f"{run.path}: {count} snapshots{where}"
    head = ["layer, the worst first", "verdict", "alpha", "change", "headroom", "traps"]
    lines = [
        Text(f"{MARK[finding.severity]} {finding}", COLOURS[finding.severity])
        for finding in sorted(run.active.values(), key=lambda one: -("info", "warning", "critical").index(one.severity))
    ]
    more = [Text(f"… and {len(lines) - layers} more findings")] if len(lines) > layers else []
    damaged = [Text(f"{run.damaged} damaged lines left out")] if run.damaged else []
    seconds = "" if math.isnan(last.seconds) else f"; the last took {last.seconds:.2g} s"
    return Group(
        table_of(head, rows, title=title, text=2),
        *(lines[:layers] or [Text("no findings")]),
        *more,
        *damaged,
        Text(run.next_analysis(now=now) + seconds),
    )


def watch_run(path: Path, *, interval: float, layers: int, once: bool) -> None:
    """Show a run until the user has seen enough; once where there is no terminal.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        InvalidArgument: if a folder has several histories; once, if there is no snapshot.
    """
    run = Following(_file(path))
    run.read(now=time.monotonic())
    if once or not sys.stdout.isatty():
        if not len(run.history):
            raise InvalidArgument(f"watch: {run.path}: expected a snapshot, got none")
        typer.echo(drawn(view(run, layers=layers, now=time.monotonic())))
        return
    with Live(console=Console(), auto_refresh=False, screen=False) as live:  # the last view stays in the terminal
        try:
            while True:
                live.update(view(run, layers=layers, now=time.monotonic()), refresh=True)
                time.sleep(interval)
                run.path = _file(path)
                run.read(now=time.monotonic())
        except KeyboardInterrupt:
            live.update(view(run, layers=layers, now=time.monotonic()), refresh=True)


def _file(path: Path) -> Path:
    """The history file; of a folder that has none yet the one that a run would write."""
    if path.is_dir() and not any(path.rglob("*.jsonl")):
        return path / HISTORY_FILE
    return history_file(path, where="watch")

"""What every callback does alike: the session of one training run around a Monitor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ww_monitor.engine import Options
from ww_monitor.matrices import Select
from ww_monitor.monitor import Monitor
from ww_monitor.record import Snapshot
from ww_monitor.sinks import Sink
from ww_monitor.sinks.console import Console, table
from ww_monitor.sinks.jsonl import JsonLines

HISTORY_FILE = "ww_history.jsonl"


def build_monitor(**arguments: Any) -> Monitor:
    """The Monitor of a callback's flat arguments, checked at construction.

    Args:
        **arguments: Those of `Monitor`, with the fields of its `select` and `options` beside them.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.
    """
    parts: dict[str, Any] = {}
    for name, kind in (("select", Select), ("options", Options)):
        mine = [field.name for field in fields(kind) if field.name in arguments]
        parts[name] = kind(**{field: arguments.pop(field) for field in mine})
    return Monitor(**arguments, **parts)


class Session:
    """One training run on the process that analyses: its history file, its console lines, its monitor.

    Args:
        monitor: Keeps the state; outlives the session.
        folder: Where the history file goes; `None` writes none.
        print_line: Where console lines go; `None` prints none.
        continues: Name of the history file of the run that this one continues, or `""`.
    """

    def __init__(
        self, monitor: Monitor, *, folder: Path | None, print_line: Callable[[str], object] | None, continues: str = ""
    ) -> None:
        self.monitor = monitor
        self.print_line = print_line
        self.history_path = None if folder is None else history_path(folder, continues=continues)
        self._own: list[Sink] = []
        if self.history_path is not None:
            self._own.append(JsonLines(self.history_path))
        if print_line is not None:
            self._own.append(Console(print_line))
        monitor.sinks.extend(self._own)

    @property
    def history_name(self) -> str:
        """The name of the history file, for the run that continues this one; `""` without a file."""
        return "" if self.history_path is None else self.history_path.name

    def announce(self, snapshot: Snapshot) -> None:
        """One line: what is watched, what one analysis took, how often it runs, where the history goes."""
        monitor = self.monitor
        parts = [f"watching {len(snapshot.layers)} matrices", f"{len(snapshot.skipped)} skipped"]
        parts.append(f"an analysis takes {snapshot.seconds:.2g} s, {monitor.cadence}")
        if self.history_path is not None:
            parts.append(f"history in {self.history_path}")
        self.say(", ".join(parts))

    def say(self, line: str) -> None:
        """A line on the console."""
        if self.print_line is not None:
            with self.monitor.guard("console", always=True):
                self.print_line(f"ww_monitor: {line}")

    def show_table(self) -> None:
        """The layers, first → last."""
        if self.print_line is not None and len(self.monitor.history) > 1:
            with self.monitor.guard("console table", always=True):
                self.print_line(table(self.monitor.history))

    def close(self) -> None:
        """Close all sinks and take the session's own off the monitor."""
        self.monitor.close()
        self.monitor.sinks = [sink for sink in self.monitor.sinks if sink not in self._own]


def history_path(folder: Path, *, continues: str = "") -> Path:
    """The history file of a run in `folder`: the one it continues, else one that is not there yet.

    So two runs that log to one folder never mix, nor do two monitors of one run.
    """
    if continues:
        return folder / continues
    stem, suffix = HISTORY_FILE.split(".")
    names = [folder / HISTORY_FILE] + [folder / f"{stem}-{number}.{suffix}" for number in range(1, 10_000)]
    return next(path for path in names if not path.exists())

"""The session of one training run around a Monitor: its files and its console."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from pathlib import Path

from ww_monitor.monitor import Monitor
from ww_monitor.record import HISTORY_FILE, Sink, Snapshot
from ww_monitor.sinks.console import Console, table
from ww_monitor.sinks.jsonl import JsonLines


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
        self._process = os.getpid()
        self.print_line = print_line
        self._file = None if folder is None else JsonLines(folder / (continues or HISTORY_FILE), own=not continues)
        self._own: list[Sink] = [] if self._file is None else [self._file]
        if print_line is not None:
            self._own.append(Console(print_line))
        monitor.sinks.extend(self._own)

    @property
    def history_name(self) -> str:
        """The name of the history file, for the run that continues this one; `""` where none was made."""
        return "" if self._file is None or self._file.own else self._file.path.name

    def without_own(self) -> Monitor:
        """The monitor without the sinks of this session, for a copy that another run may begin with."""
        monitor = copy(self.monitor)
        # Actions hold methods of the monitor that they speak for, and would take this one into the copy.
        monitor.acting = self.monitor.acting.of(monitor.say_once, monitor.note)
        monitor.sinks = [sink for sink in monitor.sinks if not any(sink is own for own in self._own)]
        return monitor

    def announce(self, snapshot: Snapshot) -> None:
        """One line: what is watched, what one analysis took, how often it runs, where the history goes."""
        monitor = self.monitor
        count = len(snapshot.layers)
        parts = [f"watching {count} {'matrix' if count == 1 else 'matrices'}", f"{len(snapshot.skipped)} skipped"]
        parts.append(f"an analysis takes {snapshot.seconds:.2g} s, {monitor.cadence}")
        if self._file is not None:
            parts.append(f"history in {self._file.path}")
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
        """Close all sinks, unless in a forked child that ends, and take the session's own off the monitor."""
        try:
            if self._process == os.getpid():
                self.monitor.close()
        finally:
            self.monitor.sinks = self.without_own().sinks

"""What every callback does alike: its arguments, and the session of one training run around a Monitor."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from ww_monitor.engine import Options
from ww_monitor.harm import trap_harm
from ww_monitor.matrix import Matrix
from ww_monitor.monitor import Monitor
from ww_monitor.record import Sink, Skipped, Snapshot
from ww_monitor.settings import AnalysisOptions, CallbackOptions, RunOptions, Select
from ww_monitor.signatures import method_taking
from ww_monitor.sinks.console import Console, table
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.sinks.published import Published
from ww_monitor.sinks.trackers import Dashboards
from ww_monitor.walk.sources import Source, walk_source

_Kind = TypeVar("_Kind")

HISTORY_FILE = "ww_history.jsonl"

_chosen: set[Path] = set()
"""History files of the sessions that are open: a file is chosen before its first snapshot makes it."""


class Adapter:
    """The arguments of every callback, and what its hooks share. A callback derives from it and its framework's base.

    Hooks call `_open` when a run begins, `_snapshot` when `monitor` says that one is due, and `_close` at the end.
    """

    _prefix = ""
    """What the framework puts before our keys in TensorBoard."""

    _step_key: str | None = None
    """The x axis that the framework declares in W&B."""

    @method_taking(CallbackOptions)
    def __init__(self, given: CallbackOptions) -> None:
        """Check every argument now, not at the first step.

        Raises:
            InvalidArgument: naming the argument, its value and the choices.
        """
        super().__init__()
        options = Options(**AnalysisOptions.of(given).keywords())
        self.monitor = Monitor(**RunOptions.of(given).keywords(), select=Select.of(given), options=options)
        self._how = given.for_walker(given.preset)
        walk_source(torch.nn.Module(), **self._how)  # a wrong choice is refused here
        self._console = given.console
        self._history = given.history
        self._harm_inputs = given.harm_inputs
        self._measures_harm = given.harm_inputs is not None or given.stop_on == "harmful_traps"
        self._session: Session | None = None
        self._history_name = ""
        self._resumed = False
        self._shown = Published(given.publish)
        self._dashboards = Dashboards(prefix=self._prefix, step_key=self._step_key, publish=given.publish)
        self._x: dict[int | None, int] = {}
        """Where on the framework's own axis a step lies whose snapshot is under way."""

    def _open(
        self,
        *,
        step: int,
        folder: Path | None,
        print_line: Callable[[str], object] | None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """A run begins, or goes on, at optimizer step `step`.

        Args:
            step: Number of completed optimizer updates.
            folder: Where the history file goes, if one is wanted.
            print_line: Where console lines go, if they are wanted.
            rank: Of this process; only the first writes files and lines.
            ranks: Number of processes: each analyses its share, and all get the same snapshots.
        """
        monitor = self.monitor
        if not self._resumed and monitor.last_step is not None and (step == 0 or step < monitor.last_step):
            monitor.restart()
            self._history_name = ""
        monitor.begin(step)
        monitor.quiet = rank > 0
        monitor.across_ranks = ranks > 1
        if rank == 0:
            self._session = Session(
                monitor,
                folder=folder if self._history else None,
                print_line=print_line if self._console else None,
                continues=self._history_name,
            )
            self._history_name = self._session.history_name
            self._left_open = weakref.finalize(self, self._session.close)  # where no hook tells of an exception

    def _snapshot(self, model: Source, *, step: int, epoch: int | None, whole: bool = False) -> list[Snapshot]:
        """Look at the model now; the snapshots that are complete, those of the background first.

        Args:
            model: The model whose weights are analysed.
            step: Number of completed optimizer updates.
            epoch: Epoch that the weights belong to, where there is one.
            whole: Wait for a snapshot of now: at the beginning and at the end of a run.
        """
        if self._measures_harm:
            self.monitor.harm = lambda snapshot: trap_harm(model, snapshot, self._harm_inputs).layers
        done = self.monitor.finish() if whole else self.monitor.collect()
        snapshot = self.monitor.observe(walk_source(model, **self._how), step=step, epoch=epoch, whole=whole)
        return done if snapshot is None else [*done, snapshot]

    def _before_step(self, model: Callable[[], Source], *, step: int, last: bool, **about: Any) -> None:
        """A batch begins: with `track_updates` the weights are copied if a snapshot follows it.

        Args:
            model: Returns the model that is trained.
            step: Number of completed optimizer updates.
            last: Whether there will be a snapshot after it, whatever the schedule says.
            **about: Further arguments of `Monitor.before_step`.
        """

        def items() -> Iterator[Matrix | Skipped]:
            yield from walk_source(model(), **self._how)

        self.monitor.before_step(items(), step=step, due=last or None, **about)

    def _announce(self) -> None:
        """The line at the start, once there is a snapshot."""
        if self._session is not None and len(self.monitor.history):
            self._session.announce(self.monitor.history.last)

    def _say(self, line: str) -> None:
        """A line on the console of the process that writes."""
        if self._session is not None:
            self._session.say(line)

    def _show_table(self) -> None:
        """The layers, first → last, on the console."""
        if self._session is not None:
            self._session.show_table()

    def _close(self) -> None:
        """The run is over, however it ended; also called when a run begins, for one that has ended unseen."""
        self._resumed = False
        self.monitor.harm = None  # it holds the model
        with self.monitor.guard("last pictures", always=True):
            self._dashboards.finish()
        if self._session is not None:
            self._left_open.detach()
            self._session.close()
            self._session = None

    def _state(self) -> dict[str, Any]:
        """Plain Python values that `_load_state` continues from, in a run that a checkpoint resumes."""
        state: dict[str, Any] = {}
        with self.monitor.guard("state for the checkpoint", always=True):
            state.update(self.monitor.state_dict(), history_file=self._history_name)
        return state

    def _load_state(self, state: dict[str, Any]) -> None:
        with self.monitor.guard("resume", always=True):
            self.monitor.load_state_dict(state)
            self._history_name = state["history_file"]
            self._resumed = True

    @property
    def _settings(self) -> str:
        """What is analysed and how often, as text: equal for monitors that do the same."""
        settings = [f"every={self.monitor.cadence!r}"]
        for part in (self.monitor.options, self.monitor.select):
            for field in fields(part):
                value = getattr(part, field.name)
                if value != field.default and field.name != "strict":
                    settings.append(f"{field.name}={value!r}")
        return ", ".join(settings)


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
            _chosen.add(self.history_path)
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
        if self.history_path is not None:
            _chosen.discard(self.history_path)


def calling_object(kind: type[_Kind]) -> _Kind | None:
    """The object of this class whose method is calling: a framework passes everything to its callbacks but itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            return caller
        frame = frame.f_back
    return None


def history_path(folder: Path, *, continues: str = "") -> Path:
    """The history file of a run in `folder`: the one it continues, else one that is not there yet.

    So two runs that log to one folder never mix, nor do two monitors of one run.
    """
    if continues:
        return folder / continues
    stem, suffix = HISTORY_FILE.split(".")
    names = [folder / HISTORY_FILE] + [folder / f"{stem}-{number}.{suffix}" for number in range(1, 10_000)]
    return next(path for path in names if path not in _chosen and not path.exists())

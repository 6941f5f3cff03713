"""What every callback does alike: its arguments, and what its hooks share."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch

from ww_monitor.baseline import DELTAS
from ww_monitor.callbacks._apart import StateKey, place_in
from ww_monitor.callbacks._session import Session
from ww_monitor.callbacks._watched import TRAP_FREE, Watched
from ww_monitor.engine import Options
from ww_monitor.harm import trap_harm
from ww_monitor.matrix import Matrix
from ww_monitor.monitor import Monitor
from ww_monitor.monitor.update import UPDATE
from ww_monitor.record import Skipped, Snapshot
from ww_monitor.settings import AnalysisOptions, CallbackOptions, RunOptions, Select
from ww_monitor.signatures import method_taking
from ww_monitor.sinks.dashboard import Named
from ww_monitor.sinks.published import Published
from ww_monitor.sinks.trackers import Dashboards
from ww_monitor.walk.sources import Source, walk_source

_Kind = TypeVar("_Kind")
_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def hook(function: _Hook) -> _Hook:
    """A method that a framework calls: whatever fails in it becomes one warning, and it returns `None`.

    What is no `Exception` passes, and with `strict` everything does.
    """

    @wraps(function)
    def guarded(self: Adapter, *arguments: Any, **named: Any) -> Any:
        with self.monitor.guard(function.__name__):
            return function(self, *arguments, **named)

    return cast("_Hook", guarded)


class Adapter:
    """The arguments of every callback, and what its hooks share. A callback derives from it and its framework's base.

    Hooks call `_open` when a run begins, `_snapshot` when `monitor` says that one is due, and `_close` at the end.
    """

    _prefix = ""
    """What the framework puts before our keys in TensorBoard."""

    _left_out = frozenset(("_left_open", "_dashboards", "_handler", "_saving", "_changes", "log", "log_dict"))
    """What a copy has not; the last two are methods of the module, which Lightning puts there."""

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
        with suppress(AttributeError):  # of a module that stands in for a framework's
            walk_source(torch.nn.Module(), **self._how)  # a wrong choice is refused here
        self.prefix = self._name = given.prefix
        """What stands before the keys, as it was given and as it is in this run."""
        self._state_key = StateKey(given)
        self._seen_weights: list[float] = []
        self._watched = Watched()
        self._console = given.console
        self._history = given.history
        self._harm_inputs = given.harm_inputs
        self._measures_harm = given.harm_inputs is not None or given.stop_on == "harmful_traps"
        self._session: Session | None = None
        self._history_name = ""
        self._resumed = False
        self._chosen_keys, self._shown = given.publish, Published(given.publish)
        self._dashboards = self._make_dashboards()
        self._x: dict[int | None, int] = {}
        """Where on the framework's own axis a step lies whose snapshot is under way."""

    def _make_dashboards(self) -> Dashboards:
        return Dashboards(prefix=self._prefix, name=self._name, publish=self._chosen_keys)

    def _keep_apart(self, callbacks: Sequence[Any]) -> None:
        """Take keys of one's own among the callbacks of a run: the second monitor that would share them gets `2/`."""
        metrics = {metric.name for metric in self.monitor.options.chosen}
        # Those that stand before, not behind: of two alike one gives way.
        before = [one for one in callbacks[: place_in(callbacks, self)] if isinstance(one, Adapter)]
        alike = [one for one in before if one.prefix == self.prefix]
        shared = any(metrics & {metric.name for metric in one.monitor.options.chosen} for one in alike)
        self._name = f"{self.prefix}{len(alike) + 1}/" if shared else self.prefix
        self._dashboards = self._make_dashboards()
        for sink in self.monitor.sinks:
            if isinstance(sink, Named):
                sink.within = self._name
        if shared:
            message = (
                f"another SpectralMonitor has the same keys, so this one's begin with {self._name!r}; give prefix="
            )
            self.monitor.say_once("shared keys", message)

    def _number_among(self, callbacks: Sequence[Any]) -> None:
        """Note which one this is of the monitors in a run whose state would have one key."""
        before = [one for one in callbacks[: place_in(callbacks, self)] if isinstance(one, Adapter)]
        self._state_key.number = 1 + sum(one._state_key.settings == self._state_key.settings for one in before)

    def _key_among(self, saved: Iterable[str], callbacks: Sequence[Any]) -> str:
        """The key in a checkpoint of the state that this monitor of a run continues."""
        others = [one._state_key for one in callbacks if isinstance(one, Adapter) and one is not self]
        return self._state_key.among(saved, others)

    @property
    def _model_metrics(self) -> set[str]:
        """Names of the model-level values that there may be."""
        analyzer, names = self.monitor.analyzer, {metric.name for metric in self.monitor.options.chosen}
        names |= {TRAP_FREE, *DELTAS * analyzer.track_delta, *UPDATE * analyzer.track_updates}
        names |= {"trap_harm"} if self._measures_harm else set()
        return names | ({"snapshots_dropped"} if analyzer.mode == "async" else set())

    @property
    def _key(self) -> str:
        return str(self._state_key)

    def _values(self, snapshot: Snapshot, *, layers: bool = True) -> dict[str, float]:
        """Every known value under the key that others see."""
        return {self._name + key: value for key, value in snapshot.scalars(layers=layers).items()}

    def _shown_values(self, snapshot: Snapshot, *, layers: bool = True) -> dict[str, float]:
        """Those that trackers and logs get."""
        return {self._name + key: value for key, value in self._shown.scalars(snapshot, layers=layers).items()}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy begins with, also in another process: no open file, no console, no trainer, no tracker."""
        state = {name: value for name, value in vars(self).items() if name not in self._left_out}
        state.update(dict.fromkeys({"_model"} & state.keys()))  # Keras', until the next run begins
        if self._session is not None:
            state.update(_session=None, _history_name=self._session.history_name, monitor=self._session.without_own())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._dashboards = self._make_dashboards()

    def _open(
        self,
        *,
        step: int,
        folder: Callable[[], Path | None],
        print_line: Callable[[str], object] | None,
        rank: int = 0,
        ranks: int = 1,
        optimizers: Sequence[Any] = (),
    ) -> None:
        """A run begins, or goes on, at optimizer step `step`.

        Args:
            step: Number of completed optimizer updates.
            folder: Says where the history file goes, if one is wanted; asked on every rank.
            print_line: Where console lines go, if they are wanted.
            rank: Of this process; only the first writes files and lines.
            ranks: Number of processes: each analyses its share, and all get the same snapshots.
            optimizers: Of the run, for `actions`.
        """
        monitor = self.monitor
        # A second fit that begins anew is another run; what a checkpoint resumes is not, whatever its step.
        if not self._resumed and monitor.last_step is not None and (step == 0 or step < monitor.last_step):
            monitor.restart()
            self._history_name = ""
        monitor.begin(step)
        monitor.analyzer.before = None  # a run that died may have left weights of this step
        self._act_on(optimizers)
        monitor.quiet = rank > 0
        monitor.across_ranks = ranks > 1
        place = None
        with monitor.guard("choosing the history file", always=True):
            place = folder()
            place = None if place is None else place.absolute()
        if monitor.last_step is not None:
            self._say_what_it_continues(place, step)
        monitor.place = "" if place is None else str(place)
        if rank == 0:
            self._session = Session(
                monitor,
                folder=place if self._history else None,
                print_line=print_line if self._console else None,
                continues=self._history_name,
            )
            self._left_open = weakref.finalize(self, self._session.close)  # where no hook tells of an exception

    def _act_on(self, optimizers: Sequence[Any]) -> None:
        """Let the run step by what `actions` say."""
        self.monitor.act_on(*optimizers)

    def _say_what_it_continues(self, folder: Path | None, step: int) -> None:
        """Note in the history where a resumed run's earlier part is."""
        with self.monitor.guard("saying what goes on", always=True):
            before, name = self.monitor.place, self._history_name
            elsewhere = folder is not None and before and folder != Path(before)
            if name and folder is not None and elsewhere and not (folder / name).exists():
                message = f"continues {Path(before) / name}, which ends with step {self.monitor.last_step}"
                self.monitor.note("continues", message, step)

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
        self._seen_weights = self._sample(model)
        snapshot = self.monitor.observe(self._walk(model), step=step, epoch=epoch, whole=whole)
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
            yield from self._walk(model())

        self.monitor.before_step(items(), step=step, due=last or None, **about)

    def _sample(self, model: Source) -> list[float]:
        """A few numbers of every matrix that trains, which tell whether somebody has exchanged the weights."""
        with suppress(Exception), torch.no_grad():  # what cannot be read fails in the analysis, and is said there
            items = [item for item in self.monitor.select.apply(self._walk(model)) if isinstance(item, Matrix)]
            # What lies in shards is left out: each read of it is a collective.
            trained = [item for item in items if not item.frozen and item.shards is None]
            # Eight rows tell: averages, or those of another checkpoint, differ in all of a matrix.
            sums = [item.load()[0, :8].sum(dtype=torch.float64) for item in trained]
            return torch.stack([one.to(sums[0].device) for one in sums]).tolist()  # one wait for the device
        return []

    def _are_exchanged(self, model: Source, step: int) -> bool:
        """Whether the model has other weights than those of the snapshot of this step, such as averages."""
        sample = self._sample(model)
        # A NaN differs from itself: broken weights are not exchanged ones.
        exchanged = sample != self._seen_weights and all(map(math.isfinite, (*sample, *self._seen_weights)))
        # `agreed` is a collective: `is_seen` before it says the same on every rank, and `exchanged` may not.
        if not (self.monitor.is_seen(step) and self.monitor.analyzer.agreed(exchanged)):
            return False
        message = "the model ends with other weights than those of its last step, and this snapshot is of them"
        self.monitor.note("exchanged_weights", message, step)
        return True

    def _walk(self, model: Source) -> Iterator[Matrix | Skipped]:
        yield from walk_source(model, **self._how)  # begins where `observe` asks for the first, and guards it

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
        self.monitor.acting.detach()
        with self.monitor.guard("last pictures", always=True):
            self._dashboards.finish()
        session, self._session = self._session, None
        if session is not None:
            with self.monitor.guard("closing", always=True):
                self._left_open.detach()  # else it would close once more when the interpreter ends
                session.close()
            self._history_name = session.history_name  # only now: closing may make the file

    def _state(self) -> dict[str, Any]:
        """Plain Python values that `_load_state` continues from, in a run that a checkpoint resumes."""
        state: dict[str, Any] = {}
        with self.monitor.guard("state for the checkpoint", always=True):
            name = self._history_name if self._session is None else self._session.history_name
            state.update(self.monitor.state_dict(), history_file=name)
        return state

    def _load_state(self, state: dict[str, Any]) -> None:
        with self.monitor.guard("resume", always=True):
            self.monitor.load_state_dict(state)
            self._history_name = state["history_file"]
            self._resumed = True


def calling_object(kind: type[_Kind]) -> _Kind | None:
    """The object of this class whose method is calling: a framework passes everything to its callbacks but itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            return caller
        frame = frame.f_back
    return None

"""Monitor: the one object with state. Schedule, engine, rules and sinks, tied together; it never sees a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar

from ww_monitor.actions.acting import Acting
from ww_monitor.engine import Options, warm_up
from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.monitor import at_exit, checkpoint
from ww_monitor.monitor.analyzer import Analyzer
from ww_monitor.monitor.drift import LastSpectra
from ww_monitor.monitor.guarded import told
from ww_monitor.monitor.pacing import cell_number
from ww_monitor.monitor.queued import wait_for_queued
from ww_monitor.monitor.stepping import Stepping
from ww_monitor.record import UNREAD, Finding, History, Rule, Sink, Snapshot
from ww_monitor.rules import LOOKBACK, TRAINING_RULES, Holding, metrics_of_the_past
from ww_monitor.settings import RunOptions, Select
from ww_monitor.signatures import method_taking
from ww_monitor.sinks.jsonl import JsonLines

JOIN_SECONDS, INTERRUPTED_SECONDS = 60.0, 1.5
"""How long the end of a run waits for an analysis in the background, and that of an interrupted run."""

KEEP_ROWS = 20_000
"""Rows of layers up to which snapshots are kept in memory: a row takes some 3 KB, hence at most some 64 MB (our
choice), 416 snapshots of GPT-2 small. One of 64 eigenvalues more counts as one more row."""


@dataclass(frozen=True)
class MonitorOptions(RunOptions):
    """What a `Monitor` takes."""

    where: ClassVar[str] = "Monitor"
    _: KW_ONLY
    across_ranks: Annotated[
        bool,
        "Share the work among the processes of torch.distributed. All of them then call `observe` at the same steps and"
        " get the same snapshots; only the first should have sinks. Every analysis is made at once then.",
    ] = False
    select: Annotated[Select | None, "Which matrices to analyse; `None` for `Select()`."] = None
    options: Annotated[Options | None, "How to analyse; `None` for `Options()`."] = None


class Monitor(Stepping):
    """Looks at the matrices it is given, when it is time, and tells its sinks.

    In a loop of your own:

    >>> import torch
    >>> from ww_monitor.walk.torch import walk
    >>> model = torch.nn.Linear(64, 32)
    >>> monitor = Monitor(every_n_steps=2)
    >>> for step in range(5):                              # doctest: +ELLIPSIS
    ...     snapshot = monitor.observe(walk(model), step=step) if monitor.due(step) else None
    >>> [snapshot.step for snapshot in monitor.history]
    [0, 2, 4]

    With `mode="async"` let the end of the loop wait for what is under way, `with Monitor(…) as monitor:` or by `close`;
    Python's end does it where nobody has.
    """

    @method_taking(MonitorOptions)
    def __init__(self, given: MonitorOptions) -> None:
        """Check every argument now, not at the first step.

        Raises:
            InvalidArgument: naming the argument, its value and the choices.
        """
        needed = [name for action in given.actions for name in action.needs]
        self.options = (given.options or Options()).measuring(needed)
        super().__init__(
            given, Analyzer(self.options, given, across_ranks=given.across_ranks), strict=self.options.strict
        )
        if given.stop_on in ("traps", "harmful_traps") and "num_traps" not in {
            metric.name for metric in self.options.chosen
        }:
            raise InvalidArgument(
                f"Monitor: stop_on={given.stop_on!r} needs the metric 'num_traps', which these options leave out; got"
                f" metrics={self.options.metrics!r} with preset={self.options.preset!r}; name it, or use 'all'"
            )
        rules = TRAINING_RULES if given.rules is None else given.rules
        self.findings = Holding(rules, stop_on=given.stop_on, patience=given.patience)
        self.sinks: list[Sink] = list(given.sinks)
        self.acting = Acting(given.actions, every=given.every_n_steps, say=self.say_once, note=self.note)
        self.keep = given.keep
        self.select = given.select or Select()
        self.history = History()
        self._spectra = LastSpectra()
        self.harm: Callable[[Snapshot], Mapping[str, float]] | None = None
        """By layer, what the outputs owe to its trap, as `ww_monitor.trap_harm` measures it; a callback sets it."""
        self._notes: list[Finding] = []
        self.place = ""
        """The folder of the run's history, for the run that continues it."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What its findings are made by."""
        return self.findings.rules

    @property
    def stop_reason(self) -> str:
        """Why the run should end, `""` while it should not."""
        return self.findings.stop_reason

    @property
    def across_ranks(self) -> bool:
        """Whether the processes of a distributed run share the work; all of them then call `observe` alike."""
        return self.analyzer.across_ranks

    @across_ranks.setter
    def across_ranks(self, value: bool) -> None:
        self.analyzer.across_ranks = value
        if value and self.analyzer.mode != "sync":
            self.say_once("across ranks", "on several ranks every analysis is made at once; mode is left aside")

    def is_seen(self, step: int) -> bool:
        """Whether there is a snapshot of optimizer step `step`."""
        return len(self.history) > 0 and self.history.last.step == step

    def begin(self, step: int) -> None:
        """Training begins, or goes on, after `step` updates: from now on its time counts."""
        with self.guard("warming up", always=True):
            warm_up()
        self.budget.start(step)
        self._next_step = self._passed = None
        self._cell = cell_number()

    def due(self, step: int) -> bool:
        """Whether an analysis is due at optimizer step `step`; ask once a step."""
        ran_again = step == self.last_step and len(self.history) < 2 and self._cell not in (None, cell_number())
        self._begin_anew_before(step, after=self._passed, ran_again=ran_again)
        return super().due(step)

    def observe(
        self, matrices: Iterable[Matrix | Skipped], *, step: int, epoch: int | None = None, whole: bool = False
    ) -> Snapshot | None:
        """Analyse now, apply the rules, write to the sinks.

        Args:
            matrices: What a walker yields; weights are read during the call.
            step: Optimizer step, counted in completed updates.
            epoch: Epoch, where there is one.
            whole: Analyse now and wait for it, whatever `mode` says.

        Returns:
            The snapshot with the findings that begin or end; `None` if the background will complete it, or if the
            analysis failed as a whole, which is said once as a `SpectralWarning`.

        Raises:
            LayerError: with `Options(strict=True)`, if a layer fails.
        """
        self._begin_anew_before(step, after=self.last_step)
        if self.last_step is None and not self.budget.analyses and not self.budget.elapsed:
            self.begin(step)
        if self.last_step is not None and self.analyzer.lacks_baseline:
            message = f"delta_norm and rotations begin anew at step {step}: the first weights are not at hand"
            self.note("track_delta", message, step)
            self.say_once("track_delta", message)
        self.last_step, self._next_step, self._cell = step, None, cell_number()
        published: list[Snapshot] = []
        with self.timed(), self.guard("analysis"):
            items = list(self.select.apply(matrices, say=lambda said: self.say_once(said, said)))
            if items or not isinstance(matrices, Sequence):  # whoever gives an empty list means it
                self._warn_of_nothing(items)
            if self.analyzer.reads_now(whole=whole):
                self._waited += wait_for_queued()
            snapshot = self.analyzer.analyze(items, step=step, epoch=epoch, whole=whole)
            if snapshot is None:
                at_exit.close(self)
            else:
                published.append(self._publish(snapshot))
        return published[0] if published else None

    def _warn_of_nothing(self, items: Sequence[Matrix | Skipped]) -> None:
        """Say once if there is no matrix: the snapshots will be empty, and no key will reach a tracker."""
        if any(isinstance(item, Matrix) for item in items):
            return
        reasons = Counter(item.reason for item in items if isinstance(item, Skipped)).most_common(3)
        found = "; ".join(f"{count} × {reason}" for reason, count in reasons) or "no weight of two or more dimensions"
        self.say_once(
            "nothing",
            f"there is no matrix to watch, and every snapshot will be empty; found: {found}. ww_monitor.describe(model)"
            " lists what is left out; change include, exclude, min_size or max_size, or pass the module that trains",
        )

    def collect(self) -> list[Snapshot]:
        """The snapshots that the background has completed, oldest first, now with findings and in the sinks.

        An analysis that failed there costs its own snapshot only, and is said once as a `SpectralWarning`.
        """
        published: list[Snapshot] = []
        if not self.analyzer.busy:
            at_exit.forget(self)  # what is done is taken now
        while (done := self.analyzer.next_done()) is not None:
            with self.guard("analysis"), self.timed():
                published.append(self._publish(self.analyzer.completed(done)))
        return published

    def finish(self) -> list[Snapshot]:
        """Wait for the background, no longer than a minute, and collect what it has completed: the end of a run."""
        if not self.analyzer.join(JOIN_SECONDS):
            self.say_once("background", f"the last analysis took longer than {JOIN_SECONDS:.0f} s and was left out")
        return self.collect()

    def _publish(self, snapshot: Snapshot) -> Snapshot:
        """Apply the rules, remember, write to the sinks, to the files first."""
        snapshot = self._with_harm(self._spectra.measure(snapshot))
        self._warn_of_failures(snapshot)
        try:
            with self.guard("actions"):
                snapshot = self.acting.see(snapshot)
            snapshot = self._judged(snapshot)
        finally:  # also where a rule ends the program
            self._keep(snapshot)
        return snapshot

    def _judged(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with its findings."""
        with self.guard("rules", always=True):
            seen = History([*self.history, snapshot])  # of which rules see the last LOOKBACK, as in `replay`
            holding = self.findings.judge(seen, failed=self._say_failed_rule)
            snapshot = snapshot.with_findings([*self._notes, *holding])
            self._notes.clear()
        return snapshot

    def _keep(self, snapshot: Snapshot) -> None:
        self.history.append(snapshot)
        self.history.forget(latest=max(LOOKBACK, min(self.keep, KEEP_ROWS // max(1, _rows(snapshot)))))
        self._published += 1
        for sink in () if self.quiet else self._files_first():
            with self.guard(f"sink {type(sink).__name__}", key=f"sink {id(sink)}", always=True):
                sink.write(snapshot)

    def _files_first(self) -> list[Sink]:
        return sorted(self.sinks, key=lambda sink: not isinstance(sink, JsonLines))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_timing": False, "harm": None}  # a copy is in no analysis; harm is bound to a model

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """The run is over: wait for the background as `finish` does, and close every sink.

        Where an interrupt (`KeyboardInterrupt`, `SystemExit` with a code) ends the run, it waits for 1.5 s only and
        gives up what the background has not completed by then.
        """
        self.budget.stop()
        self._cell = None if self._cell is None else -1
        if not at_exit.interrupted():
            self.finish()
        self.analyzer.close(INTERRUPTED_SECONDS)
        self.collect()
        at_exit.forget(self)
        self.acting.detach()
        for sink in self._files_first():  # a sink that ends the program costs no line that waits
            with self.guard(f"closing sink {type(sink).__name__}", key=f"sink {id(sink)}", always=True):
                sink.close()

    def _begin_anew_before(self, step: int, *, after: int | None, ran_again: bool = False) -> None:
        """Steps that begin again are a new run: a cell of a notebook that is run twice, of one step it may be."""
        after = max((one for one in (after, self.last_step) if one is not None), default=step)  # the first step of all
        if step < after or ran_again:
            message = f"the steps begin again at {step}, after {after}: a new run, of which history knows alone"
            self.say_once("begins anew", message)
            self.finish()
            self.restart()
            self.begin(step)

    def restart(self) -> None:
        """Forget what was seen: a new run begins with this monitor."""
        self.history, self.last_step, self._passed, self._next_step = History(), None, None, None
        self._spectra = LastSpectra()
        self.acting.restart()
        self.findings.clear()
        self.analyzer.restart()

    def _with_harm(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the harm of its traps, where there is one and somebody measures it."""
        if self.harm is None or not any(layer.trap_entries for layer in snapshot.layers):
            return snapshot
        found: dict[str, float] = {}
        with self.guard("trap_harm"):
            found = dict(self.harm(snapshot))
        with self.guard("trap_harm"):
            found = self.analyzer.agreed(found)  # all ranks stop alike
        return snapshot.with_metrics({name: {"trap_harm": value} for name, value in found.items()})

    def _warn_of_failures(self, snapshot: Snapshot) -> None:
        """Say once a cause which layers have no row, or an empty one, through no fault of theirs."""
        failed = [(item.name, item.reason) for item in snapshot.skipped if item.reason.startswith(UNREAD)]
        failed += [
            (row.name, row.status) for row in snapshot.layers if row.status.startswith(("error:", "solver_failed"))
        ]
        for name, reason in failed:
            cause = ":".join(reason.split(":")[:2])  # how, and the class of the exception
            alike = sum(other.startswith(cause) for _, other in failed)
            self.say_once(
                f"failed {cause}", f"{alike} {'layers' if alike > 1 else 'layer'} without numbers, as {name}: {reason}"
            )

    def note(self, what: str, message: str, step: int | None) -> None:
        """Let the next snapshot say something of the run, as an informational finding that no rule makes."""
        self._notes.append(Finding(what, "", "info", message, step=step))

    def _say_failed_rule(self, rule: str, error: Exception) -> None:
        self.say_once(f"rule {rule}", f"rule {rule} failed: {told(error)}")

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from, plain Python values: findings, and what rules read of the past."""
        past = checkpoint.pack(self.history, latest=LOOKBACK, metrics=metrics_of_the_past(self.rules))
        return {
            "last_step": self.last_step,
            "stop_reason": self.stop_reason,
            "packed": checkpoint.compress(
                {
                    **self.findings.state(),
                    **past,
                    "spectra": self._spectra.state(),
                    "place": self.place,
                    "actions": self.acting.state(),
                }
            ),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken, also by an earlier version."""
        last_step, stop_reason = state["last_step"], state["stop_reason"]
        past = state if "recent" in state else checkpoint.expand(state["packed"])
        history = checkpoint.unpack(past)
        self.findings.load(past, stop_reason=stop_reason)
        self._spectra.load(past.get("spectra", {}))
        self.acting.load(past.get("actions", {}))
        self.last_step, self._passed, self._cell, self.history = last_step, None, None, history
        self.place = past.get("place", "")


def _rows(snapshot: Snapshot) -> int:
    return sum(1 + len(layer.eigenvalues or ()) // 64 for layer in snapshot.layers)

"""Monitor: the one object with state. Schedule, engine, rules and sinks, tied together; it never sees a model."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ww_monitor.baseline import Baseline
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.errors import InvalidArgument, SpectralWarning, check_choice, check_positive_int
from ww_monitor.matrices import Matrix, Select, Skipped
from ww_monitor.record import Finding, History, Snapshot
from ww_monitor.rules import STOP_ON, TRAINING_RULES, Rule, apply_rules, transitions, with_stop_rule
from ww_monitor.schedule import Schedule, never
from ww_monitor.schedule import every_n_steps as schedule_every_n_steps
from ww_monitor.sinks import Sink

logger = logging.getLogger(__name__)

DEFAULT_EVERY_N_STEPS = 100


class Monitor:
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

    Args:
        every_n_steps: Analyse when a multiple of this is reached (100 if neither argument is given).
        every_n_epochs: Analyse at the end of every so many epochs.
        rules: What to look for; see `ww_monitor.rules`.
        sinks: Where snapshots go.
        stop_on: `"traps"`, `"broken_layers"`, or `None`: what makes `stop_reason` non-empty. Its rule is applied also
            where `rules` leaves it out.
        patience: For how many consecutive snapshots it must hold in the same layer.
        select: Which matrices to analyse.
        options: How to analyse.
        track_delta: Follow how far each matrix has moved from its weights at the first snapshot: `delta_norm` =
            ‖W − W₀‖_F/‖W₀‖_F, and `left_rotation`, `right_rotation` = how far its 8 leading singular directions have
            turned, 0 to 1. Fine-tuning turns them while spectra stay put. Holds a copy of the weights on the host;
            after a resume the first snapshot is that of the resumed run.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        rules: Sequence[Rule] = TRAINING_RULES,
        sinks: Iterable[Sink] = (),
        stop_on: str | None = None,
        patience: int = 3,
        select: Select | None = None,
        options: Options | None = None,
        track_delta: bool = False,
    ) -> None:
        if every_n_steps is None and every_n_epochs is None:
            every_n_steps = DEFAULT_EVERY_N_STEPS
        for argument, value in (
            ("every_n_steps", every_n_steps),
            ("every_n_epochs", every_n_epochs),
            ("patience", patience),
        ):
            if value is not None:
                check_positive_int("Monitor", argument, value)
        check_choice("Monitor", "stop_on", stop_on, (None, *STOP_ON))
        sinks = list(sinks)
        for sink in sinks:
            if isinstance(sink, type) or not isinstance(sink, Sink):
                raise InvalidArgument(f"Monitor: sinks must have write and close; got {sink!r}")
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.schedule: Schedule = never if every_n_steps is None else schedule_every_n_steps(every_n_steps)
        self.rules = with_stop_rule(rules, stop_on)
        self.sinks: list[Sink] = sinks
        self.stop_on = stop_on
        self.patience = patience
        self.select = select or Select()
        self.options = options or Options()
        if stop_on == "traps" and "num_traps" not in {metric.name for metric in self.options.chosen}:
            raise InvalidArgument(
                "Monitor: stop_on='traps' needs the metric 'num_traps', which these options leave out; got"
                f" metrics={self.options.metrics!r} with preset={self.options.preset!r}; name it, or use 'all'"
            )
        self.track_delta = track_delta
        self.history = History()
        self.last_step: int | None = None
        self.stop_reason = ""
        self._baseline: Baseline | None = None
        self._active: list[Finding] = []
        self._held: Counter[tuple[str, str]] = Counter()
        self._said: set[str] = set()

    @property
    def cadence(self) -> str:
        """How often it looks, in words."""
        steps = "" if self.every_n_steps is None else f"every {self.every_n_steps} steps"
        epochs = "" if self.every_n_epochs is None else f"every {self.every_n_epochs} epochs"
        return " and ".join(part for part in (steps, epochs) if part)

    def due(self, step: int) -> bool:
        """Whether it is time to look at optimizer step `step`."""
        return step != self.last_step and self.schedule(step, self.last_step)

    def due_at_epoch_end(self, epoch: int, step: int) -> bool:
        """Whether to look after epoch number `epoch` (from 0), which ended at optimizer step `step`."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0 and step != self.last_step

    def observe(self, matrices: Iterable[Matrix | Skipped], *, step: int, epoch: int | None = None) -> Snapshot | None:
        """Analyse now, apply the rules, write to the sinks.

        Args:
            matrices: What a walker yields; weights are read during the call.
            step: Optimizer step, counted in completed updates.
            epoch: Epoch, where there is one.

        Returns:
            The snapshot with the findings that begin or end; `None` if the analysis failed as a whole, which is
            said once as a `SpectralWarning`.

        Raises:
            LayerError: with `Options(strict=True)`, if a layer fails.
        """
        self.last_step = step
        snapshot = None
        with self.guard("analysis"):
            items = list(self.select.apply(matrices))
            analysed = analyze_matrices(items, self.options, step=step, epoch=epoch)
            snapshot = self._record(analysed.with_metrics(self._drift(items)) if self.track_delta else analysed)
        if snapshot is not None:
            for sink in self.sinks:
                with self.guard(f"sink {type(sink).__name__}", key=f"sink {id(sink)}", always=True):
                    sink.write(snapshot)
        return snapshot

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            with self.guard(f"closing sink {type(sink).__name__}", key=f"sink {id(sink)}", always=True):
                sink.close()

    def restart(self) -> None:
        """Forget what was seen: a new run begins with this monitor."""
        self.history, self.last_step, self.stop_reason = History(), None, ""
        self._active, self._held, self._baseline = [], Counter(), None

    def _drift(self, items: Sequence[Matrix | Skipped]) -> dict[str, dict[str, float]]:
        if self._baseline is None:
            self._baseline = Baseline.capture(items)
        return self._baseline.drift(items)

    def _record(self, snapshot: Snapshot) -> Snapshot:
        holding = apply_rules(self.rules, History([*self.history.snapshots[-self._lookback :], snapshot]))
        snapshot = snapshot.with_findings(transitions(self._active, holding, step=snapshot.step))
        self._active = holding
        self.history.append(snapshot)
        self._count(holding)
        return snapshot

    _lookback = 16
    """Snapshots before the last that rules see: bounds their cost, and what a checkpoint must hold."""

    def _count(self, holding: Sequence[Finding]) -> None:
        keys = {(finding.rule, finding.layer) for finding in holding}
        self._held = Counter({key: self._held[key] + 1 for key in keys})
        if self.stop_on is None:
            return
        for finding in holding:
            count = self._held[finding.rule, finding.layer]
            if finding.rule == STOP_ON[self.stop_on] and count >= self.patience:
                self.stop_reason = f"{self.stop_on} in {count} snapshots in a row: {finding.message}"
                return

    @contextmanager
    def guard(self, what: str, *, key: str = "", always: bool = False) -> Iterator[None]:
        """Turn an exception into one `SpectralWarning` a cause; with `strict` let it pass unless `always`."""
        try:
            yield
        except Exception as error:
            if self.options.strict and not always:
                raise
            self.say_once(key or f"{what} {type(error).__name__}", f"{what} failed: {type(error).__name__}: {error}")
            logger.debug("%s failed", what, exc_info=True)

    def say_once(self, key: str, message: str) -> None:
        """Issue a `SpectralWarning`, once a key; a filter that turns warnings into errors cannot end the run."""
        if key in self._said:
            return
        self._said.add(key)
        try:
            warnings.warn(f"ww_monitor: {message}", SpectralWarning, stacklevel=3)
        except SpectralWarning:
            logger.warning("%s", message)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values that `load_state_dict` continues from: findings, counts, and the latest snapshots."""
        return {
            "last_step": self.last_step,
            "stop_reason": self.stop_reason,
            "active": [asdict(finding) for finding in self._active],
            "held": [[rule, layer, count] for (rule, layer), count in self._held.items()],
            "recent": [snapshot.to_json() for snapshot in self.history.snapshots[-self._lookback :]],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken."""
        self.last_step = state["last_step"]
        self.stop_reason = state["stop_reason"] if self.stop_on else ""
        self._active = [Finding(**finding) for finding in state["active"]]
        self._held = Counter({(rule, layer): count for rule, layer, count in state["held"]})
        self.history = History(Snapshot.from_dict(json.loads(line)) for line in state["recent"])

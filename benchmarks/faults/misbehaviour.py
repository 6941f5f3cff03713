"""Rules and sinks that misbehave: the loop goes on, and memory and the file have every snapshot."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import Counts
from ww_monitor.monitor import Monitor
from ww_monitor.record import Finding, History
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.walk.torch import walk


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def endless(_: object) -> Iterator[Finding]:
    while True:
        yield Finding("endless", "0", "info", "again")


def raising(error: Exception) -> Callable[..., Any]:
    def act(*_: object) -> Any:
        raise error

    return act


def late(_: object) -> Iterator[object]:
    yield Finding("late", "0", "info", "found")
    raise ValueError("late")


def emptying(history: History) -> Iterable[Finding]:
    history.snapshots.clear()
    return []


def odd(**fields: Any) -> Callable[..., Any]:
    return lambda _: [Finding(**{"rule": "odd", "layer": "0", "severity": "info", "message": "", **fields})]


ERRORS = (
    OSError(28, "full"),
    MemoryError(),
    RecursionError(),
    Wordless(),
    UnicodeError("x"),
    StopIteration(),
    KeyError(),
)
RULES = (
    *map(raising, ERRORS), endless, late, emptying, lambda _: None, lambda _: 3, lambda _: "trap", lambda _: [None],
    odd(message=torch.ones(2)), odd(layer=object()), odd(severity="odd"), odd(severity=[]), odd(step="x"),
    odd(message="\ud800\0" * 1000),
)  # fmt: skip


class Bad:
    """A sink that does what it is given."""

    def __init__(self, write: Callable[..., Any], close: Callable[..., Any] = lambda: None) -> None:
        self.write, self.close = write, close


def changing(snapshot: Any) -> None:
    snapshot.step = 7


SINKS = (*(Bad(raising(error), raising(error)) for error in ERRORS), Bad(str, raising(OSError())), Bad(changing),
         Bad(lambda: None), Bad(lambda snapshot: snapshot.layers[99]), Bad(lambda snapshot: 1 / 0))  # fmt: skip


def survives(*, rules: tuple[Any, ...] | None = None, sinks: tuple[Any, ...] = ()) -> bool:
    model = torch.nn.Linear(24, 16)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "run.jsonl"
        try:
            with Monitor(rules=rules, sinks=[*sinks, JsonLines(path)]) as monitor:
                for step in range(3):
                    monitor.observe(walk(model), step=step)
            kept = [[one.step for one in history] for history in (monitor.history, History.read(path))]
        except Exception:
            logging.exception("not survived")
            return False
    return kept == [[0, 1, 2]] * 2


def run(*, quick: bool) -> Counts:
    rules, sinks = (RULES[::4], SINKS[::4]) if quick else (RULES, SINKS)
    return {
        "rules that misbehave": (len(rules), sum(survives(rules=(rule,)) for rule in rules)),
        "sinks that misbehave": (len(sinks), sum(survives(sinks=(sink,)) for sink in sinks)),
    }

"""Processes that end, are interrupted, fork and spawn while analyses are under way: no exit code changes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

from benchmarks.faults import Counts
from benchmarks.faults.disk import steps
from ww_monitor.monitor import Monitor
from ww_monitor.walk.torch import walk

SCRIPT = """
import os, signal, sys, time, torch
from ww_monitor.monitor import Monitor
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.walk.torch import walk
mode, phase, path = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)
net = torch.nn.Linear(1500, 1500) if phase == "analysis" else torch.nn.Linear(64, 64)
asked = []
def stop(*_):
    asked.append(print("now", flush=True))
    time.sleep(20 if len(asked) == 1 else 0)
class Sink:
    write = stop if phase == "sink" else lambda self, snapshot: None
    close = stop if phase == "close" else lambda self: None
def rule(history):
    return stop() if phase == "rule" else []
def run():
    monitor = Monitor(mode=mode, rules=[rule], sinks=[JsonLines(path), Sink()])
    monitor.begin(0)
    for step in range(2 if phase in ("end", "close") else 10**6):
        monitor.observe(walk(net), step=step)
        monitor.collect()
        if step == 0 and phase in ("analysis", "loop"):
            print("now", flush=True)
    if phase == "close":
        monitor.close()
run()
"""


def ended(mode: str, phase: str, what: str, delay: float) -> bool:
    """Whether the process ended within some seconds with the code that it would have without us."""
    expected = {"SIGINT": -2, "SIGTERM": 143, "": 0}[what]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        command = [sys.executable, "-c", SCRIPT, mode, phase, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
        ) as child:
            if what:
                child.stdout.readline()  # type: ignore[union-attr]
                time.sleep(delay)
                child.send_signal(getattr(signal, what))
            try:
                code = child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
                return False
        return code == expected and (what != "" or steps(path)[-1] == 1)


def interrupts(*, quick: bool) -> tuple[int, int]:
    phases = ("analysis", "loop", "rule", "sink", "close")
    cases = list(product(("sync", "async"), phases, ("SIGINT", "SIGTERM"), (0.0, 0.2)))
    cases = cases[:1] if quick else cases
    return of_all(cases)


def of_all(cases: Sequence[tuple[str, str, str, float]]) -> tuple[int, int]:
    with ThreadPoolExecutor(2) as two:  # a core each: they load torch most of their time
        return len(cases), sum(two.map(lambda case: ended(*case), cases))


def forks(count: int) -> tuple[int, int]:
    """Children that analyse in the background while that of their parent is at work."""
    model, survived = torch.nn.Linear(200, 150), 0
    with Monitor(mode="async") as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            monitor.observe(walk(model), step=number)
            child = os.fork()
            if not child:
                monitor.observe(walk(model), step=number + 1)
                os._exit(int(not (monitor.analyzer.join(30) and monitor.collect()[-1].step == number + 1)))
            survived += _code(child, 60) == 0
            monitor.collect()
    return count, survived


def _code(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, code = os.waitpid(child, os.WNOHANG)
        if found:
            return code
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def spawns(count: int) -> tuple[int, int]:
    """Copies of a monitor that has begun, in processes of their own."""
    survived, context = 0, multiprocessing.get_context("spawn")
    with Monitor(mode="async") as monitor:
        for number in range(count):
            monitor.observe(walk(torch.nn.Linear(64, 48)), step=number)
            child = context.Process(target=_goes_on, args=(monitor, number + 1))
            child.start()
            child.join(120)
            survived += child.exitcode == 0
    return count, survived


def _goes_on(monitor: Monitor, step: int) -> None:
    monitor.observe(walk(torch.nn.Linear(64, 48)), step=step)
    monitor.close()
    assert monitor.history.last.step == step


def run(*, quick: bool) -> Counts:
    exits = 1 if quick else 20
    return {
        "children that are forked while the background works": forks(10 if quick else 320),
        "copies in processes that are spawned": spawns(0 if quick else 10),
        "interrupts in every phase": interrupts(quick=quick),
        "ends without close": of_all([("async", "end", "", 0.0)] * exits),
    }

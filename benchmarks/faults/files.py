"""Hostile model files: each is read in a process of its own, and must give one error of ours that names it, or weights.

    python -m benchmarks.faults.files [--quick]

No code in a file may run, no process may take more than `MEMORY` bytes or `SECONDS`, and none may die. The last line is
JSON: how many were tried, how many were survived, and which were not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.hostile_pickles import contents, damaged, garbage, pickles
from benchmarks.faults.hostile_places import archives, headers, indices, places
from ww_monitor.errors import WWMonitorError
from ww_monitor.matrix import Matrix
from ww_monitor.walk.files import walk_files

MEMORY = 1 << 30
SECONDS = 20


# --- one case in one process


def survived(make: Callable[[Path], Path], name: str) -> str:
    """What went wrong with one file, or `""`."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        os.environ["TRACE"] = str(trace)
        try:
            path = make(Path(folder))
        except OSError as error:  # a path that the system refuses is no file that anybody has
            return f"not made: {error}"
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _read(path, send)
        os.close(send)
        with os.fdopen(receive) as pipe:
            said = pipe.read()
        status = os.waitpid(child, 0)[1]
        problem = said if status == 0 else f"died of {signal.Signals(os.WTERMSIG(status)).name} {said}"
        if trace.exists():
            problem += " code ran"
    return problem


def _read(path: Path, send: int) -> None:
    """In the child: walk, load, report, end."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MEMORY, used + 4 * MEMORY))
    before = resident()
    signal.alarm(SECONDS)
    problem = ""
    try:
        for item in walk_files(path):
            if isinstance(item, Matrix):
                try:
                    item.load()
                except Exception:  # noqa: BLE001 - costs this layer
                    continue
    except WWMonitorError as error:
        if path.name not in str(error) and str(path.parent) not in str(error) and len(path.name) < 200:
            problem = f"unnamed: {error}"
    except BaseException as error:  # noqa: BLE001
        problem = f"{type(error).__name__}: {error}"
    if resident() - before > MEMORY:
        problem += f" {resident() - before} bytes"
    os.write(send, problem.encode("utf-8", "replace")[:300])
    os._exit(0)


def resident() -> int:
    """The most bytes that this process has had in memory since it began, as far as the system counts for it alone."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmHWM:")[1].split()[0])


GROUPS = (damaged, garbage, pickles, contents, headers, indices, places, archives)


def run(*, quick: bool = False) -> dict[str, object]:
    """All cases, or a tenth of those without Keras: how many were tried and survived, and what went wrong."""
    cases = [case for group in GROUPS for case in group()]
    if quick:
        cases = [case for case in cases if not re.search("h5|hdf5|keras", case[0])][::10]
    else:  # once for all processes: its import takes longer than all else
        os.environ.setdefault("KERAS_BACKEND", "torch")
        importlib.import_module("keras")
    receive, send = os.pipe()
    other = os.fork()  # a core each, and no thread that a fork would leave behind
    problems = {name: problem for name, make in cases[bool(other) :: 2] if (problem := survived(make, name))}
    if not other:
        os.write(send, json.dumps(problems).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        problems |= json.load(pipe)  # nothing where it died
    os.waitpid(other, 0)
    return {"campaign": "files", "tried": len(cases), "survived": len(cases) - len(problems), "failed": problems}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one case in ten")
    print(json.dumps(run(quick=parser.parse_args().quick)))

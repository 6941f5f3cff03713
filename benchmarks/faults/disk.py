"""The history file under kills, full disks and runs that begin at the same moment: no line that was written is lost."""

from __future__ import annotations

import os
import random
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from benchmarks.faults import Counts
from ww_monitor.record import History, Layer, Snapshot
from ww_monitor.sinks import jsonl
from ww_monitor.sinks.jsonl import JsonLines

_write = os.write


def snapshot(step: int) -> Snapshot:
    rows = (Layer(f"layer.{k}", "dense", (1, 64, 64), metrics={"alpha": 2.5, "sigma": 0.1}) for k in range(6))
    return Snapshot(tuple(rows), step=step)


def steps(path: Path) -> list[int | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torn lines
        return [one.step for one in History.read(path)] if path.exists() else []


def in_slices(file: int, data: bytes) -> int:
    """Some bytes at a time, so that a kill comes between two of them."""
    time.sleep(0.0002)
    return _write(file, data[: random.randint(1, 400)])


def run_until_killed(path: Path, first: int, *, sliced: bool) -> int:
    """Resume in a child, kill it within milliseconds; how many writes had returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        jsonl.os.write = in_slices if sliced else _write  # type: ignore[attr-defined]
        sink = JsonLines(path)
        for step in range(first, first + 10_000):
            sink.write(snapshot(step))
            _write(writer, b".")
        os._exit(0)
    os.close(writer)
    time.sleep(random.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as acknowledged:
        return len(acknowledged.read())


def write_all(sink: JsonLines, which: Iterable[int]) -> None:
    for step in which:
        with suppress(OSError):
            sink.write(snapshot(step))


def kills(count: int) -> tuple[int, int]:
    survived, after = 0, list[int | None]()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = Path(folder) / f"{number // 10}.jsonl"  # each file is resumed ten times
            before = after if path.exists() else []
            first = 1 + max((step for step in before if step is not None), default=-1)
            written = run_until_killed(path, first, sliced=number % 2 == 1)
            after = steps(path)
            survived += after[: len(before)] == before and len(after) >= len(before) + written
    return count, survived


def flickering(count: int) -> tuple[int, int]:
    """A disk that takes some of the bytes and fails again and again, in the end it has room."""
    survived = 0
    for seed in range(count):
        draw = random.Random(seed)

        def write(file: int, data: bytes, draw: random.Random = draw) -> int:
            if draw.random() < 0.4:
                raise OSError(28, "No space left on device")
            return _write(file, data[: draw.randint(1, 2 * len(data))])

        with tempfile.TemporaryDirectory() as folder:
            sink = JsonLines(Path(folder) / "run.jsonl")
            jsonl.os.write = write  # type: ignore[attr-defined]
            try:
                write_all(sink, range(20))
            finally:
                jsonl.os.write = _write  # type: ignore[attr-defined]
            sink.close()
            survived += steps(sink.path) == list(range(20))
    return count, survived


def full(count: int) -> tuple[int, int]:
    """A resume where the system's limit leaves room for some more bytes: what was there is there."""
    survived = 0
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.jsonl"
            sink = JsonLines(path)
            for step in range(10):
                sink.write(snapshot(step))
            with path.open("ab") as file:
                file.write(b'{"schema":1,' * (number % 2))
            size = path.stat().st_size
            child = os.fork()
            if not child:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 97 * number, size + 97 * number))
                write_all(sink, range(10, 15))
                os._exit(0)
            code = os.waitpid(child, 0)[1]
            sink.write(snapshot(20))
            found = steps(path)
            survived += code == 0 and found[:10] == list(range(10)) and found[-1] == 20
    return count, survived


def same_moment(count: int, runs: int = 8) -> tuple[int, int]:
    """Processes that begin in one folder at the same moment: a file each."""
    survived = 0
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            at, children = time.time() + 0.03, []
            for number in range(runs):
                children.append(os.fork())
                if not children[-1]:
                    sink = JsonLines(Path(folder) / "run.jsonl", own=True)
                    time.sleep(max(0.0, at - time.time()))
                    for step in range(5):
                        sink.write(snapshot(100 * number + step))
                    os._exit(0)
            for child in children:
                os.waitpid(child, 0)
            found = sorted(tuple(steps(path)) for path in Path(folder).iterdir())
            survived += found == [tuple(range(100 * number, 100 * number + 5)) for number in range(runs)]
    return count, survived


def run(*, quick: bool) -> Counts:
    return {
        "kills during writes and resumes": kills(30 if quick else 1200),
        "disks that fail for moments": flickering(10 if quick else 300),
        "disks that are full": full(10 if quick else 100),
        "eight runs that begin together": same_moment(3 if quick else 50),
    }

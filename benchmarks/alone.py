"""One analysis in a process of its own, for what a shared one cannot tell: CPU seconds of one thread, peak memory.

`python -m benchmarks.alone cpu gpt2` and `python -m benchmarks.alone memory gpt2 ours` print one line of JSON each.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ww_monitor
from benchmarks import rivals, shapes
from benchmarks.table import Bound, Ratio, claim

MODELS: dict[str, tuple[str, Callable[[], torch.nn.Module]]] = {
    "gpt2": ("GPT-2 small, plain", shapes.gpt2_small),
    "resnet18": ("ResNet-18, plain", shapes.resnet18),
    "4096": ("one 4096², plain", partial(shapes.square, 4096)),
    "tiny": ("one 64²", partial(shapes.square, 64)),
}

CPU_BOUNDS = {"gpt2": Bound(least=2.8), "resnet18": Bound(least=2.3), "tiny": None}
CPU_ROUNDS = {"resnet18": 3}
MEMORY_BOUNDS = {"gpt2": Bound(most=1.1), "resnet18": Bound(most=1.1), "4096": Bound(most=1.1), "tiny": None}
MEMORY_CASES = ("gpt2", "resnet18", "4096")

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

SIDES: dict[str, Callable[[torch.nn.Module], Any]] = {
    "ours": ww_monitor.analyze,
    "weightwatcher": rivals.weightwatcher,
}


def cpu_seconds(model: torch.nn.Module, *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of the whole process, both sides in turns."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, run in SIDES.items():
            gc.collect()
            start = time.process_time()
            run(model)
            seconds[side].append(time.process_time() - start)
    return seconds


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory in use while `run` runs, above what is in use before; Linux only.

    The kernel keeps the peak of the resident memory, and forgets it when asked to.

    Raises:
        OSError: where the system has no such account.
    """
    gc.collect()
    _give_back_freed()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _give_back_freed() -> None:
    """Freed memory that the allocator still holds would hide a part of the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"_resident: expected a line {key!r} in /proc/self/status, got none")


def in_subprocess(*arguments: str, environment: dict[str, str] | None = None) -> Any:
    """What `python -m benchmarks.alone …` prints.

    Raises:
        RuntimeError: with the end of what it wrote to stderr, if it fails.
    """
    command = [sys.executable, "-m", "benchmarks.alone", *arguments]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={**os.environ, **(environment or {})}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks.alone {' '.join(arguments)}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cpu_rows(*, names: tuple[str, ...] = ("gpt2", "resnet18"), say: Callable[[str], None]) -> Iterator[list[str]]:
    """One thread, CPU seconds: one claim a model."""
    for name in names:
        what = f"one thread, CPU seconds, {MODELS[name][0]}: weightwatcher ÷ ours"
        try:
            seconds = in_subprocess("cpu", name, environment=ONE_THREAD)
        except RuntimeError as error:
            say(f"one thread, {MODELS[name][0]}: {error}")
            yield claim(what, "", CPU_BOUNDS[name], None)
            continue
        ratio = Ratio(seconds["weightwatcher"], seconds["ours"])
        say(f"one thread, {MODELS[name][0]}")
        yield claim(what, str(ratio), CPU_BOUNDS[name], ratio.value)


def memory_rows(
    *, names: tuple[str, ...] = MEMORY_CASES, repeats: int = 1, say: Callable[[str], None]
) -> Iterator[list[str]]:
    """Peak above the weights: one claim a model, with the median over processes on both sides."""
    for name in names:
        title = f"peak memory above the weights, {MODELS[name][0]}: ours ÷ weightwatcher"
        try:
            peaks = {side: [in_subprocess("memory", name, side)["bytes"] for _ in range(repeats)] for side in SIDES}
        except RuntimeError as error:
            say(f"memory, {MODELS[name][0]}: {error}")
            yield claim(title, "", MEMORY_BOUNDS[name], None)
            continue
        say(f"memory, {MODELS[name][0]}")
        ours, theirs = (statistics.median(peaks[side]) for side in SIDES)
        ratio = ours / max(theirs, 1)
        yield claim(title, f"{ratio:.2f} ({ours / 1e6:.0f} MB, {theirs / 1e6:.0f} MB)", MEMORY_BOUNDS[name], ratio)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cpu", "memory"))
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("side", choices=SIDES, nargs="?", default="ours")
    options = parser.parse_args(arguments)
    warm_up = shapes.square(64)
    model = MODELS[options.model][1]()
    if options.what == "cpu":
        for run in SIDES.values():
            run(warm_up)
        print(json.dumps(cpu_seconds(model, rounds=CPU_ROUNDS.get(options.model, 1))))
    else:
        run = SIDES[options.side]
        run(warm_up)
        print(json.dumps({"bytes": peak_bytes(partial(run, model))}))


if __name__ == "__main__":
    main()

"""What an analysis costs: against weightwatcher 0.7.7, singular values with a Hill fit, and the bare solver.

`make bench` takes about ten minutes on two quiet cores and writes its section of benchmarks/RESULTS.md and
docs/growth.png. `--quick` runs the same code on tiny matrices within a minute and writes nothing; `--only gpt2 fit`
runs some parts and writes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import ww_monitor
from benchmarks import accuracy, alone, cases, fit, growth, rivals, shapes, table

PARTS = ("fit", "one-thread", "memory", "growth", "accuracy")

INTRODUCTION = """\
## What the whole analysis costs (`make bench`)

{machine}.

Ratios of medians in one process, the contestants in turns on the same matrices. Ours is `ww_monitor.analyze(model)`
with every standard metric, traps and spikes included, in every row; a new seed each round, so no permutation comes
from a cache, but where the row says "again". weightwatcher runs plain, or with `randomize`, `mp_fit` and `detX` where
the row says "traps". The bare solver is the float64 Gram matrix of the short side and its eigenvalues and nothing else,
by the fastest of the drivers tried for the row. "svdvals + Hill" is a loop of `torch.linalg.svdvals` in float32 with a
Hill estimator from the median on, as in TempBalance. A layer is shuffled only where its largest entry makes a trap
possible, which the last column counts; in the Student t rows (4 degrees of freedom) that is every layer with a short
side of 8 or more."""


class Clock:
    """Prints what has been done, and after how many seconds."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def say(self, what: str) -> None:
        print(f"[{time.perf_counter() - self._start:6.1f} s] {what}", flush=True)


def measured_cases(chosen: dict[str, cases.Case], say: Callable[[str], None]) -> tuple[list[cases.Measured], list[str]]:
    """The cases that could be measured, and why the others could not."""
    found, notes = [], []
    for case in chosen.values():
        try:
            found.append(cases.measure(case, say=say))
            say(" | ".join(cases.row(found[-1])))  # a run that is broken off has said this much
        except shapes.Missing as reason:
            say(f"{case.title}: left out, {reason}")
            notes.append(f"{case.title}: not measured, {reason}.")
    return found, notes


def claims(
    parts: Sequence[str], found: Sequence[cases.Measured], *, quick: bool, draw: bool, say: Callable[[str], None]
) -> list[list[str]]:
    """The rows of the second table."""
    rows: list[list[str]] = []
    peer = rivals.has_weightwatcher()
    if "fit" in parts and peer:
        rows += fit.rows(scale=0.05 if quick else 1.0, say=say)
    if "one-thread" in parts and peer:
        rows += alone.cpu_rows(names=("tiny",) if quick else ("gpt2", "resnet18"), say=say)
    if "memory" in parts and peer:
        rows += alone.memory_rows(names=("tiny",) if quick else alone.MEMORY_CASES, say=say)
    if "growth" in parts:
        rows += _growth(quick=quick, draw=draw, say=say)
    if "accuracy" in parts:
        pairs = [one for one in found if one.snapshot is not None and one.details is not None]
        rows += accuracy.rows(
            [accuracy.with_peer(one.snapshot, one.details) for one in pairs if one.snapshot is not None],
            accuracy.hard(64 if quick else 256),
        )
        say("accuracy")
    return rows


def _growth(*, quick: bool, draw: bool, say: Callable[[str], None]) -> list[list[str]]:
    sides, counts = ((16, 32, 64, 128), (1, 3, 10, 30)) if quick else (growth.SIDES, growth.COUNTS)
    side = growth.by_side(sides, say=say)
    many = [growth.by_count(one, counts, say=say) for one in growth.LAYER_SIDES[: 1 if quick else None]]
    if draw:
        growth.draw(side, many)
    return growth.rows(side, many)


def warm_up() -> None:
    """Imports and first calls of both sides, and of every driver."""
    model = shapes.square(64)
    ww_monitor.analyze(model)
    rivals.hill(model)
    for driver in rivals.DRIVERS.values():
        driver(model)
    if rivals.has_weightwatcher():
        rivals.weightwatcher(model, **rivals.FULL)


def section(found: Sequence[cases.Measured], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The Markdown between the markers."""
    parts = [INTRODUCTION.format(machine=table.machine())]
    if found:
        parts.append(table.markdown(cases.HEAD, [cases.row(one) for one in found]))
    parts += notes
    if rows:
        parts.append(table.markdown(("what", "measured", "required", "held?"), rows))
        if any("growth" in row[0] or "exponent" in row[0] for row in rows):
            parts.append("![time against the side and against the number of layers](../docs/growth.png)")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*cases.full_size(), *PARTS)
    parser.add_argument("--quick", action="store_true", help="tiny matrices, within a minute; writes nothing")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}; writes nothing"
    )
    options = parser.parse_args(arguments)
    chosen = cases.small() if options.quick else cases.full_size()
    parts: Sequence[str] = PARTS
    if options.only:
        chosen = {name: case for name, case in chosen.items() if name in options.only}
        parts = [part for part in PARTS if part in options.only]
    write = not options.quick and not options.only
    clock = Clock()
    warm_up()
    clock.say("warmed up")
    found, notes = measured_cases(chosen, clock.say)
    text = section(found, claims(parts, found, quick=options.quick, draw=write, say=clock.say), notes)
    print(f"\n{text}")
    if write:
        table.write_section("engine", text)
        clock.say(f"written to {table.RESULTS.name} and {growth.PICTURE.name}")


if __name__ == "__main__":
    main()

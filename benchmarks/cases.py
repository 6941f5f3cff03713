"""One row of the table: ours, the peer, Hill and every driver of the bare solver, in turns in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import ww_monitor
from benchmarks import rivals, shapes
from benchmarks.table import Bound, Ratio, verdict
from ww_monitor.record import Snapshot
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE

NUMPY = ("numpy, default threads", "numpy, one-thread workers")
ALL = (*NUMPY, "torch, default threads", "torch, one-thread workers")


@dataclass(frozen=True)
class Case:
    """What to measure on which matrices.

    Attributes:
        title: What the table calls it.
        build: Makes the model.
        full: Whether the peer computes traps, Marchenko–Pastur spikes and detX too (ours always does).
        rounds: Of ours and of the bare solver.
        peer_rounds: Of weightwatcher, 0 to leave it out.
        hill_rounds: Of the singular values with a Hill fit.
        drivers: Of the bare solver; the one with the least median counts.
        again: Whether ours has seen the model before with the same seed, so that it finds its permutations.
        against_peer: What weightwatcher's time over ours must hold.
        against_bare: What our time over the bare solver's must hold.
    """

    title: str
    build: Callable[[], torch.nn.Module]
    full: bool = False
    rounds: int = 3
    peer_rounds: int = 3
    hill_rounds: int = 0
    drivers: Sequence[str] = ALL
    again: bool = False
    against_peer: Bound | None = None
    against_bare: Bound | None = None


@dataclass
class Measured:
    """Seconds of each contestant by round, and what the first round of both sides found."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    snapshot: Snapshot | None = None
    details: Any = None


def measure(case: Case, *, say: Callable[[str], None]) -> Measured:
    """The contestants in turns; ours has a new seed each round and finds no permutation, unless it looks again."""
    model = case.build()
    result = Measured(case)
    contestants = _contestants(case, model)
    if case.again:
        ww_monitor.analyze(model, seed=0)
    for number in range(max(case.rounds, case.peer_rounds, case.hill_rounds)):
        for name, (rounds, run) in contestants.items():
            if number >= rounds:
                continue
            found, seconds = timed(partial(run, number))
            result.seconds[name].append(seconds)
            if isinstance(found, Snapshot):
                result.snapshot = result.snapshot or found
            elif name == "weightwatcher" and result.details is None:
                result.details = found
        say(f"{case.title}: round {number + 1}")
    return result


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    gc.collect()
    start = time.perf_counter()
    found = function()
    return found, time.perf_counter() - start


def _contestants(case: Case, model: torch.nn.Module) -> dict[str, tuple[int, Callable[[int], Any]]]:
    options = rivals.FULL if case.full else {}
    peer_rounds = case.peer_rounds if rivals.has_weightwatcher() else 0
    return {
        "weightwatcher": (peer_rounds, lambda _: rivals.weightwatcher(model, **options)),
        "ours": (case.rounds, lambda number: ww_monitor.analyze(model, seed=0 if case.again else number)),
        "hill": (case.hill_rounds, lambda _: rivals.hill(model)),
        **{name: (case.rounds, partial(_bare, name, model)) for name in case.drivers},
    }


def _bare(name: str, model: torch.nn.Module, _: int) -> float:
    return rivals.DRIVERS[name](model)


HEAD = (
    "matrices",
    "weightwatcher ÷ ours (range)",
    "required",
    "held?",
    "ours ÷ bare solver (range)",
    "required",
    "held?",
    "its best driver",
    "svdvals + Hill ÷ ours",
    "layers shuffled",
)


def row(result: Measured) -> list[str]:
    """The case as a line of the table under `HEAD`."""
    case, seconds = result.case, result.seconds
    best = best_driver(seconds)
    peer = Ratio(seconds["weightwatcher"], seconds["ours"]) if seconds["weightwatcher"] else None
    bare = Ratio(seconds["ours"], seconds[best])
    hill = str(Ratio(seconds["hill"], seconds["ours"])) if seconds["hill"] else ""
    return [
        case.title,
        "" if peer is None else str(peer),
        *verdict(case.against_peer, None if peer is None else peer.value),
        str(bare),
        *verdict(case.against_bare, bare.value),
        best,
        hill,
        shuffled_layers(result.snapshot),
    ]


def best_driver(seconds: Mapping[str, Sequence[float]]) -> str:
    return min(
        (name for name in rivals.DRIVERS if seconds.get(name)), key=lambda name: statistics.median(seconds[name])
    )


def shuffled_layers(snapshot: Snapshot | None) -> str:
    """How many layers had a headroom that let a trap be possible, of how many."""
    layers = () if snapshot is None else snapshot.layers
    return f"{sum(layer.value('trap_headroom') >= HEADROOM_TO_SHUFFLE for layer in layers)} of {len(layers)}"


def full_size() -> dict[str, Case]:
    """The rows of the table: about eight minutes on two quiet cores."""
    gpt2, resnet, large = shapes.gpt2_small, shapes.resnet18, partial(shapes.square, 4096)
    block, t = partial(shapes.gpt2_small, blocks=1), shapes.heavy_tailed
    return {
        "gpt2": Case(
            "GPT-2 small, 48 matrices, plain", gpt2, rounds=5, peer_rounds=5, hill_rounds=1,
            against_peer=Bound(least=6), against_bare=Bound(most=1.15),
        ),
        "resnet18": Case(
            "ResNet-18, 197 slices, plain", resnet, rounds=5, peer_rounds=5, hill_rounds=3,
            against_peer=Bound(least=6), against_bare=Bound(most=1.3),
        ),
        "4096": Case(
            "one 4096², plain", large, peer_rounds=2, hill_rounds=1, drivers=("numpy, default threads", *ALL[2:3]),
            against_peer=Bound(least=3.5), against_bare=Bound(most=1.05),
        ),
        "2048": Case("one 2048², plain", partial(shapes.square, 2048), hill_rounds=3),
        "llama": Case(
            "Llama-3-8B, one block, plain", shapes.llama_block, rounds=1, peer_rounds=1,
            drivers=("torch, default threads",),
        ),
        "minilm": Case(
            "BERT (all-MiniLM-L6-v2, trained), plain", shapes.minilm, rounds=15, hill_rounds=1,
            against_bare=Bound(most=1.4),
        ),
        "gpt2-traps": Case(
            "GPT-2 small, one block, with traps and MP spikes", block, full=True, peer_rounds=1,
            against_peer=Bound(least=40), against_bare=Bound(most=1.5),
        ),
        "gpt2-traps-t": Case(
            "the same, Student t elements", lambda: t(block()), full=True, peer_rounds=1,
            against_peer=Bound(least=40), against_bare=Bound(most=1.5),
        ),
        "gpt2-48-traps-t": Case(
            "GPT-2 small, 48 matrices, Student t elements, with traps", lambda: t(gpt2()), full=True, peer_rounds=0,
            against_bare=Bound(most=1.5),
        ),
        "gpt2-again-t": Case(
            "GPT-2 small, Student t elements, looked at again with the same seed", lambda: t(gpt2()), peer_rounds=0,
            drivers=NUMPY, again=True, against_bare=Bound(most=2.0),
        ),
        "resnet18-traps": Case(
            "ResNet-18, with traps and MP spikes", resnet, full=True, peer_rounds=1, against_peer=Bound(least=60),
        ),
        "resnet18-traps-t": Case(
            "ResNet-18, Student t elements, with traps and MP spikes", lambda: t(resnet()), full=True, peer_rounds=1,
            against_peer=Bound(least=60),
        ),
        "4096-traps": Case(
            "one 4096², with traps and MP spikes", large, full=True, peer_rounds=1, rounds=2,
            drivers=("torch, default threads",), against_peer=Bound(least=12), against_bare=Bound(most=1.3),
        ),
        "4096-traps-t": Case(
            "one 4096², Student t elements, with traps and MP spikes", lambda: t(large()), full=True, peer_rounds=1,
            rounds=2, drivers=("torch, default threads",),
            against_peer=Bound(least=12), against_bare=Bound(most=1.3),
        ),
    }  # fmt: skip


def small() -> dict[str, Case]:
    """The same rows with tiny matrices and two rounds: whether it runs, not how fast. Bounds are left out."""
    block, t = partial(shapes.gpt2_small, blocks=1, width=64), shapes.heavy_tailed
    resnet, square = partial(shapes.resnet18, width=8, classes=50), partial(shapes.square, 300)
    once = {"rounds": 2, "peer_rounds": 1, "hill_rounds": 1}
    return {
        "gpt2": Case("tiny GPT-2, plain", partial(shapes.gpt2_small, blocks=2, width=64), **once),
        "resnet18": Case("tiny ResNet-18, plain", resnet, **once),
        "4096": Case("one 300², plain", square, **once),
        "llama": Case("tiny Llama block, plain", partial(shapes.llama_block, width=64), **once),
        "minilm": Case("BERT (all-MiniLM-L6-v2, trained), plain", shapes.minilm, rounds=1, peer_rounds=1),
        "gpt2-traps": Case("tiny GPT-2 block, with traps and MP spikes", block, full=True, **once),
        "gpt2-traps-t": Case("the same, Student t elements", lambda: t(block()), full=True, **once),
        "gpt2-again-t": Case("tiny GPT-2 block, Student t elements, again", lambda: t(block()), again=True, **once),
        "4096-traps-t": Case("one 300², Student t elements, with traps", lambda: t(square()), full=True, **once),
    }

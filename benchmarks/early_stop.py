"""How often a first shuffle that is clear gives another verdict than all the shuffles: what the early stop costs.

Matrices of many laws of elements that are near enough to a trap to be shuffled are shuffled 15 times. The verdict is
that of the rule, a trap in at least half of the shuffles. Those decided by the first shuffle alone are compared with
the first three together, which is what they would have had, and with all 15.

`python -m benchmarks.early_stop` prints the table in about ten minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ww_monitor.spectra.elements import Elements, elements
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE, REPLICAS, Edge, shuffled

SHAPES = ((64, 64), (200, 60), (256, 128), (300, 300))
MANY = 15
"""Shuffles that stand for the law over all of them."""

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _clipped(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Many entries at the limit from which on one makes an outlier."""
    drawn = rng.standard_t(3, shape)
    reach = 1.3 * (shape[-1] * shape[-2]) ** 0.25
    return np.clip(drawn, -reach, reach)


def _mixture(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian with a scale of its own for each row and column, as trained weights have."""
    rows, columns = rng.lognormal(0, 0.4, (*shape[:-1], 1)), rng.lognormal(0, 0.4, (*shape[:-2], 1, shape[-1]))
    return rng.standard_normal(shape) * rows * columns


LAWS: dict[str, Draw] = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "log-normal, σ = 1, random sign": lambda rng, shape: rng.choice([-1.0, 1.0], shape) * rng.lognormal(0, 1.0, shape),
    "rows and columns of log-normal scale": _mixture,
    **{f"Student t, {k} d.o.f.": (lambda rng, shape, k=k: rng.standard_t(k, shape)) for k in range(3, 9)},
    "Student t, 3 d.o.f., clipped": _clipped,
}

PLANTED = (
    *((strength,) for strength in (0.85, 0.95, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.2, 3.0)),
    (1.2, 1.2),
    (1.35, 1.35),
    (2.0, 1.3),
)
"""Entries put into Gaussian matrices, in units of σ(NM)^¼."""


@dataclass(frozen=True)
class Outcome:
    """What the first shuffle, the first three and all of them say of matrices, each field `[K]` bool.

    Attributes:
        clear: Whether the first decides alone.
        first: Whether it has a trap.
        three: Whether the mean count of the first three is a half or more, the verdict of the rule.
        many: Whether that of all is.
    """

    clear: torch.Tensor
    first: torch.Tensor
    three: torch.Tensor
    many: torch.Tensor


def outcome(law: Draw, shape: tuple[int, int], *, matrices: int, seed: int = 0) -> Outcome:
    """Matrices of one law that would be shuffled, and their verdicts."""
    rng = np.random.default_rng([seed, *shape])
    drawn = torch.from_numpy(law(rng, (matrices, *shape)))
    stats = elements(drawn)
    near = torch.nonzero(stats.headroom >= HEADROOM_TO_SHUFFLE).flatten()
    if len(near) == 0:
        return Outcome(*torch.zeros(4, 0, dtype=torch.bool))
    kept = Elements(*(value[near] for value in vars(stats).values()))
    found = shuffled(drawn[near], kept, seed=seed, replicas=MANY, stop_early=False)
    counts, edge = found.num_traps, Edge.of(shape)
    return Outcome(
        clear=edge.is_clear(found.severity[:, 0] * edge.upper),
        first=counts[:, 0] >= 0.5,
        three=counts[:, :REPLICAS].mean(1) >= 0.5,
        many=counts.mean(1) >= 0.5,
    )


def planted(strengths: Sequence[float]) -> Draw:
    """Gaussian matrices with these entries, each in a row and column of its own."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        drawn = rng.standard_normal(shape)
        for k, strength in enumerate(strengths):
            drawn[:, 7 * k + 3, 5 * k + 2] = strength * (shape[-1] * shape[-2]) ** 0.25
        return drawn

    return draw


LAWS |= {"Gaussian with " + " and ".join(f"{s:g}" for s in strengths): planted(strengths) for strengths in PLANTED}


@dataclass(frozen=True)
class Tally:
    """Numbers of matrices.

    Attributes:
        shuffled: Near enough to a trap.
        clear: Decided by the first shuffle.
        traps: Of those, with a trap.
        unlike_three: Of those, with another verdict by three shuffles.
        unlike_many: Of those, with another verdict by `MANY`.
        three_unlike_many: Of all that are shuffled, those where three say other than `MANY`.
    """

    shuffled: int = 0
    clear: int = 0
    traps: int = 0
    unlike_three: int = 0
    unlike_many: int = 0
    three_unlike_many: int = 0

    @classmethod
    def of(cls, outcomes: Outcome) -> Tally:
        """The matrices of one outcome, counted."""
        clear, first, three, many = (value.numpy() for value in vars(outcomes).values())
        counted = (clear, clear & first, clear & (first != three), clear & (first != many), three != many)
        return cls(len(clear), *(int(which.sum()) for which in counted))

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def cells(self) -> list[str]:
        """Of a line of the table."""
        share = f"{self.clear / self.shuffled:.0%}" if self.shuffled else ""
        return [str(self.shuffled), share, *(str(n) for n in list(vars(self).values())[2:])]


def tally(law: Draw, *, matrices: int, shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0) -> Tally:
    """All shapes together."""
    return sum((Tally.of(outcome(law, shape, matrices=matrices, seed=seed)) for shape in shapes), Tally())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=300, help="drawn of each law and shape")
    parser.add_argument("--seed", type=int, default=0, help="of the matrices and of their shuffles")
    options = parser.parse_args()
    print("| elements | shuffled | decided early | with a trap | not as 3 shuffles | not as 15 | 3 not as 15, of all |")
    print("|---|---|---|---|---|---|---|")
    total = Tally()
    for name, law in LAWS.items():
        found = tally(law, matrices=options.matrices, seed=options.seed)
        total += found
        print(f"| {' | '.join([name, *found.cells()])} |", flush=True)
    print(f"| {' | '.join(['all', *total.cells()])} |")


if __name__ == "__main__":
    main()

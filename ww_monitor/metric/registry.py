"""The registry of measurements: name → what is read from the weights themselves.

A new measurement is one decorated function; a metric names it in `needs`, and finds its values in the batch under the
names it gives them. It runs wherever the weights are: on the host, on a device, on the owner of a sharded matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ww_monitor.errors import InvalidArgument, check_choice
from ww_monitor.matrix import Matrix
from ww_monitor.metric.batch import NAN, Values
from ww_monitor.record import computed_once
from ww_monitor.settings import AnalysisOptions
from ww_monitor.spectra.elements import Moments


@dataclass(frozen=True)
class Loaded:
    """B matrices of one shape, scale, precision and device, with their weights.

    Attributes:
        matrices: Their names and shapes.
        weights: Stacks `[b, S, N, M]` that hold the B matrices one after the other, in storage precision; none where
            only the sums over the shards of a matrix are known.
        dtype: Precision in which the weights are stored.
        moments: Of their elements, fields `[B·S]` on the host, once they have been taken.
        gram: `[S, M, M]` of the one matrix whose shards have been added up, instead of its weights.
        solved_on: Why the host solves what was on a device, `""` else.
    """

    matrices: Sequence[Matrix]
    weights: Sequence[torch.Tensor]
    dtype: torch.dtype
    moments: Moments | None = None
    gram: torch.Tensor | None = None
    solved_on: str = ""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights[0].device

    @property
    def stacks(self) -> list[torch.Tensor]:
        """The slices, `[b·S, N, M]` each, in a dtype that has reductions (float8 has none)."""
        flat = [stack.flatten(0, 1) for stack in self.weights]
        return [stack.float() if stack.element_size() < 2 else stack for stack in flat]

    @computed_once
    def layers(self) -> list[torch.Tensor]:
        """`[S, N, M]` of each matrix, likewise."""
        slices = self.matrices[0].shape[0]
        return [layer for stack in self.stacks for layer in torch.split(stack, slices)]

    @property
    def slices(self) -> list[torch.Tensor]:
        """`[N, M]` of each slice of each matrix, B·S of them."""
        return [one for layer in self.layers for one in layer]

    @property
    def grams(self) -> list[torch.Tensor]:
        """`[S, M, M]` float64 of each matrix, WᵀW of the short side: all that a Gram-only measurement may read."""
        if self.gram is not None:
            return [self.gram]
        tall = (layer if layer.shape[1] >= layer.shape[2] else layer.mT for layer in self.layers)
        return [w.mT @ w for w in (one.double() for one in tall)]

    @property
    def known_moments(self) -> Moments:
        """The moments, which have been taken by the time that anything is measured."""
        if self.moments is None:
            raise ValueError("the moments of these matrices have not been taken")
        return self.moments

    def on_host(self) -> Loaded:
        """The same with the weights on the host; itself where they are there."""
        return self if self.device.type == "cpu" else replace(self, weights=[stack.cpu() for stack in self.weights])

    def apart(self) -> list[Loaded]:
        """The matrices of each stack for themselves."""
        ends = list(accumulate(map(len, self.weights)))
        return [
            # moments are of all stacks, and the host takes its own in passing
            replace(self, matrices=self.matrices[end - len(stack) : end], weights=[stack], moments=None)
            for stack, end in zip(self.weights, ends, strict=True)
        ]

    def take(self, rows: Sequence[int]) -> Loaded:
        """Some of the matrices."""
        slices = self.matrices[0].shape[0]
        places = [b * slices + s for b in rows for s in range(slices)]
        each = [layer[None] for stack in self.weights for layer in stack]
        return replace(
            self,
            matrices=[self.matrices[b] for b in rows],
            weights=[each[b] for b in rows if each],
            moments=None if self.moments is None else self.moments.take(places),
        )


Function = Callable[[Loaded, Mapping[str, Values], AnalysisOptions], Mapping[str, Values]]
Predicate = Callable[[Loaded, AnalysisOptions], bool]


def _never(loaded: Loaded, definitions: AnalysisOptions) -> bool:
    return False


@dataclass(frozen=True)
class Measurement:
    """One line of the registry.

    Attributes:
        name: What a metric names in `needs`.
        function: The matrices, what earlier measurements found, the definitions → values by name.
        gram_suffices: Whether `Loaded.grams` and the moments of one matrix are enough for it, so that a sharded matrix
            need not be gathered; else it reads weights.
        after: The measurements whose values it works on.
        asked: Whether the definitions ask for it, whatever metrics are chosen.
    """

    name: str
    function: Function
    gram_suffices: Predicate
    after: tuple[str, ...]
    asked: Callable[[AnalysisOptions], bool]


MEASUREMENTS: dict[str, Measurement] = {}
"""The registry of measurements by name, in the order in which they were entered."""


def measurement(
    *,
    gram_suffices: Predicate = _never,
    after: tuple[str, ...] = (),
    asked: Callable[[AnalysisOptions], bool] = lambda definitions: False,
) -> Callable[[Function], Function]:
    """Enter a function into the registry, under its own name.

    It gets matrices of one shape that have a spectrum, and returns values by row.

    Args:
        gram_suffices: See `Measurement.gram_suffices`.
        after: See `Measurement.after`.
        asked: See `Measurement.asked`.

    Raises:
        InvalidArgument: if another module has a measurement of that name, or `after` names none.
    """

    def enter(function: Function) -> Function:
        name, known = function.__name__, MEASUREMENTS.get(function.__name__)
        # a module that is loaded again, or a cell that is run again, replaces its own
        if known is not None and known.function.__module__ != function.__module__:
            raise InvalidArgument(f"measurement: there is one named {name!r} already, in {known.function.__module__}")
        for earlier in after:
            check_choice("measurement", "after", earlier, MEASUREMENTS)
        MEASUREMENTS[name] = Measurement(name, function, gram_suffices, after, asked)
        return function

    return enter


def wanted(needs: Collection[str], definitions: AnalysisOptions) -> list[Measurement]:
    """The measurements of these names and those the definitions ask for, each after those that it works on.

    Raises:
        InvalidArgument: if one is not in the registry.
    """
    names = [name for name, one in MEASUREMENTS.items() if name in needs or one.asked(definitions)]
    unknown = sorted(set(needs) - set(MEASUREMENTS) - {""})  # "" is of metrics that need none
    if unknown:
        raise InvalidArgument(f"a metric needs one of the measurements {sorted(MEASUREMENTS)}; got {unknown[0]!r}")
    found: dict[str, Measurement] = {}

    def add(name: str) -> None:
        for earlier in MEASUREMENTS[name].after:
            add(earlier)
        found.setdefault(name, MEASUREMENTS[name])

    for name in names:
        add(name)
    return list(found.values())


def reads_weights(loaded: Loaded, needs: Collection[str], definitions: AnalysisOptions) -> bool:
    """Whether a measurement takes more of a matrix than its Gram matrix and its moments."""
    return not all(one.gram_suffices(loaded, definitions) for one in wanted(needs, definitions))


def measure(
    loaded: Loaded, known: Sequence[bool], needs: Collection[str], definitions: AnalysisOptions
) -> dict[str, Values]:
    """The values of all measurements, by name; NaN or `None` for a matrix without a spectrum.

    Args:
        loaded: The matrices, with their moments.
        known: Which of them have a spectrum.
        needs: Names of measurements.
        definitions: Which definitions to follow.
    """
    rows = [b for b, has_spectrum in enumerate(known) if has_spectrum]
    values: dict[str, Values] = {}
    if not rows:
        return values
    readable = loaded if len(rows) == len(known) else loaded.take(rows)
    for one in wanted(needs, definitions):
        found = one.function(readable, values, definitions)
        for name, of_rows in found.items():
            if len(of_rows) != len(rows) or name in values:
                raise ValueError(
                    f"measurement {one.name!r}: expected {len(rows)} values under a name of its own,"
                    f" got {len(of_rows)} under {name!r}"
                )
        values.update(found)
    return values if len(rows) == len(known) else {k: _spread(v, rows, len(known)) for k, v in values.items()}


def _spread(values: Values, rows: Sequence[int], count: int) -> Values:
    if isinstance(values, torch.Tensor):
        dtype = values.dtype if values.is_floating_point() else torch.float64  # integers have no NaN
        spread = torch.full((count, *values.shape[1:]), NAN, dtype=dtype, device=values.device)
        spread[torch.tensor(rows, dtype=torch.long, device=values.device)] = values.to(dtype)
        return spread
    each: list[object] = [None] * count
    for row, value in zip(rows, values, strict=True):
        each[row] = value
    return each

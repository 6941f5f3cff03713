"""What one process would analyse: shapes, work and reasons to skip."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from timeit import repeat
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from torch import nn
from torch.nn.parameter import is_lazy

from ww_monitor.errors import MissingDependency
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.settings import Select, Stored, WalkOptions
from ww_monitor.signatures import taking
from ww_monitor.walk.containers import choose
from ww_monitor.walk.files import num_stored
from ww_monitor.walk.lora import is_adapted
from ww_monitor.walk.names import BUFFER
from ww_monitor.walk.reading import all_parameters
from ww_monitor.walk.sharded import shards_of
from ww_monitor.walk.sources import Source, walk_source

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in float64: of the product WᵀW, and of the eigenvalues of it."""

    gram: float
    solve: float


@dataclass(frozen=True)
class Planned:
    """A matrix that would be analysed: as in `Matrix`, its operations, and the estimated time of its eigenvalues."""

    name: str
    kind: str
    role: str
    shape: tuple[int, int, int]
    long_side: int
    short_side: int
    num_eigenvalues: int
    operations: float
    seconds: float


@dataclass(frozen=True)
class OfKind:
    """What becomes of the weights of one kind.

    Attributes:
        kind: Their kind; `"vector"` for parameters of fewer than two dimensions, which have no spectrum.
        followed: How many matrices would be analysed.
        skipped: How many weights would not.
        share: Of the model's parameters, those in the matrices that would be analysed.
        share_skipped: Those in the weights that would not.
        reasons: Why → how many, the most frequent first.
    """

    kind: str
    followed: int
    skipped: int
    share: float
    share_skipped: float
    reasons: Mapping[str, int]


@dataclass(frozen=True)
class Description:
    """An analysis before it is made: what would be analysed, what is left out and why, the machine's speed, totals."""

    rows: tuple[Planned, ...]
    skipped: tuple[Skipped, ...]
    rates: Rates
    num_eigenvalues: int
    operations: float
    seconds: float
    parameters: int = 0
    kinds: tuple[OfKind, ...] = ()

    @property
    def share(self) -> float:
        """Share of the parameters that would be followed, 0 to 1."""
        return sum(one.share for one in self.kinds)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a matrix, those left out at the end with their `skipped` reason (`""` for the others).

        Raises:
            MissingDependency: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependency("Description.to_pandas: needs pandas; pip install 'ww-monitor[plots]'") from error
        rows: list[dict[str, object]] = [asdict(row) | {"skipped": ""} for row in self.rows]
        rows += [{"skipped": item.reason, **asdict(item)} for item in self.skipped]
        return pandas.DataFrame(rows, columns=[*(field.name for field in fields(Planned)), "skipped"])

    def __str__(self) -> str:
        cells = [("name", "kind", "role", "shape", "eigenvalues", "seconds")] + [
            (row.name, row.kind, row.role, _shape(row.shape), str(row.num_eigenvalues), f"{row.seconds:.2g}")
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        lines += [f"skipped {item.name} {_shape(item.shape)}: {item.reason}" for item in self.skipped]
        for one in self.kinds:
            if one.kind == "vector":
                lines.append(f"vector: {one.share_skipped:.1%} of the parameters, which have no spectrum")
                continue
            why = "; ".join(f"{count} × {reason}" for reason, count in list(one.reasons.items())[:3])
            counts = f"{one.kind}: {one.followed} followed ({one.share:.1%} of the parameters), "
            lines.append(f"{counts}{one.skipped} skipped ({one.share_skipped:.1%}){': ' if why else ''}{why}")
        total = f"{len(self.rows)} matrices, {self.num_eigenvalues} eigenvalues, {self.operations:.2g} operations, "
        return "\n".join([*lines, total + f"about {self.seconds:.2g} s ({len(self.skipped)} skipped)"])


@dataclass(frozen=True, eq=False)
class DescribeOptions(Stored, WalkOptions, Select):
    """What `describe` takes."""

    where: ClassVar[str] = "describe"
    model: Annotated[Source, "Whatever `ww_monitor.analyze` accepts."]
    _: KW_ONLY


@taking(DescribeOptions)
def describe(given: DescribeOptions) -> Description:
    """What `ww_monitor.analyze(model, ...)` would analyse, what it would cost, and what it would skip and why.

    No weight is read, so that a module may be on the meta device. The estimate covers the eigenvalues on this
    machine's host, which dominate large layers; a layer that may hold a trap is solved up to `replicas` times more.

    Returns:
        `rows`, `skipped`, `kinds` (how many are followed and skipped, why, and what share of the model's parameters
        they are), totals and `.to_pandas()`; printing it gives a table.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.

    >>> import torch
    >>> plan = describe(torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4)))
    >>> [(row.name, row.shape, row.num_eigenvalues) for row in plan.rows], [item.reason for item in plan.skipped]
    ([('0', (1, 100, 200), 100), ('1', (9, 8, 3), 27)], ['4 eigenvalues, fewer than min_size=8'])
    """
    how = given.for_walker("default")
    walked = walk_source(given.model, **how, layout=shards_of, part=given.part)
    return plan_matrices(Select.of(given).apply(walked), parameters=num_parameters(given.model, given.part))


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape[1:] if len(shape) == 3 and shape[0] == 1 else shape))


def num_parameters(model: object, part: str = "") -> int:
    """The number of a model's parameters, or of what a mapping or checkpoint stores; 0 for a file of Keras.

    >>> import torch
    >>> num_parameters(torch.nn.Linear(3, 2)), num_parameters({"net": {"fc.weight": torch.zeros(2, 3)}})
    (8, 6)
    """
    if isinstance(model, (str, Path)):
        return num_stored(model, part)
    if isinstance(model, Mapping):
        held = choose(model, part, "describe").state_dicts.values() if model else ()
        return sum(tensor.numel() for one in held for tensor in one.tensors.values())
    count = getattr(model, "count_params", None)  # of Keras
    if callable(count) and getattr(model, "built", False):  # it raises before
        return int(count())
    if not isinstance(model, nn.Module):
        return 0
    # a partitioned parameter is empty here, and says how large the whole is
    sizes = (getattr(p, "ds_shape", None) or p.shape for _, p in all_parameters(model) if not is_lazy(p))
    return sum(math.prod(size) for size in sizes)


def kinds_of(items: Iterable[Matrix | Skipped], parameters: int) -> tuple[OfKind, ...]:
    """What becomes of each kind; the share of a delta is that of its factors, and a tied weight counts once.

    Args:
        items: What a walker yields, after selection.
        parameters: How many the model has, or 0 for those that are listed.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    sizes: dict[str, Counter[bool]] = defaultdict(Counter)
    listed = list(items)
    deltas = {item.name: str(item.kind) for item in listed if isinstance(item, Matrix) and is_adapted(item.name)}
    for item in listed:
        reason = item.reason if isinstance(item, Skipped) else ""
        again = is_adapted(item.name) or reason.startswith(("tied to", BUFFER))
        counts[str(item.kind)][reason] += 1
        delta = _delta_of(item.name, reason, deltas)
        sizes[delta or str(item.kind)][bool(delta) or not reason] += 0 if again else math.prod(item.shape or (0,))
    known = sum(size for of_kind in sizes.values() for size in of_kind.values())
    whole = max(parameters, known, 1)
    found = []
    for kind, of_kind in counts.items():
        followed = of_kind.pop("", 0)
        shares = sizes[kind][True] / whole, sizes[kind][False] / whole
        found.append(OfKind(kind, followed, of_kind.total(), *shares, dict(of_kind.most_common())))
    if parameters > known:
        found.append(OfKind("vector", 0, 0, 0.0, (parameters - known) / whole, {}))
    return tuple(found)


def _delta_of(name: str, reason: str, deltas: Mapping[str, str]) -> str:
    """The kind of the delta that is followed in the place of a factor; `""` for what is none."""
    if not reason.startswith("factor of "):
        return ""
    words, label = name.split("."), reason.removeprefix("factor of ")
    return next((deltas[at] for end in range(len(words)) if (at := ".".join([*words[:end], label])) in deltas), "")


def plan_matrices(
    items: Iterable[Matrix | Skipped], *, rates: Rates | None = None, parameters: int | None = None
) -> Description:
    """`describe` of what a walker yields, after selection; without `rates` this machine is measured.

    Shares are told where the number of `parameters` is given, 0 for that of what is listed.
    """
    found, speed = list(items), rates or measured_rates()
    rows = tuple(_planned(item, speed) for item in found if isinstance(item, Matrix))
    skipped = tuple(item for item in found if isinstance(item, Skipped))
    num_eigenvalues = sum(row.num_eigenvalues for row in rows)
    totals = sum(row.operations for row in rows), sum(row.seconds for row in rows)
    kinds = () if parameters is None else kinds_of(found, parameters)
    return Description(rows, skipped, speed, num_eigenvalues, *totals, parameters or 0, kinds)


def _planned(matrix: Matrix, rates: Rates) -> Planned:
    gram, solve = operations(matrix.shape)
    known = matrix.name, str(matrix.kind), matrix.role, matrix.shape, matrix.long_side, matrix.short_side
    return Planned(*known, matrix.num_eigenvalues, gram + solve, gram / rates.gram + solve / rates.solve)


def operations(shape: tuple[int, int, int]) -> tuple[float, float]:
    """R·M²N and R·(4/3)M³: floating-point operations of R Gram matrices and of their eigenvalues.

    A symmetric product takes half of the 2M²N of a general one; the reduction to tridiagonal form takes (4/3)M³ and
    the eigenvalues after it O(M²). Source: Golub & Van Loan 2013 (Matrix Computations, 4th ed., §1.2.8, §8.3).

    >>> operations((1, 300, 600))
    (54000000.0, 36000000.0)
    """
    slices, n, m = shape[0], max(shape[1:]), min(shape[1:])
    return float(slices * m * m * n), slices * m**3 * 4 / 3


@lru_cache(maxsize=1)
def measured_rates() -> Rates:
    """Operations a second of a Gram matrix and an eigensolve of side 512 (an ordinary layer), faster of two runs."""
    w = np.random.default_rng(0).standard_normal((512, 512))  # a generator of its own: the global one stays
    gram, solve = operations((1, *w.shape))
    squared = w.T @ w
    seconds = [min(repeat(run, number=1, repeat=2)) for run in (lambda: w.T @ w, lambda: np.linalg.eigvalsh(squared))]
    return Rates(gram / seconds[0], solve / seconds[1])

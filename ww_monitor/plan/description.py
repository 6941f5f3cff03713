"""What one process would analyse: shapes, work and reasons to skip."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ww_monitor.errors import MissingDependency
from ww_monitor.matrices import Matrix, Skipped
from ww_monitor.settings import Select
from ww_monitor.walk.sources import Source, walk_source

if TYPE_CHECKING:
    import pandas

_SIDE = 512
"""Side of the matrix that the rates are measured with. Our choice: a layer of ordinary size, solved in a tenth of a
second."""


def describe(
    model: Source,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_size: int = 8,
    max_size: int | None = None,
) -> Description:
    """What `ww_monitor.analyze(model, ...)` would analyse, what it would cost, and what it would skip and why.

    No weight is read. The estimate covers the eigenvalues on this machine's host, which dominate large layers; a
    layer that may hold a trap is solved up to `replicas` times more.

    Args:
        model: Whatever `ww_monitor.analyze` accepts.
        include: Globs on layer names; none keeps all.
        exclude: Globs on layer names to leave out.
        min_size: Least number of eigenvalues of a layer.
        max_size: Largest number of eigenvalues of a layer.

    Returns:
        `rows`, `skipped`, totals and `.to_pandas()`; printing it gives a table.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.

    >>> import torch
    >>> plan = describe(torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4)))
    >>> [(row.name, row.shape, row.num_eigenvalues) for row in plan.rows], [item.reason for item in plan.skipped]
    ([('0', (1, 100, 200), 100), ('1', (9, 8, 3), 27)], ['4 eigenvalues, fewer than min_size=8'])
    """
    return plan_matrices(
        Select(include=include, exclude=exclude, min_size=min_size, max_size=max_size).apply(walk_source(model))
    )


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in float64, measured on this machine.

    Attributes:
        gram: Of the product WᵀW.
        solve: Of the eigenvalues of it.
    """

    gram: float
    solve: float


@dataclass(frozen=True)
class Planned:
    """A matrix that would be analysed.

    Attributes:
        name, kind, role: As in `Matrix`.
        shape: `(slices, rows, columns)`.
        long_side: N.
        short_side: M.
        num_eigenvalues: slices · M.
        operations: See `operations`, summed over the two steps.
        seconds: Estimated time of the eigenvalues.
    """

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
class Description:
    """An analysis before it is made.

    Attributes:
        rows: What would be analysed, in the order of the model.
        skipped: What would be left out, with the reason.
        rates: What `seconds` is computed from.
    """

    rows: tuple[Planned, ...]
    skipped: tuple[Skipped, ...]
    rates: Rates

    @property
    def num_eigenvalues(self) -> int:
        """Of all layers."""
        return sum(row.num_eigenvalues for row in self.rows)

    @property
    def operations(self) -> float:
        """Floating-point operations of all layers."""
        return sum(row.operations for row in self.rows)

    @property
    def seconds(self) -> float:
        """Estimated time of all layers, one after the other."""
        return sum(row.seconds for row in self.rows)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a matrix, those left out at the end with their `skipped` reason (`""` for the others).

        Raises:
            MissingDependency: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependency("Description.to_pandas: needs pandas; pip install 'ww-monitor[plots]'") from error
        columns = [field.name for field in fields(Planned)]
        planned = [{column: getattr(row, column) for column in columns} | {"skipped": ""} for row in self.rows]
        left_out = [
            {"name": item.name, "kind": item.kind, "shape": item.shape, "skipped": item.reason} for item in self.skipped
        ]
        return pandas.DataFrame(planned + left_out, columns=[*columns, "skipped"])

    def __str__(self) -> str:
        head = ("name", "kind", "role", "shape", "eigenvalues", "seconds")
        cells = [
            (row.name, row.kind, row.role, _shape(row.shape), str(row.num_eigenvalues), f"{row.seconds:.2g}")
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (head, *cells)]
        lines += [f"skipped {item.name} {_shape(item.shape)}: {item.reason}" for item in self.skipped]
        total = (
            f"{len(self.rows)} matrices, {self.num_eigenvalues} eigenvalues, {self.operations:.2g} operations, "
            f"about {self.seconds:.2g} s ({len(self.skipped)} skipped)"
        )
        return "\n".join([*lines, total])


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape[1:] if len(shape) == 3 and shape[0] == 1 else shape))


def plan_matrices(items: Iterable[Matrix | Skipped], *, rates: Rates | None = None) -> Description:
    """`describe` of what a walker yields, after selection.

    Args:
        items: The matrices; none is loaded.
        rates: Speed of the machine; `None` measures it once a process.
    """
    speed = measured_rates() if rates is None else rates
    rows: list[Planned] = []
    skipped: list[Skipped] = []
    for item in items:
        if isinstance(item, Matrix):
            rows.append(_planned(item, speed))
        else:
            skipped.append(item)
    return Description(tuple(rows), tuple(skipped), speed)


def _planned(matrix: Matrix, rates: Rates) -> Planned:
    gram, solve = operations(matrix.shape)
    return Planned(
        matrix.name,
        matrix.kind,
        matrix.role,
        matrix.shape,
        matrix.long_side,
        matrix.short_side,
        matrix.num_eigenvalues,
        gram + solve,
        gram / rates.gram + solve / rates.solve,
    )


def operations(shape: tuple[int, int, int]) -> tuple[float, float]:
    """R·M²N and R·(4/3)M³: floating-point operations of R Gram matrices and of their eigenvalues.

    A symmetric product takes half of the 2M²N of a general one; the reduction to tridiagonal form takes (4/3)M³ and
    the eigenvalues after it O(M²). Source: Golub & Van Loan 2013 (Matrix Computations, 4th ed., §1.2.8, §8.3).

    Args:
        shape: `(slices, rows, columns)`.

    >>> operations((1, 300, 600))
    (54000000.0, 36000000.0)
    """
    slices, n, m = shape[0], max(shape[1:]), min(shape[1:])
    return float(slices * m * m * n), slices * m**3 * 4 / 3


@lru_cache(maxsize=1)
def measured_rates() -> Rates:
    """Operations a second of one Gram matrix and one eigensolve of side 512, the faster of two runs; once a process."""
    w = np.random.default_rng(0).standard_normal((_SIDE, _SIDE))
    gram_operations, solve_operations = operations((1, _SIDE, _SIDE))
    runs = [_time(w) for _ in range(2)]
    return Rates(gram_operations / min(run[0] for run in runs), solve_operations / min(run[1] for run in runs))


def _time(w: np.ndarray) -> tuple[float, float]:
    start = time.perf_counter()
    gram = w.T @ w
    middle = time.perf_counter()
    np.linalg.eigvalsh(gram)
    return middle - start, time.perf_counter() - middle

"""Two models side by side: distances, similarity, and how far the leading singular subspaces have turned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch

from ww_monitor.baseline import TOP, relative
from ww_monitor.errors import LayerError, MissingDependency, check_choice, check_positive_int
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import NAN
from ww_monitor.settings import Patterns, Select, Stored
from ww_monitor.signatures import taking
from ww_monitor.spectra.subspaces import cka, overlap, subspace
from ww_monitor.walk.delta import pair
from ww_monitor.walk.sources import Source, walk_source

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Distance:
    """A layer of two models. NaN: not known, because a matrix is zero or not finite.

    Attributes:
        name: The name of the layer.
        shape: `(slices, rows, columns)`.
        frobenius: ‖A − B‖_F over all slices.
        relative: ‖A − B‖_F / ‖A‖_F.
        cka: Similarity in [0, 1], see `cka`; mean over slices.
        left_overlap: Mean squared cosine of the angles between the leading left singular subspaces; mean over slices.
        right_overlap: The same for the right ones.
    """

    name: str
    shape: tuple[int, int, int]
    frobenius: float
    relative: float
    cka: float
    left_overlap: float
    right_overlap: float


@dataclass(frozen=True)
class Distances:
    """The layers of two models compared.

    Attributes:
        rows: One a pair.
        unpaired: Name → why a layer has no partner.
    """

    rows: tuple[Distance, ...]
    unpaired: Mapping[str, str]

    @property
    def summary(self) -> dict[str, float]:
        """Mean of each number over the layers where it is known."""
        numbers = [field.name for field in fields(Distance)][2:]  # without name and shape
        return {name: _mean([getattr(row, name) for row in self.rows]) for name in numbers}

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer.

        Raises:
            MissingDependency: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependency("Distances.to_pandas: needs pandas; pip install 'ww-monitor[plots]'") from error
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=[field.name for field in fields(Distance)])


@dataclass(frozen=True, eq=False)  # tensors compare entry by entry
class DistanceOptions(Stored, Patterns):
    """What `distances` takes."""

    where: ClassVar[str] = "distances"
    a: Annotated[Source, "A model: whatever `ww_monitor.analyze` accepts."]
    b: Annotated[Source, "The model to compare it with."]
    _: KW_ONLY
    top: Annotated[int, "Singular directions whose span is compared.", check_positive_int] = TOP
    unpaired: Annotated[
        Literal["error", "skip"],
        '`"error"`, or `"skip"` to list in `.unpaired` what has no partner of its name and shape.',
    ] = "error"
    part_b: Annotated[str | None, "`part` of `b`; `None` for the same."] = None


@taking(DistanceOptions)
def distances(given: DistanceOptions) -> Distances:
    """‖A − B‖_F, ‖A − B‖_F/‖A‖_F, linear CKA and subspace overlap of every matrix A of one model and B of another.

    Layers are paired by name. Both models are only read, in float64, one pair in memory at a time. weightwatcher
    0.7.7 pairs by position and calls √CKA a distance; its `method="raw"` is `frobenius` here.

    Returns:
        One row a pair with `Distance`'s fields, `.summary`, `.unpaired` and `.to_pandas()`.

    Raises:
        InvalidArgument: naming the layers that do not pair, or the argument, its value and the choices.
        LayerError: naming a layer that cannot be read.

    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    >>> double = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    >>> _ = double.load_state_dict({key: 2 * weight for key, weight in net.state_dict().items()})
    >>> {key: round(value, 3) for key, value in distances(net, double).summary.items() if key != "frobenius"}
    {'relative': 1.0, 'cka': 1.0, 'left_overlap': 1.0, 'right_overlap': 1.0}
    """
    select = Select(include=given.include, exclude=given.exclude, min_size=1)
    second = given.part if given.part_b is None else given.part_b  # "" is a part: the whole
    sides = [select.apply(walk_source(one, part=part)) for one, part in ((given.a, given.part), (given.b, second))]
    return compare_matrices(*sides, top=given.top, unpaired=given.unpaired)


@torch.no_grad()
def compare_matrices(
    a: Iterable[Matrix | Skipped], b: Iterable[Matrix | Skipped], *, top: int = TOP, unpaired: str = "error"
) -> Distances:
    """`distances` of what two walkers yield, after selection; the same arguments and errors."""
    check_positive_int("distances", "top", top)
    check_choice("distances", "unpaired", unpaired, ("error", "skip"))
    pairs = pair(a, b, called=("a", "b"))
    if unpaired == "error":
        pairs.check("distances")
    rows = []
    for one, other in pairs.matched:
        try:
            rows.append(_compare(one, other, top))
        except Exception as error:
            raise LayerError(f"distances: layer {one.name!r}: {error}") from error
    return Distances(tuple(rows), pairs.unpaired)


def _compare(one: Matrix, other: Matrix, top: int) -> Distance:
    first = one.load().detach()
    second = other.load().detach().to(first.device)
    left, right = zip(subspace(first, top), subspace(second, top), strict=True)
    x, y = first.double(), second.double()
    distance, norm = float(torch.linalg.vector_norm(x - y)), float(torch.linalg.vector_norm(x))
    return Distance(
        one.name,
        one.shape,
        frobenius=distance if math.isfinite(distance) else NAN,
        relative=relative(distance, norm),
        cka=_mean(cka(x, y).tolist()),
        left_overlap=_mean(overlap(*left).tolist()),
        right_overlap=_mean(overlap(*right).tolist()),
    )


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are known, NaN of none."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else NAN

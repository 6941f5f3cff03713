"""Two models → their difference: matrices W − W₀, paired by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix, Shards, Skipped

_MOST_NAMED = 20


@dataclass(frozen=True)
class Pairs:
    """The matrices of two models that belong together.

    Attributes:
        matched: Two matrices of one name and shape each, in the order of the first model.
        unpaired: Name → why it has no partner, for every other matrix of either model.
    """

    matched: tuple[tuple[Matrix, Matrix], ...]
    unpaired: Mapping[str, str]

    def check(self, where: str) -> None:
        """Raise `InvalidArgument` if a matrix has no partner, naming the first twenty and why."""
        if self.unpaired:
            named = [f"{name!r}: {reason}" for name, reason in list(self.unpaired.items())[:_MOST_NAMED]]
            more = len(self.unpaired) - len(named)
            listed = "; ".join(named + [f"and {more} more"] * (more > 0))
            raise InvalidArgument(
                f"{where}: expected every matrix to have a partner of its name and shape; got {listed}; "
                "leave such layers out with exclude=[...]"
            )


def pair(
    first: Iterable[Matrix | Skipped],
    second: Iterable[Matrix | Skipped],
    *,
    called: tuple[str, str] = ("the first", "the second"),
) -> Pairs:
    """{(A, B): name and shape equal}, never by position.

    A weight that both sides skip takes no part. One that a single side skips leaves its partner unpaired.

    Args:
        first: What a walker yields for one model, after selection.
        second: The same for the other.
        called: What the reasons call the two models.
    """
    left, right = {item.name: item for item in first}, {item.name: item for item in second}
    matched, unpaired = [], {}
    for name in {**left, **right}:
        a, b = left.get(name), right.get(name)
        if isinstance(a, Matrix) and isinstance(b, Matrix):
            if a.shape == b.shape:
                matched.append((a, b))
            else:
                unpaired[name] = f"shape {a.shape} in {called[0]} and {b.shape} in {called[1]}"
        elif isinstance(a, Matrix) or isinstance(b, Matrix):
            other, (here, there) = (b, called) if isinstance(a, Matrix) else (a, called[::-1])
            skipped = f", left out of {there} ({other.reason})" if isinstance(other, Skipped) else ""
            unpaired[name] = f"only in {here}{skipped}"
    return Pairs(tuple(matched), unpaired)


def delta(items: Iterable[Matrix | Skipped], base_items: Iterable[Matrix | Skipped]) -> Iterator[Matrix | Skipped]:
    """W − W₀ for every matrix W, in float32 at least and in float64 if either is stored so.

    Nothing is read here: a difference is computed when its `load` is called, on the device of W. A matrix that has
    not changed gives zeros. weightwatcher 0.7.7 pairs by position and leaves what does not fit un-subtracted; here
    that is an error.

    Args:
        items: What a walker yields for the model, after selection.
        base_items: The same for the model before training.

    Returns:
        A `Matrix` with the name, kind and role of W for each pair, and what the model's own walker skipped.

    Raises:
        InvalidArgument: naming every matrix of either side that has no partner of its name and shape, and why.

    >>> initial = [Matrix("fc", "dense", (1, 2, 2), lambda: torch.eye(2)[None])]
    >>> trained = [Matrix("fc", "dense", (1, 2, 2), lambda: torch.full((1, 2, 2), 2.0))]
    >>> [matrix.load().tolist() for matrix in delta(trained, initial)]
    [[[[1.0, 2.0], [2.0, 1.0]]]]
    """
    listed = list(items)
    pairs = pair(listed, base_items, called=("the model", "the base"))
    pairs.check("delta")
    differences = {matrix.name: _between(matrix, base) for matrix, base in pairs.matched}
    return iter([differences.get(item.name, item) for item in listed])


def _between(matrix: Matrix, base: Matrix) -> Matrix:
    shards = matrix.shards or base.shards
    together = None if shards is None else Shards(shards.ranks)  # what is computed has no pieces
    return replace(matrix, load=partial(_difference, matrix, base), shards=together)


@torch.no_grad()
def _difference(matrix: Matrix, base: Matrix) -> torch.Tensor:
    weights, initial = matrix.load().detach(), base.load().detach()
    # `pair` has compared the shapes at the walk; a live model may have changed since.
    if weights.shape != initial.shape:
        raise ValueError(f"expected a base of shape {tuple(weights.shape)}, got {tuple(initial.shape)}")
    dtype = torch.float64 if torch.float64 in (weights.dtype, initial.dtype) else torch.float32
    return weights.to(dtype) - initial.to(weights.device, dtype)

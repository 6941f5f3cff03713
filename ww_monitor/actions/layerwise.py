"""Snapshot → a factor for each layer, from how heavy the tail of its spectrum is beside the others'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ww_monitor.errors import InvalidArgument
from ww_monitor.kind import Kind
from ww_monitor.record import Layer, Snapshot
from ww_monitor.settings import matching

ALPHA = "alpha_hill"


@dataclass(frozen=True, kw_only=True)
class _Layerwise:
    """Factor = low + (high − low) (α − min α)/(max α − min α), over the layers that are balanced.

    α is `alpha_hill`. Balanced are layers of at least `min_eigenvalues` that are no embedding, no head and not in
    `exclude`; the others, and one whose α is not known, keep the base. Fewer than two, or equal ones, are not balanced.
    """

    low: float
    high: float
    dry_run: bool = True
    keep_mean: bool = False
    min_eigenvalues: int = 50
    exclude: Sequence[str] = ()

    option: ClassVar[str]
    metric: ClassVar[str]
    needs: ClassVar[Sequence[str]] = (ALPHA,)

    def __post_init__(self) -> None:
        where = type(self).__name__
        if not 0 <= self.low <= self.high < math.inf or self.high == 0:
            raise InvalidArgument(f"{where}: expected 0 <= low <= high and high > 0, got {self.low!r}, {self.high!r}")
        if isinstance(self.exclude, str):
            raise InvalidArgument(f"{where}: exclude must be a sequence of globs; got the string {self.exclude!r}")

    def factors(self, snapshot: Snapshot) -> Mapping[str, float]:
        """Layer → factor."""
        left_out = {name for one in self.exclude for name in matching(one, [row.name for row in snapshot.layers])}
        rows = [row for row in snapshot.layers if self._balances(row) and row.name not in left_out]
        alphas = {row.name: row.value(ALPHA) for row in rows if math.isfinite(row.value(ALPHA))}
        least, most = min(alphas.values(), default=0.0), max(alphas.values(), default=0.0)
        if not most > least:
            return {}
        span = (self.high - self.low) / (most - least)
        found = {name: self.low + span * (alpha - least) for name, alpha in alphas.items()}
        mean = sum(found.values()) / len(found) if self.keep_mean else 1.0
        return {name: factor / mean for name, factor in found.items()}

    def _balances(self, row: Layer) -> bool:
        slices, *sides = row.shape
        kept_apart = row.kind == Kind.EMBEDDING or row.role == "head"
        return not kept_apart and slices * min(sides) >= self.min_eigenvalues


@dataclass(frozen=True, kw_only=True)
class LayerwiseRate(_Layerwise):
    """A larger learning rate where the tail is lighter: `low` to `high` times the base, linear in the Hill alpha.

    Source: TempBalance (Zhou et al. 2023, arXiv 2312.00359), with 0.5 to 1.5, the least of 50 eigenvalues, once an
    epoch; LLR (arXiv 2605.22297) is `LayerwiseRate(low=1, high=5)` at `every_n_steps=100`. Both leave the first and the
    last layer out or set them by hand, and TempBalance gives a batch norm the rate of its convolution; here what is no
    matrix keeps the base rate. A decay that is multiplied by the rate (AdamW's) grows with it, as in the papers.
    Factors of 1 to 5 raise the mean rate: `keep_mean` tells balance from that.

    Args:
        low: Factor of the layer with the least alpha.
        high: Factor of the layer with the largest.
        dry_run: Only log the factors; `False` applies them.
        keep_mean: Divide the factors by their mean over the balanced layers.
        min_eigenvalues: A layer with fewer keeps the base rate.
        exclude: Globs on names of layers that keep it too.

    >>> alphas = {"q": 2.0, "k": 3.0, "v": 4.0}
    >>> rows = [Layer(name, "dense", (1, 64, 64), metrics={"alpha_hill": alpha}) for name, alpha in alphas.items()]
    >>> LayerwiseRate(low=1, high=5).factors(Snapshot(tuple(rows)))
    {'q': 1.0, 'k': 3.0, 'v': 5.0}
    """

    low: float = 0.5
    high: float = 1.5

    option: ClassVar[str] = "lr"
    metric: ClassVar[str] = "rate_factor"


@dataclass(frozen=True, kw_only=True)
class LayerwiseDecay(_Layerwise):
    """A larger weight decay where the tail is lighter: `low` to `high` times the base, linear in the Hill alpha.

    Source: AlphaDecay (He et al. 2025, arXiv 2506.14562), with 0.67 to 3, every 500 steps. A group whose decay is 0
    keeps it.

    Args:
        low: Factor of the layer with the least alpha.
        high: Factor of the layer with the largest.
        dry_run: Only log the factors; `False` applies them.
        keep_mean: Divide the factors by their mean over the balanced layers.
        min_eigenvalues: A layer with fewer keeps the base decay.
        exclude: Globs on names of layers that keep it too.
    """

    low: float = 2 / 3
    high: float = 3.0

    option: ClassVar[str] = "weight_decay"
    metric: ClassVar[str] = "decay_factor"

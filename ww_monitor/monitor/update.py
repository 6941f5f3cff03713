"""What one optimizer step changed: the weights before it, copied, against those after it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ww_monitor.baseline import TOP, relative
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import NAN
from ww_monitor.spectra.subspaces import largest_eigenvalue, subspace
from ww_monitor.walk.masters import load_in_full

logger = logging.getLogger(__name__)

UPDATE = ("update_ratio", "update_spectral_norm", "update_stable_rank", "update_alignment")
"""What is known of an update ΔW = W′ − W; see `change`."""

Loads = Mapping[str, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Before:
    """The weights before a step, copied to the host; frozen matrices and those without full precision are left out.

    Attributes:
        step: Completed updates when they were copied.
        until: Completed updates up to which what follows is one step.
        optimizers: Where float32 masters are looked for.
        weights: What reads the copies, by name of the matrix.
        unknown: The name and dtype of each matrix whose rounding hides the update.
    """

    step: int
    until: int
    optimizers: Sequence[Any]
    weights: Loads
    unknown: Mapping[str, str]

    @classmethod
    def capture(cls, items: Iterable[Matrix | Skipped], *, step: int, until: int, optimizers: Sequence[Any]) -> Before:
        """Copy what a walker yields, after selection."""
        trained = [item for item in items if isinstance(item, Matrix) and not item.frozen]
        weights, unknown = {}, {}
        for item in trained:
            try:
                weights[item.name] = load_in_full(item, optimizers).to("cpu", copy=True).detach
            except Exception as error:
                logger.debug("no copy of layer %s before a step", item.name, exc_info=error)
                unknown[item.name] = str(error)
        return cls(step, until, tuple(optimizers), weights, unknown)

    def to(self, items: Iterable[Matrix | Skipped], *, copied: bool) -> Update:
        """The update that led to the weights of `items`, which go on changing if they are `copied`."""
        names = [item for item in items if isinstance(item, Matrix) and item.name in self.weights]
        if copied:
            then = Before.capture(names, step=self.until, until=self.until, optimizers=self.optimizers)
            return Update(self.weights, then.weights)
        return Update(self.weights, {one.name: partial(load_in_full, one, self.optimizers) for one in names})


@dataclass(frozen=True)
class Update:
    """One step: name → how the weights before and after it are read."""

    before: Loads
    after: Loads

    @torch.no_grad()
    def changes(self, items: Iterable[Matrix | Skipped]) -> dict[str, dict[str, float]]:
        """Name → `UPDATE` of every matrix, NaN for one whose update is not known; never raises for a layer."""
        result = {}
        for item in items:
            if isinstance(item, Matrix):
                values: tuple[float, ...] = (NAN,) * len(UPDATE)
                if item.name in self.before and item.name in self.after:
                    try:
                        values = change(self.before[item.name](), self.after[item.name](), item.eigenvalue_factor)
                    except Exception as error:
                        logger.debug("no update of layer %s", item.name, exc_info=error)
                result[item.name] = dict(zip(UPDATE, values, strict=True))
        return result


UNKNOWN = Update({}, {})
"""Where no weights were copied before the step."""


def change(before: torch.Tensor, after: torch.Tensor, factor: float = 1.0) -> tuple[float, float, float, float]:
    """‖ΔW‖_F/‖W‖_F, √(c·λmax), ‖ΔW‖²_F/λmax and ‖UᵀΔWV‖²_F/‖ΔW‖²_F of ΔW = W′ − W.

    The first is RMS(ΔW)/RMS(W), as levanter logs it. λmax is the largest eigenvalue of ΔWᵀΔW over the slices
    and c what the layer's eigenvalues are scaled with. U, V are the 8 leading left and right singular directions
    of W in each slice: 1 says that the step moves them within themselves alone, 64/(N·M) is what a random ΔW has.

    Args:
        before: W, `[S, N, M]`.
        after: W′, likewise, on any device; the work is done there.
        factor: c.

    Returns:
        The four; NaN for what is not defined of ΔW = 0 or where a weight is not finite.

    >>> w = torch.diag(torch.tensor([2.0, 1.0]))[None]
    >>> [round(value, 6) for value in change(w, 1.5 * w)]
    [0.5, 1.0, 1.25, 1.0]
    """
    before = before.to(after.device)
    moved = after.double() - before.double()  # a small difference of large numbers
    square = float(moved.square().sum())
    if not math.isfinite(square):
        return NAN, NAN, NAN, NAN
    ratio = relative(math.sqrt(square), float(torch.linalg.vector_norm(before.double())))
    if square == 0:
        return ratio, 0.0, NAN, NAN
    largest = float(largest_eigenvalue(moved).amax())
    left, right = subspace(before, TOP)
    within = float((left.mT @ moved @ right).square().sum())
    return ratio, math.sqrt(factor * largest), square / largest, within / square

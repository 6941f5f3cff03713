"""What the parts of a matrix allow: their sums, whether Gram matrices add up, whether the parts can be sent."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ww_monitor.distributed.inventory import SUMS, Held, Job
from ww_monitor.engine import Options
from ww_monitor.engine.sums import needs_weights
from ww_monitor.spectra.elements import Moments


def sums_of(job: Job, owner: int) -> Moments | None:
    """The sums over the parts of the owner's replica; `None` where they are not known."""
    replica = [job.held[rank] for rank in job.team(owner) if job.held[rank].replica == job.held[owner].replica]
    if any(not held.sums or held.index is None for held in replica):
        return None
    slices = job.matrix.shape[0]
    total, squares, zeros = torch.zeros(3, slices, dtype=torch.float64)
    low = torch.full((slices,), math.inf, dtype=torch.float64)
    high = -low
    for held in replica:
        at = torch.tensor(list(held.index[0]) if held.index else [], dtype=torch.long)
        part = torch.tensor(held.sums, dtype=torch.float64).view(SUMS, -1)
        total[at] += part[0]
        squares[at] += part[1]
        low[at] = torch.minimum(low[at], part[2])
        high[at] = torch.maximum(high[at], part[3])
        zeros[at] += part[4]
    return Moments(total, squares, low, high, zeros)


def summed_side(job: Job, owner: int, options: Options) -> int | None:
    """The axis of the short side where the Gram matrix can be summed from the parts and says all that is asked."""
    sums = sums_of(job, owner)
    if sums is None or needs_weights(job.matrix, sums, options):
        return None
    return unsharded_side(job, owner)


def unsharded_side(job: Job, owner: int) -> int | None:
    """The axis (1 rows, 2 columns) of the short side if each part has all of it, so that Gram matrices add up."""
    team = [job.held[rank] for rank in job.team(owner)]
    _, rows, columns = job.matrix.shape
    short = [axis for axis, side in ((2, columns), (1, rows)) if side == job.matrix.short_side]
    parts = [held.index for held in team if held.index is not None]
    if len(parts) < len(team) or not _cover(job, team):
        return None
    parts = [part for part in parts if all(part)]
    return next((axis for axis in short if all(len(p[axis]) == job.matrix.shape[axis] for p in parts)), None)


def can_gather(job: Job, owner: int) -> bool:
    """Whether the parts lie along one dimension of the mesh, so that they can be sent to the owner alone."""
    team = [job.held[rank] for rank in job.team(owner)]
    return all(held.index is not None and held.split[1] == 1 for held in team) and _cover(job, team)


def _cover(job: Job, team: Iterable[Held]) -> bool:
    """Whether the parts of a replica have as many entries as the matrix."""
    held = list(team)
    entries = sum(math.prod(len(places) for places in one.index or ((),)) for one in held)
    return entries * held[0].split[0] == math.prod(job.matrix.shape) * len(held)

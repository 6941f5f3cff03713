"""The rows of matrices that training leaves alone on every rank: made once, and again only when weights changed."""

from __future__ import annotations

from collections.abc import Iterable

from ww_monitor.distributed.inventory import Job
from ww_monitor.engine import Options
from ww_monitor.record import Layer, Skipped


class FrozenRows:
    """A memory of rows, which the caller of `analyze_on_ranks` keeps between its calls.

    Every rank passes one of its own; the first rank of the group decides, so that only its memory fills.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Layer]] = {}

    def known(self, job: Job, options: Options) -> Layer | None:
        """The row of a matrix whose weights have the same bits as then on each of its ranks, else `None`."""
        then, row = self._kept.get(job.name, (None, None))
        now = _state(job, options)
        return row if now is not None and now == then else None

    def keep(self, jobs: Iterable[Job], layers: Iterable[Layer | Skipped], options: Options) -> None:
        """Remember the rows of frozen matrices, but for those that could not be made.

        Args:
            jobs: What was analysed.
            layers: The row of each.
            options: How they were analysed.
        """
        for job, layer in zip(jobs, layers, strict=True):
            state = _state(job, options)
            # an error may be of the moment, such as memory: it is tried again
            if state is not None and isinstance(layer, Layer) and not layer.status.startswith("error:"):
                self._kept[job.name] = state, layer


def _state(job: Job, options: Options) -> object:
    """What a row depends on; `None` where a rank trains the matrix or could not tell its bits."""
    held = list(job.held.items())
    if any(one.content is None or not one.frozen for _, one in held):
        return None
    return options, job.matrix, [(rank, one.content) for rank, one in held]

"""What a tracker shows beside curves: what the dashboards of all trackers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ww_monitor.record import Snapshot, layer_key
from ww_monitor.sinks.heatmap import AlphaMap, Figures


class Dashboard:
    """What one tracker shows of a run, whoever owns it and writes its curves. The tracker is not kept alive.

    Args:
        prefix: What the owner of the tracker puts before our keys (`"train/"` for the Hugging Face Trainer).
        step_key: Key of the x axis that the owner declares, where trackers have such keys.
        figures: Draws further pictures.
    """

    def __init__(self, *, prefix: str = "", step_key: str | None = None, figures: Figures | None = None) -> None:
        self.prefix = prefix
        self.step_key = step_key
        self.figures = figures
        self.count = 0
        self.alpha_map = AlphaMap()

    def update(self, tracker: Any, snapshot: Snapshot, step: int, *, values: Mapping[str, float] | None = None) -> None:
        """Show one snapshot.

        Args:
            tracker: The same at every call.
            snapshot: What was seen.
            step: Where on the x axis its owner's curves have it.
            values: Scalars to write too, where nobody else does.
        """
        self.count += 1
        self.alpha_map.add(snapshot, step)
        self._show(tracker, snapshot, step, values or {})

    def finish(self, tracker: Any) -> None:
        """Show what waited; the run is over, and its owner may have closed the tracker."""

    def _show(self, tracker: Any, snapshot: Snapshot, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def _pictures(self, snapshot: Snapshot) -> dict[str, np.ndarray]:
        """What `figures` draws, by key."""
        drawn = {} if self.figures is None else self.figures(snapshot)
        return {layer_key("spectrum", name): picture for name, picture in drawn.items()}

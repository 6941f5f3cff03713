"""What a tracker shows beside curves: what the dashboards of all trackers share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ww_monitor.errors import SpectralWarning
from ww_monitor.record import Histogram, Snapshot, layer_key
from ww_monitor.sinks.heatmap import AlphaMap, Figures
from ww_monitor.sinks.published import Publish, Published

_OPEN: WeakKeyDictionary[Named, tuple[object, str, str]] = WeakKeyDictionary()
"""Sink in use → its log, the name that it asks for, and the one that it has."""


class Named:
    """A sink whose keys no other one has that is in use on the same log: the second that would gets `2/`."""

    prefix = ""
    """What stands before its keys, as it was given."""

    within = ""
    """What the callback that it belongs to puts before that."""

    def _name_on(self, log: object) -> str:
        """What stands before its keys in this log."""
        asked = log, self.within + self.prefix
        if _OPEN.get(self, ())[:2] != asked:
            taken = {(where, name) for other, (where, _, name) in _OPEN.items() if other is not self}
            names = (f"{asked[1]}{number}/" if number > 1 else asked[1] for number in count(1))
            name = next(name for name in names if (log, name) not in taken)
            _OPEN[self] = (*asked, name)
            if name != asked[1]:
                said = f"another {type(self).__name__} writes there, so the keys of this one begin with {name!r}"
                # The third frame is who calls `write`, which calls this.
                warnings.warn(f"ww_monitor: {said}; give prefix=", SpectralWarning, stacklevel=3)
        return _OPEN[self][2]

    def _leave(self) -> None:
        """Let others have the name."""
        _OPEN.pop(self, None)


class Dashboard:
    """What one tracker shows of a run, whoever owns it. The tracker is not kept alive.

    Args:
        prefix: What the owner of the tracker puts before our keys (`"train/"` for the Hugging Face Trainer).
        name: What stands before the keys of this one of several monitors.
        figures: Draws further pictures.
        publish: Which values, and which histograms, are shown.
    """

    carries_values = False
    """Whether it writes the curves too, because the owner's logger would do harm by it."""

    def __init__(
        self,
        *,
        prefix: str = "",
        name: str = "",
        figures: Figures | None = None,
        publish: Publish = "key",
    ) -> None:
        self.owner, self.name = prefix, name
        self.figures = figures
        self.published = Published(publish)
        self.count = 0
        self._failed: list[Exception] = []
        self.alpha_map = AlphaMap()

    @property
    def prefix(self) -> str:
        """What stands before the keys of values."""
        return self.owner + self.name

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_failed": []}  # not every exception can be pickled

    def update(self, tracker: Any, snapshot: Snapshot, step: int, *, values: Mapping[str, float] | None = None) -> None:
        """Show one snapshot.

        Args:
            tracker: The same at every call.
            snapshot: What was seen.
            step: Where on the x axis its owner's curves have it.
            values: Scalars to write too, where nobody else does.

        Raises:
            Exception: the first failure, after everything else has been shown.
        """
        self.count += 1
        self._failed = []
        self.alpha_map.add(snapshot, step)
        self._show(tracker, snapshot, step, values or {})
        if self._failed:
            raise self._failed[0]

    def values(self, snapshot: Snapshot) -> dict[str, float]:
        """The scalars that are published, under their keys."""
        return {self.name + key: value for key, value in self.published.scalars(snapshot).items()}

    @contextmanager
    def apart(self) -> Iterator[None]:
        """One kind of content: what fails in it costs nothing else, and is raised in the end."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of any library that draws or writes; `update` raises it
            self._failed.append(error)

    def finish(self, tracker: Any) -> None:
        """Show what waited; the run is over, and its owner may have closed the tracker."""

    def _show(self, tracker: Any, snapshot: Snapshot, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def _pictures(self, snapshot: Snapshot) -> dict[str, np.ndarray]:
        """What `figures` draws, by key."""
        drawn: Mapping[str, np.ndarray] = {}
        with self.apart():
            drawn = {} if self.figures is None else self.figures(snapshot)
        return {self.name + layer_key("spectrum", layer): picture for layer, picture in drawn.items()}

    def _histograms(self, snapshot: Snapshot) -> Iterator[tuple[str, Histogram]]:
        return ((self.name + key, esd) for key, esd in self.published.histograms(snapshot))

"""The spectra of the last snapshot, against which the next one's drift is measured."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ww_monitor.metric.drift import DRIFT, distance
from ww_monitor.record import NAN, Snapshot


class LastSpectra:
    """A sketch of each layer's spectrum where it was last known; a checkpoint carries it on."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, ...]] = {}

    def measure(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the drift of every layer that has a sketch, and without the sketches; it is the last then.

        NaN for a layer that is seen for the first time.
        """
        now = {row.name: row.sketch for row in snapshot.layers if row.sketch is not None}
        if not now:
            return snapshot
        values = {
            name: {DRIFT: distance(self._known[name], found) if name in self._known else NAN}
            for name, found in now.items()
        }
        self._known.update(now)
        layers = tuple(replace(row, sketch=None) for row in snapshot.layers)
        return replace(snapshot, layers=layers).with_metrics(values)

    def state(self) -> dict[str, str]:
        """Name → float32 values as text."""
        packed = {name: np.asarray(values, dtype="<f4").tobytes() for name, values in self._known.items()}
        return {name: base64.b64encode(values).decode() for name, values in packed.items()}

    def load(self, state: Mapping[str, str]) -> None:
        """The inverse of `state`."""
        values = {name: np.frombuffer(base64.b64decode(text), dtype="<f4") for name, text in state.items()}
        self._known = {name: tuple(row.astype(float).tolist()) for name, row in values.items()}

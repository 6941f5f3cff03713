"""What a checkpoint holds of the snapshots that a run has seen: a few numbers a layer, as text."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ww_monitor.record import History, Layer, Snapshot

SHOWN = ("alpha", "sigma", "num_traps", "trap_headroom", "mean_shift")
"""Metrics that the first and the last snapshot keep: for the table at the end of a run (`ww_monitor.sinks.console`),
and for rules that compare a snapshot with the one before."""

_CHANGING = ("status", "verdict", "phase", "step")
"""What of a row may change from one snapshot to the next, beside its metrics."""


def compress(value: object) -> str:
    """Plain Python data as text that JSON, and a checkpoint that holds no bytes, can carry; NaN is kept.

    >>> expand(compress({"steps": [1, 2, 3] * 1000})) == {"steps": [1, 2, 3] * 1000}
    True
    """
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 6)).decode()


def expand(text: str) -> Any:
    """The inverse of `compress`."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def pack(history: History, *, latest: int, metrics: Collection[str] | None) -> dict[str, Any]:
    """Snapshots without histograms, trap entries, what was skipped and findings, which the history file has.

    Names and shapes are written once and values by column, so that they compress well: some 12 bytes a number, with
    one metric and 16 snapshots 0.3 KB a layer.

    Args:
        history: What a run has seen.
        latest: How many of the last snapshots are packed; the first one is too.
        metrics: Which metrics of layers they keep, beside `SHOWN` in the first and the last; `None` for all.
    """
    known = history.snapshots
    snapshots = known if len(known) <= latest else [known[0], *known[-latest:]]
    places: dict[tuple[object, ...], int] = {}
    packed = []
    for number, snapshot in enumerate(snapshots):
        rows = [(row.name, row.kind, row.shape, row.role) for row in snapshot.layers]
        there = dict.fromkeys(name for row in snapshot.layers for name in row.metrics)
        shown = SHOWN if number in (0, len(snapshots) - 1) else ()
        kept = [name for name in there if metrics is None or name in metrics or name in shown]
        columns = {name: [float(row.value(name)) for row in snapshot.layers] for name in kept}
        others = {name: [getattr(row, name) for row in snapshot.layers] for name in _CHANGING}
        packed.append(
            {
                "rows": [places.setdefault(row, len(places)) for row in rows],
                "others": others,
                "metrics": columns,
                "summary": dict(snapshot.summary),
                "about": [snapshot.step, snapshot.epoch, snapshot.preset, snapshot.seconds],
            }
        )
    left_out = history.left_out + len(known) - len(snapshots)
    return {"layers": list(places), "snapshots": packed, "left_out": left_out}


def unpack(packed: Mapping[str, Any]) -> History:
    """The inverse of `pack`, or what earlier versions wrote; a metric that was not kept is not known."""
    if "recent" in packed:  # one line of the history file a snapshot
        return History(Snapshot.from_dict(json.loads(line)) for line in packed["recent"])
    layers = [(name, kind, (shape[0], shape[1], shape[2]), role) for name, kind, shape, role in packed["layers"]]
    history = History(_snapshot(layers, one) for one in packed["snapshots"])
    history.left_out = packed["left_out"]
    return history


def _snapshot(layers: Sequence[tuple[str, str, tuple[int, int, int], str]], packed: dict[str, Any]) -> Snapshot:
    others, metrics = packed["others"], packed["metrics"]
    rows = []
    for at, place in enumerate(packed["rows"]):
        name, kind, shape, role = layers[place]
        values = {metric: column[at] for metric, column in metrics.items()}
        now = {other: column[at] for other, column in others.items()}
        rows.append(Layer(name, kind, shape, role=role, metrics=values, **now))
    step, epoch, preset, seconds = packed["about"]
    return Snapshot(tuple(rows), summary=packed["summary"], step=step, epoch=epoch, preset=preset, seconds=seconds)

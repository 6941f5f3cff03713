"""One analysis of a model as plain frozen data: its rows, what was left out, findings, and the saved form.

Key names are made here and nowhere else: `ww/<metric>` for the model, `ww_<metric>/<layer>` for a layer, so that
TensorBoard and W&B open one section a metric.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from ww_monitor.errors import MissingDependency, WWMonitorError
from ww_monitor.kind import About, Kind
from ww_monitor.record.notebook import Shown
from ww_monitor.record.saved import NAN, computed_once, number, plain, restored

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
"""Version of the saved form, which every line carries; raised when a field changes its meaning, not when one joins."""

LONGEST_NAME = 200
"""Letters of a layer's name in a key; MLflow takes 250 in all."""

Severity = Literal["info", "warning", "critical"]


def summary_key(metric: str) -> str:
    """The key of a model-level value: `ww/alpha`."""
    return f"ww/{metric}"


def layer_key(metric: str, layer: str) -> str:
    """The key of a layer's value: `ww_alpha/encoder.fc1`.

    Of the name stays what every tracker takes in a key: letters, digits, `_`, `-`, `.`, and `/` as in a path that is
    in its shortest form, at most 200 of them, the last ones.

    >>> layer_key("alpha", "q_proj.lora[default]"), layer_key("alpha", "/a//../b/")
    ('ww_alpha/q_proj.lora_default', 'ww_alpha/a/__/b')
    """
    known = re.sub(r"[^\w./-]+", "_", layer.replace("]", ""))[-LONGEST_NAME:]
    parts = ["_" * len(part) if part in (".", "..") else part for part in known.split("/") if part]
    return f"ww_{metric}/{'/'.join(parts) or '_'}"


@dataclass(frozen=True)
class Histogram:
    """Counts of log10 λ in equal bins from `low` to `high`, and how many eigenvalues are numerically zero."""

    low: float
    high: float
    counts: tuple[int, ...]
    num_zero: int = 0

    @property
    def edges(self) -> tuple[float, ...]:
        """The `len(counts) + 1` bin edges, in log10 λ."""
        width = (self.high - self.low) / len(self.counts)
        return tuple(self.low + width * i for i in range(len(self.counts) + 1))


@dataclass(frozen=True)
class TrapEntry:
    """A weight large enough to make an outlier by itself: its address as stored, value and headroom."""

    slice: int
    row: int
    column: int
    value: float
    headroom: float


@dataclass(frozen=True)
class Layer:
    """One analysed matrix.

    Attributes:
        name: Its name in the model.
        kind: `"dense"`, `"conv"`, … (`ww_monitor.kind`).
        role: `"q"`, `"up"`, … or `""`.
        shape: `(slices, rows, columns)`.
        status: `"ok"`, or why numbers are missing.
        verdict: What the numbers can be trusted for (see `ww_monitor.metric`).
        metrics: Values by metric name; NaN = not known.
        phase: Phase of training by heavy-tailed self-regularization, `""` where it cannot be told.
        esd: Histogram of the eigenvalues, where they are known.
        trap_entries: The largest entries above the trap threshold.
        step: Optimizer step at which the weights were read, or `None` outside training.
        solved_on: The device that solved it (`"cpu"`, `"cuda:0"`); where that is not the one that has the weights, with
            the reason: `"cpu, not cuda:0: no full-rate float64"`; and what permuted it for lack of memory there:
            `"cuda:0, permuted on cpu: no memory"`.
        eigenvalues: All eigenvalues, ascending, if they were asked for; never saved.
        sketch: Some sums over the normalised spectrum (`ww_monitor.metric.drift`), until a monitor has the next
            snapshot's drift from them; never saved.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    status: str = "ok"
    verdict: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    role: str = ""
    phase: str = ""
    esd: Histogram | None = None
    trap_entries: tuple[TrapEntry, ...] = ()
    step: int | None = None
    solved_on: str = field(default="", compare=False)
    eigenvalues: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    sketch: tuple[float, ...] | None = field(default=None, repr=False, compare=False)

    def value(self, metric: str) -> float:
        """The value of `metric`, NaN if it is not known here."""
        return self.metrics.get(metric, NAN)


UNREAD = "could not be read"
"""What the reason of a weight begins with that our own reader failed at."""


@dataclass(frozen=True)
class Skipped:
    """A weight that was left out, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str

    @classmethod
    def unread(cls, name: str, kind: str, shape: tuple[int, ...], error: Exception | str) -> Skipped:
        """A weight that our own reader failed at: no word on the weight, and so no finding."""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return cls(name, kind, shape, f"{UNREAD}: {reason}")


@dataclass(frozen=True)
class Finding:
    """Something worth knowing about a layer (or, with `layer=""`, the model) that begins, holds or ends at a step.

    Attributes:
        rule: Name of the rule.
        layer: Name of the layer.
        severity: `"info"`, `"warning"` or `"critical"`.
        message: One sentence with the numbers in it.
        step: Optimizer step of the snapshot.
        state: `"begin"` or `"end"`; a single analysis knows only `"begin"`.
    """

    rule: str
    layer: str
    severity: Severity
    message: str
    step: int | None = None
    state: Literal["begin", "end"] = "begin"

    def __str__(self) -> str:
        where = f" at step {self.step}" if self.step is not None else ""
        what = "" if self.state == "begin" else " is over"
        return f"{self.rule}{what}{where}: {self.message}"


@dataclass(frozen=True)
class Snapshot(Shown):
    """One analysis of a model.

    Attributes:
        layers: The analysed matrices in model order.
        skipped: What was left out, with reasons.
        summary: Model-level values by metric name.
        findings: What begins or ends with this snapshot.
        step: Optimizer step, or `None` outside training.
        epoch: Epoch, where the trainer has one.
        preset: `"default"` or `"weightwatcher"`.
        seconds: Wall time of the analysis.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...] = ()
    summary: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    step: int | None = None
    epoch: int | None = None
    preset: str = "default"
    seconds: float = NAN

    def __getitem__(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            KeyError: naming the layers there are.
        """
        found = self.named(name)
        if not found:
            raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")
        return found[0]

    def named(self, name: str) -> tuple[Layer, ...]:
        """The rows of that name: one, or none where the layer is not there."""
        return self._by_name.get(name, ())

    @computed_once
    def _by_name(self) -> dict[str, tuple[Layer, ...]]:
        rows: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
            rows[layer.name] = (*rows.get(layer.name, ()), layer)
        return rows

    @computed_once
    def key_names(self) -> tuple[str, ...]:
        """What stands for each layer in the keys of its values, no two alike."""
        taken: dict[str, None] = {}
        for layer in self.layers:
            name = first = layer_key("", layer.name).partition("/")[2]
            number = 1
            while name in taken:
                name = f"{first}_{(number := number + 1)}"
            taken[name] = None
        return tuple(taken)

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}  # without the index

    def scalars(self, *, layers: bool = True) -> dict[str, float]:
        """Every known value under its flat key, as plain floats; what is not known is absent."""
        values = {summary_key(metric): value for metric, value in self.summary.items()}
        if layers:
            for name, layer in zip(self.key_names, self.layers, strict=True):
                values.update({layer_key(metric, name): value for metric, value in layer.metrics.items()})
        return {key: float(value) for key, value in values.items() if math.isfinite(value)}

    def with_findings(self, findings: Iterable[Finding]) -> Snapshot:
        """The same snapshot with other findings."""
        return replace(self, findings=tuple(findings))

    def with_metrics(self, values: Mapping[str, Mapping[str, float]]) -> Snapshot:
        """The same snapshot with further metrics by layer, and their means over the layers where they are known."""
        layers = tuple(replace(layer, metrics={**layer.metrics, **values.get(layer.name, {})}) for layer in self.layers)
        added = dict.fromkeys(name for row in values.values() for name in row)
        summary = dict(self.summary)
        for name in added:
            known = [value for layer in layers if math.isfinite(value := layer.value(name))]
            summary[name] = sum(known) / len(known) if known else NAN
        return replace(self, layers=layers, summary=summary)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python data for JSON: NaN and infinity become `None`, eigenvalues are left out."""
        layers = []
        for layer in self.layers:
            row: dict[str, Any] = plain(replace(layer, metrics={}, eigenvalues=None, sketch=None))
            del row["eigenvalues"], row["sketch"]
            layers.append({**row, "metrics": _numbers(layer.metrics)})
        data = plain(replace(self, layers=(), summary={}))
        return {"schema": SCHEMA, **data, "layers": layers, "summary": _numbers(self.summary)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Snapshot:
        """The inverse of `to_dict`; keys that this version does not know are left out.

        Raises:
            WWMonitorError: if the data was written by a later schema.
            TypeError: if a value is of another type than its field.
            ValueError: if a value is none of the choices of its field, or what must be there is missing.
        """
        if isinstance(data, Mapping) and data.get("schema", 0) > SCHEMA:
            raise WWMonitorError(f"Snapshot.from_dict: schema {data['schema']} is newer than this version's {SCHEMA}")
        return restored(cls, data)

    def to_json(self) -> str:
        """One line of strict JSON."""
        return json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":"))

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer; under `preset="weightwatcher"` with that tool's columns in its order.

        Raises:
            MissingDependency: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependency("Snapshot.to_pandas: needs pandas; pip install 'ww-monitor[plots]'") from error
        row = _weightwatcher_row if self.preset == "weightwatcher" else _row
        return pandas.DataFrame([row(index, layer) for index, layer in enumerate(self.layers)])


def _numbers(values: Mapping[str, Any]) -> dict[str, int | float | None]:
    return {str(key): number(value) for key, value in values.items()}


def _row(index: int, layer: Layer) -> dict[str, Any]:
    slices, rows, columns = layer.shape
    return {
        "name": layer.name,
        "kind": layer.kind,
        "role": layer.role,
        "slices": slices,
        "N": max(rows, columns),
        "M": min(rows, columns),
        "status": layer.status,
        "verdict": layer.verdict,
        "phase": layer.phase,
        **layer.metrics,
    }


def _weightwatcher_row(index: int, layer: Layer) -> dict[str, Any]:
    """Weightwatcher 0.7.7's row, except that a failed fit is NaN there and is never called over-trained."""
    slices, rows, columns = layer.shape
    alpha = layer.value("alpha")
    return {
        "layer_id": index,
        "name": layer.name.rsplit(".", 1)[-1],
        "longname": layer.name,
        "layer_type": next((kind.about.layer_type for kind in Kind if kind == layer.kind), About.layer_type),
        "N": max(rows, columns),
        "M": min(rows, columns),
        "Q": max(rows, columns) / min(rows, columns),
        "rf": slices,
        "has_esd": layer.esd is not None,
        "status": "success" if math.isfinite(alpha) else "failed",
        "warning": "over-trained" if alpha < 2 else "under-trained" if alpha > 6 else "",
        **layer.metrics,
    }

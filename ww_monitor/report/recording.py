"""A run read for a report: one pass over its snapshots, in memory that does not grow with its length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from ww_monitor.errors import InvalidArgument
from ww_monitor.record import HISTORY_FILE, Finding, History, Snapshot, each_line

MAX_ROWS = 1_048_576
"""Rows (a layer at a snapshot) whose metrics are kept: 1,000 layers at 1,000 snapshots."""
MAX_SPECTRA = 65_536
"""Histograms that are kept; some 60 bytes each in the page."""
MAX_ENTRIES = 20_000
"""Entries above the trap threshold that are kept."""

_Item = TypeVar("_Item")


class Thinned(Generic[_Item]):
    """Items by the number of their snapshot; at more than `limit` rows every second goes, never the latest.

    >>> kept = Thinned(limit=4)
    >>> for number in range(10):
    ...     kept.add(number, "item", rows=1)
    >>> list(kept.items), kept.every
    ([0, 4, 8, 9], 4)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.every = 1
        self.items: dict[int, _Item] = {}
        self._rows: dict[int, int] = {}

    def add(self, number: int, item: _Item, *, rows: int) -> None:
        """Take the item of the latest snapshot."""
        self.items[number], self._rows[number] = item, rows
        self._sift(number)
        while sum(self._rows.values()) > self.limit and len(self.items) > 2:
            self.every *= 2
            self._sift(number)

    def _sift(self, latest: int) -> None:
        for number in [number for number in self.items if number % self.every and number != latest]:
            del self.items[number], self._rows[number]

    def rewind(self, number: int) -> None:
        """Forget what is of this snapshot and later ones."""
        for late in [one for one in self.items if one >= number]:
            del self.items[late], self._rows[late]


@dataclass
class Spectra:
    """The histograms of one snapshot: `rows` index the layers, the other fields are one a row."""

    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray
    zeros: np.ndarray
    counts: list[Sequence[int]]


@dataclass
class Rows:
    """One snapshot's table: `rows` index the layers, `values` is `[rows, metrics]`, `verdicts` indexes the words."""

    rows: np.ndarray
    values: np.ndarray
    verdicts: np.ndarray


@dataclass
class About:
    """What is known of a layer besides its numbers."""

    name: str
    kind: str
    role: str
    shape: tuple[int, ...]


@dataclass
class Recording:
    """A run, as a report needs it.

    Attributes:
        name: What the page calls it.
        steps: Of every snapshot; its number where it has none.
        has_steps: Whether the snapshots have any.
        layers: Every layer that occurs, by key: its name, and a number behind it where a snapshot has a name twice.
        metrics: Every metric of a layer that occurs, with its index.
        verdicts: Every verdict that occurs (the status where there is none), with its index.
        summaries: The model's values of every snapshot.
        findings: What begins or ends, by snapshot.
        table: `Rows` of the snapshots that are kept.
        spectra: `Spectra` of the snapshots that are kept.
        entries: Trap entries by layer index, of the snapshots that are kept.
        num_entries: How many trap entries each snapshot has.
        repeated: How many snapshots later ones replaced, of a step that is no larger.
        skipped: Name → reason, of the latest snapshot.
        notes: Sentences about what the file lacks.
    """

    name: str
    steps: list[int] = field(default_factory=list)
    layers: dict[str, About] = field(default_factory=dict)
    metrics: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)
    summaries: list[Mapping[str, float]] = field(default_factory=list)
    findings: list[tuple[Finding, ...]] = field(default_factory=list)
    table: Thinned[Rows] = field(default_factory=lambda: Thinned(MAX_ROWS))
    spectra: Thinned[Spectra] = field(default_factory=lambda: Thinned(MAX_SPECTRA))
    entries: Thinned[dict[int, list[list[float]]]] = field(default_factory=lambda: Thinned(MAX_ENTRIES))
    num_entries: list[int] = field(default_factory=list)
    repeated: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    has_steps: bool = False
    _index: dict[str, int] = field(default_factory=dict)

    def add(self, data: Mapping[str, Any]) -> None:
        """Take a snapshot in its saved form (`Snapshot.to_dict`); one that goes back in steps replaces what it repeats.

        Raises:
            WWMonitorError: if a later version wrote it.
            KeyError, TypeError, ValueError, AttributeError, OverflowError: if it is no snapshot; then it is not taken.
        """
        # Layers stay dictionaries: to make a `Layer` of each takes six times as long as all the rest.
        head, layers = _checked(Snapshot.from_dict({**data, "layers": ()})), data["layers"]
        rows = self._rows_of(layers)
        table, spectra, entries = self._table(rows, layers), _spectra(rows, layers), _entries(rows, layers)
        # Behind all that a damaged line may fail at: what it seems to replace is forgotten here.
        self._rewind(head.step)
        number = len(self.steps)
        self.steps.append(number if head.step is None else head.step)
        self.has_steps = self.has_steps or head.step is not None
        self.summaries.append(head.summary)
        self.findings.append(head.findings)
        self.skipped = {item.name: item.reason for item in head.skipped}
        self.table.add(number, table, rows=len(rows))
        self.spectra.add(number, spectra, rows=len(spectra.rows))
        self.num_entries.append(sum(map(len, entries.values())))
        self.entries.add(number, entries, rows=self.num_entries[-1])

    def _rewind(self, step: int | None) -> None:
        while step is not None and self.steps and self.steps[-1] >= step:
            self.repeated += 1
            del self.steps[-1], self.summaries[-1], self.findings[-1], self.num_entries[-1]
        for kept in (self.table, self.spectra, self.entries):
            kept.rewind(len(self.steps))

    def _rows_of(self, layers: Sequence[Mapping[str, Any]]) -> np.ndarray:
        names = [str(layer["name"]) for layer in layers]
        if len(set(names)) < len(names):
            seen: Counter[str] = Counter()
            for place, name in enumerate(names):
                seen[name] += 1
                names[place] = name if seen[name] == 1 else f"{name} ({seen[name]})"
        for name, layer in zip(names, layers, strict=True):
            if name not in self._index:
                shape = tuple(map(int, layer["shape"]))
                self.layers[name] = About(name, str(layer["kind"]), str(layer.get("role", "")), shape)
                self._index[name] = len(self._index)
        return np.array([self._index[name] for name in names], np.int64)

    def _table(self, rows: np.ndarray, layers: Sequence[Mapping[str, Any]]) -> Rows:
        words = [layer.get("verdict") or str(layer.get("status", "ok")).split(":")[0] for layer in layers]
        codes = [self.verdicts.setdefault(word, len(self.verdicts)) for word in words]
        values = np.array(self._values([layer["metrics"] for layer in layers]), float)
        return Rows(rows, values.reshape(len(rows), len(self.metrics)), np.array(codes, np.uint16))

    def _values(self, metrics: Sequence[Mapping[str, float | None]]) -> list[Sequence[float | None]]:
        if len({len(row) for row in metrics} | {len(self.metrics)}) == 1 and len(self.metrics) > 1:
            try:
                return list(map(itemgetter(*self.metrics), metrics))  # where all rows have what is known: the fast way
            except KeyError:
                pass
        for row in metrics:
            for name in row:
                self.metrics.setdefault(name, len(self.metrics))
        return [[row.get(name) for name in self.metrics] for row in metrics]


def _checked(head: Snapshot) -> Snapshot:
    texts = [text for one in head.findings for text in (one.rule, one.layer, one.severity, one.message)]
    if not isinstance(head.step, (int, type(None))) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"expected a step and findings in words, got step {head.step!r}")
    for value in head.summary.values():
        float(value)  # fails for what is no number
    return head


def _spectra(rows: np.ndarray, layers: Sequence[Mapping[str, Any]]) -> Spectra:
    known = [(row, layer["esd"]) for row, layer in zip(rows, layers, strict=True) if layer["esd"]]
    low, high, zeros = (np.array([esd[name] for _, esd in known], np.float32) for name in ("low", "high", "num_zero"))
    return Spectra(np.array([row for row, _ in known], np.int64), low, high, zeros, [esd["counts"] for _, esd in known])


def _entries(rows: np.ndarray, layers: Sequence[Mapping[str, Any]]) -> dict[int, list[list[float]]]:
    names = ("slice", "row", "column", "value", "headroom")
    return {
        int(row): [[entry[name] for name in names] for entry in layer["trap_entries"]]
        for row, layer in zip(rows, layers, strict=True)
        if layer["trap_entries"]
    }


def recorded(run: History | Iterable[Snapshot] | Snapshot | str | Path) -> Recording:
    """Read a run: a history at hand, a history file, or a folder that has one.

    Raises:
        FileNotFoundError: if there is no such path.
        InvalidArgument: if a folder has no history file or more than one, naming them, or a run has no snapshot.
        WWMonitorError: if a later version wrote it.
    """
    if isinstance(run, (str, Path)):
        path = history_file(Path(run))
        where, recording = str(path), Recording(_name_of(path))
        _read(path, recording)
    else:
        where, recording = "the history", Recording("this run")
        for snapshot in [run] if isinstance(run, Snapshot) else run:
            recording.add(snapshot.to_dict())
        if isinstance(run, History) and run.left_out:
            recording.notes.append(f"{run.left_out:,} snapshots after the first were no longer at hand.")
    if not recording.steps:
        raise InvalidArgument(" ".join([f"report: {where}: expected a snapshot, got none.", *recording.notes]))
    return recording


def _read(path: Path, recording: Recording) -> None:
    lines = each_line(path, recording.add, where="report")
    damaged = [number for number, found, _ in lines if isinstance(found, Exception)]
    if damaged:
        said = f"line {damaged[0]:,}" if len(damaged) == 1 else f"{len(damaged):,} lines, the first {damaged[0]:,},"
        recording.notes.append(f"Left out: {said} of the file, damaged or cut off.")


def history_file(path: Path, *, where: str = "report") -> Path:
    """The history file that a path means: itself, or the only one in a folder or below it.

    Raises:
        FileNotFoundError: if there is no such path.
        InvalidArgument: if a folder has none, or several, naming them.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{where}: no such file or folder: {path}")
    if not path.is_dir():
        raise InvalidArgument(
            f"{where}: expected a history file or a folder that has one, got {path}, which is neither"
        )
    if (path / HISTORY_FILE).is_file():
        return path / HISTORY_FILE
    found: list[Path] = []
    for candidates in (path.glob("*.jsonl"), path.rglob(HISTORY_FILE)):
        found = sorted(one for one in candidates if one.is_file() and _looks_like_a_history(one))
        if found:
            break
    if len(found) == 1:
        return found[0]
    got = f"{len(found)}; name one of {', '.join(map(str, _few(found)))}" if found else "none"
    raise InvalidArgument(f"{where}: {path}: expected one history file ({HISTORY_FILE}), got {got}")


def _few(found: Sequence[Path]) -> Iterator[str]:
    yield from map(str, found[:8])
    if len(found) > 8:
        yield f"{len(found) - 8} more"


def _looks_like_a_history(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b'"layers"' in file.readline(1 << 26)  # bytes: what is no history may be one long line
    except OSError:
        return False


def _name_of(path: Path) -> str:
    full = path.resolve()
    return full.parent.name if full.name == HISTORY_FILE and full.parent.name else full.stem

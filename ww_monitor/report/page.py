"""The page: what a recording holds as compressed blocks, between a page's head and its script."""

from __future__ import annotations

import base64
import hashlib
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from ww_monitor.errors import MissingDependency
from ww_monitor.metric import PRESETS, metrics
from ww_monitor.record import NAN
from ww_monitor.report.packing import deflated, deflated_numbers, packed, packed_json, planes, short
from ww_monitor.report.recording import Recording, Spectra
from ww_monitor.report.words import VERDICT_WORDS, compared_at, judged, last_values, lead, spans

KEY = (
    "alpha", "alpha_hat", "alpha_weighted", "trap_headroom", "num_traps", "num_spikes", "stable_rank",
    "log_spectral_norm",
)  # fmt: skip
"""Metrics that are shown at every snapshot that is kept and in the model's curves; the first that are looked at."""

MAX_ROWS_OF_OTHERS = 131_072  # an eighth of `MAX_ROWS` (our choice)
MAX_FINDINGS = 5_000  # in the list of the page (our choice)
MAX_ENTRIES = 8
"""Trap entries of a layer at a snapshot that are listed; an analysis keeps no more."""
CHUNK = 64
"""Layers whose spectra are one block."""

SCRIPTS = ("data.js", "charts.js", "layers.js", "page.js")


def html(runs: Sequence[Recording]) -> str:
    """One self-contained page about one run or two.

    Raises:
        MissingDependency: if plotly is not installed.
    """
    blocks: dict[str, str] = {}
    described = [
        _described(run, f"{letter}-", blocks, until=number)
        for letter, run, number in zip("ab", runs, compared_at(runs), strict=False)
    ]
    meta = {"runs": described, "metrics": _about_metrics(runs), "key": KEY, "verdicts": VERDICT_WORDS}
    (library, packed_library), head = plotly_script(), _piece("theme.js")
    script = "\n".join(map(_piece, SCRIPTS))
    title = " and ".join(run.name for run in runs)
    return _filled(
        _piece("page.html"),
        {
            "policy": _policy(head, script, library),
            "title": escape(title),
            "heading": " <span>and</span> ".join(f"<bdi>{escape(run.name)}</bdi>" for run in runs),
            "facts": escape("; ".join(_facts(run) for run in runs)),
            "lead": "\n".join(f"<li>{sentence}</li>" for sentence in lead(runs)),
            "notes": "\n".join(f"<li>{escape(note)}</li>" for note in _notes(runs)),
            "style": _piece("page.css"),
            "head": head,
            "script": script,
            "blocks": "\n".join(
                f'<script type="text/plain" id="block-{name}">{text}</script>'
                for name, text in {"plotly": packed_library, "meta": packed_json(meta), **blocks}.items()
            ),
        },
    )


def _piece(name: str) -> str:
    return resources.files("ww_monitor.report").joinpath(name).read_text(encoding="utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)  # in one pass: no part is a template


@lru_cache(maxsize=1)
def plotly_script() -> tuple[str, str]:
    """The library's script, and its block.

    Raises:
        MissingDependency: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingDependency("report: needs plotly; pip install 'ww-monitor[report]'") from error
    script = str(get_plotlyjs())
    return script, deflated(script.encode())


def _policy(*scripts: str) -> str:
    """No network, and no script but these."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    others = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {others}"


def _facts(run: Recording) -> str:
    first, last, count = run.steps[0], run.steps[-1], len(run.steps)
    alone = f"step {last:,}" if run.has_steps else "one analysis"
    when = alone if count == 1 else f"{count:,} snapshots from step {first:,} to {last:,}"
    return f"{len(run.layers):,} {'layer' if len(run.layers) == 1 else 'layers'}, {when}"


def _notes(runs: Sequence[Recording]) -> list[str]:
    """What the page leaves out, and what the file lacked."""
    notes = []
    for letter, run in zip("AB", runs, strict=False):
        prefix = f"Run {letter}: " if len(runs) > 1 else ""
        told = list(run.notes)
        every, others = run.table.every, _every(run, MAX_ROWS_OF_OTHERS)
        thinned = {
            "all numbers": every,
            "numbers of minor metrics": others * (others > every),
            "spectra": run.spectra.every,
        }
        told += [
            f"To keep the page small, {what} are those of one snapshot in {kept}, and of the last."
            for what, kept in thinned.items()
            if kept > 1
        ]
        shown = sum(len(rows[:MAX_ENTRIES]) for item in run.entries.items.values() for rows in item.values())
        if left := sum(run.num_entries) - shown:
            which = f", of all but one snapshot in {run.entries.every} and the last" * (run.entries.every > 1)
            told.append(f"To keep the page small, {left:,} of {left + shown:,} trap entries are left out{which}.")
        if not any(len(one.rows) for one in run.spectra.items.values()):
            told.append("This history has no spectra.")
        if (left := len(spans(run)) - MAX_FINDINGS) > 0:
            told.append(f"{left:,} more findings, of the least severe, are not listed.")
        if run.repeated:
            noun = "snapshot was" if run.repeated == 1 else "snapshots were"
            told.append(f"{run.repeated:,} {noun} replaced: the run went back to an earlier step.")
        if run.skipped:
            told.append(f"{len(run.skipped):,} weights were not analysed, such as {next(iter(run.skipped))}.")
        notes += [prefix + note for note in told]
    return notes


def _about_metrics(runs: Sequence[Recording]) -> dict[str, dict[str, str]]:
    known = {entry.name: entry for preset in reversed(PRESETS) for entry in metrics(preset)}
    reduced = {
        "mean": "mean of the layers",
        "sum": "sum of the layers",
        "max": "largest of the layers",
        "min": "smallest of the layers",
    }
    return {
        name: {
            "unit": known[name].unit if name in known else "",
            "definition": known[name].definition if name in known else "",
            "read": known[name].read if name in known else "",
            "model": reduced.get(known[name].reduce.__name__, "") if name in known else "mean of the layers",
        }
        for run in runs
        for name in run.metrics
    }


def _every(run: Recording, limit: int) -> int:
    """The power of two by which snapshots must be left out until no more rows than `limit` are kept."""
    every = run.table.every
    while every < len(run.steps) and len(run.layers) * -(-len(run.steps) // every) > limit:
        every *= 2
    return every


def _described(run: Recording, prefix: str, blocks: dict[str, str], *, until: int) -> dict[str, Any]:
    """What the script must know of a run before it shows any block; the blocks go into `blocks`."""
    columns = list(run.table.items)
    every = _every(run, MAX_ROWS_OF_OTHERS)
    spectra = set(run.spectra.items)  # what is drawn with them must be known there
    thin = [number for number in columns if number % every == 0 or number == columns[-1] or number in spectra]
    how, bands = {}, {}
    for index, name in enumerate(run.metrics):
        shown = columns if name in KEY else thin
        values = _values(run, index, shown)
        about, blocks[f"{prefix}{index}"] = packed(values)
        how[name] = {**about, "block": f"{prefix}{index}", "columns": "all" if shown is columns else "thin"}
        if name in KEY:
            bands[name] = _band(values)
    codes, shown_until = _verdicts(run, columns), bisect_right(columns, until)
    found = spans(run)[:MAX_FINDINGS]
    entries = {
        number: {row: [[short(value) for value in entry] for entry in rows[:MAX_ENTRIES]] for row, rows in item.items()}
        for number, item in run.entries.items.items()
    }
    return {
        "name": run.name,
        "steps": run.steps,
        "columns": {"all": columns, "thin": thin, "spectra": list(run.spectra.items)},
        "layers": [[key, one.kind, one.role, one.shape] for key, one in run.layers.items()],
        "metrics": how,
        "verdicts": list(run.verdicts),
        "until": until,
        "judged": _judged(run, columns[:shown_until], codes[:, :shown_until]),
        "last": {
            name: [short(float(value)) for value in last_values(run, name, until=until)]
            for name in KEY
            if name in run.metrics
        },
        "summary": {name: [short(row.get(name, NAN)) for row in run.summaries] for name in run.metrics},
        "bands": bands,
        "shares": [
            # A code is NaN where a layer is not there.
            [round(float(share), 4) for share in (codes == code).sum(0) / np.maximum(1, (codes == codes).sum(0))]
            for code in run.verdicts.values()
        ],
        "spans": [[one.rule, one.layer, one.severity, one.message, one.begin, one.end] for one in found],
        "entries": entries,
        "bins": _pack_spectra(run, prefix, blocks),
    }


def _values(run: Recording, index: int, columns: Sequence[int]) -> np.ndarray:
    """`[layers, columns]` of a metric."""
    values = np.full((len(run.layers), len(columns)), NAN)
    for column, number in enumerate(columns):
        rows = run.table.items[number]
        if index < rows.values.shape[1]:
            values[rows.rows, column] = rows.values[:, index]
    return values


def _verdicts(run: Recording, columns: Sequence[int]) -> np.ndarray:
    codes = np.full((len(run.layers), len(columns)), NAN)
    for column, number in enumerate(columns):
        rows = run.table.items[number]
        codes[rows.rows, column] = rows.verdicts
    return codes


def _band(values: np.ndarray) -> list[list[float | None]]:
    """10 % and 90 % of the layers, where more than two are known."""
    known = np.isfinite(values).sum(0) > 2
    points = np.full((2, values.shape[1]), NAN)
    if known.any():
        points[:, known] = np.nanquantile(values[:, known], [0.1, 0.9], axis=0)
    return [[short(float(value)) for value in row] for row in points]


def _judged(run: Recording, columns: Sequence[int], codes: np.ndarray) -> list[str]:
    """What is said of each layer in words, where it last occurs in these snapshots."""
    words = list(run.verdicts)
    alpha, sigma, traps = (last_values(run, name, until=columns[-1]) for name in ("alpha", "sigma", "num_traps"))
    told = []
    for row in range(len(run.layers)):
        seen = np.flatnonzero(np.isfinite(codes[row])).tolist()
        if not seen:
            told.append("not there yet")
            continue
        word = judged(words[int(codes[row, seen[-1]])], float(alpha[row]), float(sigma[row]), float(traps[row]))
        gone = f"until step {run.steps[columns[seen[-1]]]:,}: " * (seen[-1] < len(columns) - 1)
        told.append(gone + word)
    return told


def _pack_spectra(run: Recording, prefix: str, blocks: dict[str, str]) -> int:
    """A block a `CHUNK` of layers: low, high, zeros, bins, counts `[layers, snapshots]`; gives the most bins."""
    kept = list(run.spectra.items.values())
    bins = max((len(counts) for item in kept for counts in item.counts), default=0)
    if bins:
        for begin in range(0, len(run.layers), CHUNK):
            blocks[f"{prefix}esd-{begin // CHUNK}"] = deflated_numbers(
                _chunk(kept, begin, min(CHUNK, len(run.layers) - begin), bins)
            )
    return bins


def _chunk(kept: Sequence[Spectra], begin: int, size: int, bins: int) -> bytes:
    floats = np.zeros((3, size, len(kept)), "<f4")
    used = np.zeros((size, len(kept)), np.uint16)
    counts = np.zeros((size, len(kept), bins), np.uint16)
    for column, item in enumerate(kept):
        for place in np.flatnonzero((item.rows >= begin) & (item.rows < begin + size)):
            row, found = item.rows[place] - begin, item.counts[place]
            floats[:, row, column] = item.low[place], item.high[place], item.zeros[place]
            used[row, column] = len(found)
            counts[row, column, : len(found)] = np.minimum(found, 65_535)  # what 16 bits hold
    return floats.tobytes() + planes(used) + planes(counts)

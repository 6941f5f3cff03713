"""The table of metrics: name → function of a batch of spectra, unit, source, how to read it, model-level value.

A new metric is one decorated function; snapshots, trackers, `docs/metrics.md` and `ww-monitor metrics` loop over the
table. A function gets a `Batch` and returns `[B]`; its docstring is the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from ww_monitor.errors import InvalidArgument
from ww_monitor.metric.batch import Batch
from ww_monitor.settings import Preset

PRESETS: tuple[str, ...] = get_args(Preset)

Function = Callable[[Batch], torch.Tensor]
Reducer = Callable[[Sequence[float]], float]


def mean(values: Sequence[float]) -> float:
    """Mean of the known values."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Attributes:
        name: Column, and part of the key.
        function: `Batch` → `[B]` float64, NaN where not known.
        definition: First line of the function's docstring, if it has one.
        unit: Unit, `"1"` for a pure number.
        read: How to read it.
        source: Where the definition comes from.
        reduce: Known layer values → the model's value.
        needs: The measurement beyond the eigenvalues, by its name in the registry; `""` for none.
        standard: Computed when no metrics are named; the others cost a multiple of the rest.
        option: The option with which it is computed too: `"truncated"` or `"fingers"`.
    """

    name: str
    function: Function
    definition: str
    unit: str
    read: str
    source: str
    reduce: Reducer
    needs: str = ""
    standard: bool = True
    option: str = ""


TABLE: dict[str, dict[str, Metric]] = {preset: {} for preset in PRESETS}
"""Metrics by preset and name, in the order of the columns."""


def metric(
    *,
    unit: str = "1",
    source: str,
    read: str = "",
    reduce: Reducer = mean,
    needs: str = "",
    standard: bool = True,
    option: str = "",
    default: bool = True,
    weightwatcher: str = "",
) -> Callable[[Function], Function]:
    """Enter a function into the table.

    Args:
        unit: Unit of the value.
        source: Author, year and place of the definition.
        read: How to read the value.
        reduce: From the known values of the layers to the model's.
        needs: See `Metric.needs`.
        standard: See `Metric.standard`.
        option: See `Metric.option`.
        default: Whether the default preset has it, under the function's name.
        weightwatcher: Its column under the other preset; `""` where that preset has it not.
    """

    def enter(function: Function) -> Function:
        definition = (function.__doc__ or "").strip().partition("\n")[0]
        for preset, name in (("default", function.__name__ if default else ""), ("weightwatcher", weightwatcher)):
            if name:
                TABLE[preset][name] = Metric(
                    name, function, definition, unit, read, source, reduce, needs, standard, option
                )
        return function

    return enter


def metrics(preset: str = "default") -> list[Metric]:
    """Every metric of a preset: name, unit, definition, how to read it, source, and whether it is standard.

    Raises:
        InvalidArgument: if there is no such preset.

    >>> [entry.name for entry in metrics()][:3]
    ['alpha', 'sigma', 'ks']
    """
    return choose("all", preset)


def choose(names: Sequence[str] | str | None, preset: str, *, options: Sequence[str] = ()) -> list[Metric]:
    """The metrics of these names; for `None` the standard ones and those of the options, every one for `"all"`.

    Raises:
        InvalidArgument: naming what is unknown and what there is.
    """
    if preset not in TABLE:
        raise InvalidArgument(f"ww_monitor: preset must be one of {', '.join(map(repr, PRESETS))}; got {preset!r}")
    table = TABLE[preset]
    if names is None:
        return [entry for entry in table.values() if entry.standard or entry.option in options]
    if names == "all":
        return list(table.values())
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in table]
    if unknown:
        raise InvalidArgument(f"ww_monitor: metrics must be among {', '.join(map(repr, table))}; got {unknown[0]!r}")
    return [table[name] for name in wanted]

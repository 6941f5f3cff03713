"""Entries of the public registries that are replaced for one test: what a user's own metric or measurement may do."""

from __future__ import annotations

from dataclasses import replace

from ww_monitor.metric import MEASUREMENTS, TABLE


def before_measurement(monkeypatch, name, first):
    """Let `first(loaded)` run before a measurement of some matrices, and raise what it raises.

    Returns:
        The definitions with which it was made, one an occasion.
    """
    entry, asked = MEASUREMENTS[name], []

    def function(loaded, known, definitions):
        first(loaded)
        asked.append(definitions)
        return entry.function(loaded, known, definitions)

    monkeypatch.setitem(MEASUREMENTS, name, replace(entry, function=function))
    return asked


def before_metric(monkeypatch, name, first):
    """Let `first(batch)` run before a metric of a batch of spectra, and raise what it raises."""
    entry = TABLE["default"][name]

    def function(batch):
        first(batch)
        return entry.function(batch)

    monkeypatch.setitem(TABLE["default"], name, replace(entry, function=function))


def before_summary(monkeypatch, name, first):
    """Let `first()` run before the model's value of a metric: what it raises is no layer's, and ends the analysis."""
    entry = TABLE["default"][name]

    def reduce(values):
        first()
        return entry.reduce(values)

    monkeypatch.setitem(TABLE["default"], name, replace(entry, reduce=reduce))

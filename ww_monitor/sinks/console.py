"""Findings as lines while a run lasts, and a table of its layers at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ww_monitor.record import Finding, History, Snapshot

FEW = 3
"""Layers with the same finding that have a line each (our choice)."""

MARK = {"info": "·", "warning": "!", "critical": "‼"}


class Console:
    """Prints a line for each finding that begins or ends, one where it is the same in many layers.

    Args:
        print_line: Where lines go; a trainer passes its progress bar's `print`, so that the bar stays whole.
        info: Print informational findings too.
    """

    def __init__(self, print_line: Callable[[str], object] = print, *, info: bool = False) -> None:
        self.print_line = print_line
        self.info = info

    def write(self, snapshot: Snapshot) -> None:
        """One line a finding, or one for all layers where more than `FEW` begin or end the same."""
        alike: dict[tuple[str, str], list[Finding]] = {}
        for finding in snapshot.findings:
            if self.info or finding.severity != "info":
                alike.setdefault((finding.rule, finding.state), []).append(finding)
        for findings in alike.values():
            one, several = findings[0], len(findings) > FEW
            names = ", ".join(finding.layer for finding in findings[:FEW])
            of_all = f"{len(findings)} layers ({names}, …), the first: {one.message}"
            for finding in [replace(one, message=of_all)] if several else findings:
                self.print_line(f"ww_monitor {MARK[finding.severity]} {finding}")

    def close(self) -> None:
        """Nothing to release."""


def table(history: History, *, limit: int = 40) -> str:
    """The layers of a run as a rich table: alpha first → last, verdict, headroom, traps; the worst first where cut.

    Args:
        history: The snapshots of one run.
        limit: At most this many layers.
    """
    from io import StringIO

    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.table import Table

    if not len(history):
        return ""
    view = Table(title=f"ww_monitor: {_span(history)}", title_justify="left")
    for column in ("layer", "shape", "alpha", "verdict", "headroom", "traps"):
        view.add_column(column, justify="left" if column in ("layer", "verdict") else "right", overflow="fold")
    first = {layer.name: layer for layer in history[0].layers}
    known_traps = ((0.0 if math.isnan(traps := layer.value("num_traps")) else traps) for layer in history.last.layers)
    worst = sorted(enumerate(known_traps), key=lambda one: -one[1])[:limit]
    # chosen by traps, shown in the order of the model
    for layer in (history.last.layers[place] for place in sorted(place for place, _ in worst)):
        began = first.get(layer.name, layer)
        view.add_row(
            escape(layer.name),
            "×".join(str(size) for size in layer.shape if size > 1),
            f"{_number(began.value('alpha'))} → {_number(layer.value('alpha'))}",
            layer.verdict,
            _number(layer.value("trap_headroom")),
            _number(layer.value("num_traps")),
        )
    if len(worst) < len(history.last.layers):
        more = len(history.last.layers) - len(worst)
        view.caption = f"{more} more layer{'s' * (more != 1)} in the history"
    out = StringIO()
    RichConsole(file=out, width=100).print(view)  # `print_line` tells no width
    return out.getvalue().rstrip("\n")


def _span(history: History) -> str:
    steps = [snapshot.step for snapshot in history if snapshot.step is not None]
    count = len(history) + history.left_out
    return f"{count} snapshot{'s' * (count != 1)}" + (f", steps {steps[0]} to {steps[-1]}" if steps else "")


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}".rstrip("0").rstrip(".")

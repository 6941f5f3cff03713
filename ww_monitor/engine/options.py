"""How to analyse: the options of an analysis with what the table of metrics makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from ww_monitor.metric import Metric, choose
from ww_monitor.metric.registry import wanted
from ww_monitor.settings import AnalysisOptions


@dataclass(frozen=True, kw_only=True)
class Options(AnalysisOptions):
    """How to analyse.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.
    """

    keep_eigenvalues: Annotated[bool, "Keep all eigenvalues of a layer in its row."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted(self.needs, self)  # raises now, not at the first analysis, for a measurement that nobody makes

    @property
    def chosen(self) -> list[Metric]:
        """The metrics asked for."""
        options = ["truncated"] * (self.fit == "truncated") + ["fingers"] * bool(self.fix_fingers)
        return choose(self.metrics, self.preset, options=options)

    def measuring(self, names: Sequence[str]) -> Options:
        """The same options with further metrics."""
        chosen = [metric.name for metric in self.chosen]
        missing = [name for name in dict.fromkeys(names) if name not in chosen]
        return replace(self, metrics=[*chosen, *missing]) if missing else self

    @property
    def needs(self) -> set[str]:
        """The measurements beyond the eigenvalues that they take."""
        return {metric.needs for metric in self.chosen}

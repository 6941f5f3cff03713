"""How to analyse: the options of an analysis with what the table of metrics makes of them."""

from __future__ import annotations

from dataclasses import dataclass
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
        wanted(self.needs, self)

    @property
    def chosen(self) -> list[Metric]:
        """The metrics asked for."""
        options = ["truncated"] * (self.fit == "truncated") + ["fingers"] * bool(self.fix_fingers)
        return choose(self.metrics, self.preset, options=options)

    @property
    def needs(self) -> set[str]:
        """The measurements beyond the eigenvalues that they take."""
        return {metric.needs for metric in self.chosen}

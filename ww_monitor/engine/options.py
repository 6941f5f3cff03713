"""How to analyse: the options of the engine, checked where they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ww_monitor.errors import InvalidArgument, check_choice, check_positive_int
from ww_monitor.metric import FITS, FIX_FINGERS, PRESETS, Definitions, Metric, choose
from ww_monitor.spectra.marchenko_pastur import SIGNIFICANCE
from ww_monitor.spectra.traps import REPLICAS


@dataclass(frozen=True)
class Options:
    """How to analyse; every field has its meaning in `ww_monitor.analyze`.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.
    """

    preset: str = "default"
    metrics: Sequence[str] | str | None = None
    seed: int = 0
    replicas: int = REPLICAS
    significance: float = SIGNIFICANCE
    fit: str = "csn"
    fit_k: int | None = None
    fix_fingers: str | None = None
    aspect_ratio: float | None = None
    strict: bool = False
    keep_eigenvalues: bool = False

    def __post_init__(self) -> None:
        check_choice("ww_monitor", "preset", self.preset, PRESETS)
        choose(self.metrics, self.preset)
        check_choice("ww_monitor", "fit", self.fit, FITS)
        check_choice("ww_monitor", "fix_fingers", self.fix_fingers, FIX_FINGERS)
        if self.fit_k is not None:
            check_positive_int("ww_monitor", "fit_k", self.fit_k)
        if (self.fit_k is not None and self.fit != "hill") or (self.fix_fingers and self.fit == "hill"):
            raise InvalidArgument(
                f"ww_monitor: fit_k goes with fit='hill', fix_fingers with the others; got fit={self.fit!r},"
                f" fit_k={self.fit_k!r}, fix_fingers={self.fix_fingers!r}"
            )
        if self.aspect_ratio is not None and not self.aspect_ratio >= 1:
            raise InvalidArgument(f"ww_monitor: aspect_ratio must be None or >= 1; got {self.aspect_ratio!r}")
        check_positive_int("ww_monitor", "replicas", self.replicas)
        if not 0 < self.significance < 1:
            raise InvalidArgument(f"ww_monitor: significance must be between 0 and 1; got {self.significance!r}")

    @property
    def chosen(self) -> list[Metric]:
        """The metrics asked for."""
        options = [
            name for name, active in (("truncated", self.fit == "truncated"), ("fingers", self.fix_fingers)) if active
        ]
        return choose(self.metrics, self.preset, options=options)

    @property
    def definitions(self) -> Definitions:
        """What a batch needs to know."""
        return Definitions(
            self.preset,
            self.fit,
            self.fit_k,
            self.fix_fingers,
            self.significance,
            self.seed,
            self.replicas,
            self.aspect_ratio,
        )

    @property
    def needs(self) -> set[str]:
        """The measurements beyond the eigenvalues that they take."""
        return {metric.needs for metric in self.chosen}

"""Figures, the bounds they must hold, and the Markdown that says both."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True)
class Bound:
    """What a figure must hold: `Bound(least=6)`, `Bound(most=1.15)` or both, with a unit for the reader."""

    least: float = -math.inf
    most: float = math.inf
    unit: str = "×"

    def __str__(self) -> str:
        if self.least == -math.inf:
            return f"≤ {self.most:g}{self.unit}"
        if self.most == math.inf:
            return f"≥ {self.least:g}{self.unit}"
        return f"{self.least:g} … {self.most:g}{self.unit}"

    def held(self, figure: float) -> bool:
        """Whether it is held; never by NaN."""
        return self.least <= figure <= self.most


@dataclass(frozen=True)
class Ratio:
    """Median of `over` divided by the median of `under`; the range is that of the rounds in which both ran."""

    over: Sequence[float]
    under: Sequence[float]

    @property
    def value(self) -> float:
        return statistics.median(self.over) / statistics.median(self.under)

    def __str__(self) -> str:
        each = [a / b for a, b in zip(self.over, self.under, strict=False)]
        several = f" ({number(min(each))}–{number(max(each))})" if len(each) > 1 else " (1 round)"
        return number(self.value) + several


def number(value: float) -> str:
    """Three figures where it is a ratio that can be small, the exponent where it is tiny."""
    if value != value:
        return "not known"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"


def verdict(bound: Bound | None, figure: float | None) -> tuple[str, str]:
    """The cells "required" and "held?"."""
    if bound is None:
        return "", ""
    if figure is None:
        return str(bound), "not measured"
    return str(bound), "yes" if bound.held(figure) else "**no**"


def claim(what: str, measured: str, bound: Bound | None, figure: float | None) -> list[str]:
    """One row of a table of claims."""
    return [what, measured, *verdict(bound, figure)]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Processor, cores, threads and versions, in one sentence."""
    names = ("torch", "numpy", "scipy", "weightwatcher")
    versions = ", ".join(f"{name} {version}" for name in names if (version := version_of(name)))
    return (
        f"{_processor()}, {_cores()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()},"
        f" {versions}"
    )


def card(device: torch.device) -> str:
    """A CUDA device, its driver and what drives it from here, in one sentence."""
    named = card_facts(device)
    return f"{named['card']}, driver {named['driver']}, CUDA {named['cuda']}, nvmath-python {named['nvmath']}"


def card_facts(device: torch.device) -> dict[str, str]:
    """The same by name; the driver by its own tool, which stands beside it."""
    on_gpu = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(device) if on_gpu else "none",
        "driver": (_driver() if on_gpu else "") or "not known",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "nvmath": version_of("nvmath-python") or "not installed",
        "python": platform.python_version(),
    }


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else ""


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name; Linux gives it in a file only."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put `text` between the markers of that name; a file without them gets them at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, found, rest = old.partition(begin)
    if not found:
        before, rest = old + ("\n" if old else ""), end + "\n"
    _, closed, after = rest.partition(end)
    if not closed:
        raise ValueError(f"write_section: expected {end!r} after {begin!r} in {path.name}, got no such line")
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")

"""Published estimators on two trained CIFAR-10 ResNets: alpha-hat beside weightwatcher's, and two Hill alphas.

`python -m benchmarks.evidence.resnets --data FOLDER` writes `results/resnets.json`. The folder has the weights of
github.com/akamaster/pytorch_resnet_cifar10 under their own names; they are not part of this project.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import ww_monitor
from benchmarks.evidence import study
from benchmarks.evidence.judge import versions

NETS = {"resnet20-12fca82f.th": 8.27, "resnet32-d509ac18.th": 7.37}
"""File → test error in percent, as its authors give it."""

THEIRS = {"resnet20-12fca82f.th": (4.092, 1.021, 1.699), "resnet32-d509ac18.th": (4.802, -0.087, 0.582)}
"""Mean alpha, alpha-hat and log alpha norm by weightwatcher 0.7.7."""


def row(path: Path) -> dict[str, Any]:
    """One net, by both presets and by windows."""
    summary = ww_monitor.analyze(path, preset="weightwatcher").summary
    ours = ww_monitor.analyze(path, metrics=["alpha", "alpha_hat", "alpha_hill"])
    windows = ww_monitor.analyze(path, metrics=["alpha_hill"], aspect_ratio=1.0)
    hill = [layer.value("alpha_hill") for one in (ours, windows) for layer in one.layers]
    assert all(map(math.isfinite, hill))
    numbers = {
        "alpha": summary["alpha"], "alpha-hat": summary["alpha_weighted"], "log alpha norm": summary["log_alpha_norm"],
        "alpha, default preset": ours.summary["alpha"], "alpha-hat, default preset": ours.summary["alpha_hat"],
        "TempBalance's alpha": ours.summary["alpha_hill"], "FARMS' alpha": windows.summary["alpha_hill"],
    }  # fmt: skip
    theirs = dict(zip(("alpha", "alpha-hat", "log alpha norm"), THEIRS[path.name], strict=True))
    named = {f"{name}, weightwatcher 0.7.7": value for name, value in theirs.items()}
    return {"net": path.name, "test error %": NETS[path.name], **{k: round(v, 3) for k, v in numbers.items()}, **named}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="where the two files are")
    found = {"versions": versions(), "table": [row(parser.parse_args().data / name) for name in NETS]}
    study.show(found["table"])
    study.keep("resnets", found)


if __name__ == "__main__":
    main()

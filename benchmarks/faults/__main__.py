"""All faults in turn; the exit code is 1 if one was not survived."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec

from benchmarks.faults import Counts

PARTS = ("disk", "misbehaviour", "ends", "folders", "space")
OTHERS = ("files", "hooks")
"""Scripts of their own, whose last line is a JSON object with `tried` and `survived`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few of each, within 20 seconds")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, *OTHERS, []], help="which; all without")
    given = parser.parse_args()
    found: Counts = {}
    for part in given.parts or (*PARTS, *OTHERS):
        if part in PARTS:
            found |= show(import_module(f"benchmarks.faults.{part}").run(quick=given.quick))
        elif find_spec(f"benchmarks.faults.{part}") is not None:
            found |= show({part: outcome(part, quick=given.quick)})
    return int(any(tried != survived for tried, survived in found.values()))


def outcome(part: str, *, quick: bool) -> tuple[int, int]:
    command = [sys.executable, "-m", f"benchmarks.faults.{part}", *["--quick"] * quick]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    told = json.loads(ran.stdout.strip().splitlines()[-1])
    return int(told["tried"]), int(told["survived"])


def show(counts: Counts) -> Counts:
    for what, (tried, survived) in counts.items():
        print(f"{time.strftime('%H:%M:%S')}  {what}: {tried} tried, {survived} survived", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(main())

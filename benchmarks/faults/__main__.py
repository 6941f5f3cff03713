"""All faults in turn, with the seconds of each part; the exit code is 1 if one was not survived."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import import_module

PARTS = ("disk", "misbehaviour", "ends", "folders", "space")
OTHERS = ("files", "hooks")
"""Scripts of their own, whose last line is a JSON object with `tried` and `survived`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few of each, within 20 seconds")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, *OTHERS, []], help="which; all without")
    given = parser.parse_args()
    found, start = dict[str, tuple[int, int]](), time.monotonic()
    for part in given.parts or (*PARTS, *OTHERS):
        began = time.monotonic()
        counts = {part: outcome(part, quick=given.quick)} if part in OTHERS else None
        counts = counts or import_module(f"benchmarks.faults.{part}").run(quick=given.quick)
        for what, (tried, survived) in counts.items():
            print(f"{what}: {tried} tried, {survived} survived")
        print(f"-- {part}: {time.monotonic() - began:.0f} s", flush=True)
        found |= counts
    tried, survived = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    print(f"all: {tried} tried, {survived} survived, {time.monotonic() - start:.0f} s")
    return int(tried != survived)


def outcome(part: str, *, quick: bool) -> tuple[int, int]:
    command = [sys.executable, "-m", f"benchmarks.faults.{part}", *["--quick"] * quick]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    told = json.loads(ran.stdout.strip().splitlines()[-1])
    return int(told["tried"]), int(told["survived"])


if __name__ == "__main__":
    sys.exit(main())

"""Python processes that tests start: the one place that says what they are given.

They compute on the CPU and see no CUDA device: a library that finds one would train there, or wait for a second one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO


def environment(**more: str) -> dict[str, str]:
    """This process's environment without CUDA devices and with one thread, and what else is named."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def run_python(
    *arguments: str, stdin: str | None = None, folder: Path | None = None, timeout: float = 240, **more: str
) -> subprocess.CompletedProcess[str]:
    """`python *arguments`, waited for, with what it wrote; `more` joins its environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**more),
        check=False,
    )


def start_python(*arguments: str, output: IO[bytes] | IO[str], **more: str) -> subprocess.Popen[bytes]:
    """`python *arguments` in the background, all that it writes into the file `output`."""
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=environment(**more), stdout=output, stderr=subprocess.STDOUT)

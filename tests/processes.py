"""Python processes that tests start: the one place that says what they are given.

They compute on the CPU and see no CUDA device: a library that finds one would train there, or wait for a second one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import IO, Any


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


def once(factory: Any, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled; where pytest has several workers, the first that asks has it made.

    Args:
        factory: pytest's `tmp_path_factory`.
        name: Of the folder.
        make: Is called with it.
    """
    from filelock import FileLock

    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (made := Path(f"{folder}.made")).exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            made.touch()
    return folder


def run_in_forks(folder: Path, commands: dict[str, list[str]], *modules: str, **more: str) -> None:
    """Each script with its arguments, as `tests/forks.py` says, in a process that has imported the modules once."""
    script = str(Path(__file__).with_name("forks.py"))
    done = run_python(script, str(folder), *modules, stdin=json.dumps(commands), timeout=600, **more)
    assert done.returncode == 0, done.stderr


def on_two_ranks(run: Callable[[], object]) -> None:
    """`run` in two forks of this process, each with the environment that torchrun gives it; a failure ends both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(job, TORCHELASTIC_RUN_ID="tests")
    ranks: list[int] = []
    for rank in "01":
        ranks.append(os.fork())
        if not ranks[-1]:
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            run()
            return
    while ranks:
        rank, status = os.wait()
        ranks.remove(rank)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def start_python(*arguments: str, output: IO[bytes] | IO[str], **more: str) -> subprocess.Popen[bytes]:
    """`python *arguments` in the background, all that it writes into the file `output`."""
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=environment(**more), stdout=output, stderr=subprocess.STDOUT)


def start_quietly(*arguments: str) -> subprocess.Popen[str]:
    """`python *arguments` in the background, what it prints to be read while it runs; its complaints are lost."""
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), stderr=subprocess.DEVNULL)


@contextmanager
def ask_python(script: Path, timeout: float = 240) -> Iterator[Callable[..., Any]]:
    """A process that stays for many questions: what is called with goes to it as a line of JSON, a line comes back.

    What it writes to its standard error is lost; a question that takes longer than `timeout` seconds ends it.
    """
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )

    def ask(*question: Any) -> Any:
        limit = Timer(timeout, process.kill)
        limit.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        finally:
            limit.cancel()

    with process:
        yield ask
        process.stdin.close()

"""Scripts, each in a fork of one process that has imported what they all import, with its output and its end in files.

Run as `python forks.py FOLDER MODULE …`, the commands as JSON on the standard input: name → script and arguments. Each
runs in FOLDER/name, and leaves `out`, `err` and its exit status in FOLDER/name.json.
"""

import json
import os
import runpy
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path


def run(folder: Path, script: str, *arguments: str) -> None:
    """What a fork does: `python script *arguments` in the folder, its output beside it."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def main(folder: Path, modules: list[str]) -> None:
    sys.modules["tensorflow"] = None  # PyTorch's TensorBoard writer imports it where it is there, for seconds
    for module in modules:
        with suppress(ImportError):
            import_module(module)
    for name, command in json.load(sys.stdin).items():
        child = os.fork()
        if not child:
            return run(folder / name, *command)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = {kind: (folder / f"{name}.{kind}").read_text() for kind in ("out", "err")}
        (folder / f"{name}.json").write_text(json.dumps({"status": status, **texts}))
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""What share of the parameters is followed: every architecture of transformers, and of timm, on the meta device.

    python -m benchmarks.coverage [--into coverage.jsonl] [transformers] [timm]

Every architecture is built from the defaults of its class, without weights, and described as `ww_monitor.describe`
does. The summary is the tables of docs/coverage.md. With `--into` each architecture is a line of that file as soon as
it is measured, and what the file has is not measured again.

timm, which some architectures of transformers hold, imports torchvision, of which its architectures need one class, a
norm that does not train. Where torchvision is missing, or does not load, empty modules stand in for it, in this process
alone, and the summary says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ww_monitor.description import kinds_of, num_parameters
from ww_monitor.matrix import Skipped
from ww_monitor.settings import Select
from ww_monitor.walk.names import BUFFER, POSITIONS
from ww_monitor.walk.sharded import shards_of
from ww_monitor.walk.sources import walk_source

SECONDS = 60
"""How long building one architecture may take: some have a hundred thousand modules."""

LEAST = 0.97
"""Share below which an architecture is listed with its reasons."""

NO_MATRIX = (POSITIONS, "a mask", "a bias", "a vector", "parameters of ")
"""How the reasons begin for parameters that are no matrix of a layer, beside vectors: they stay out on purpose."""

LEVELS = ((0.999, "0.999 to 1"), (0.99, "0.99 to 0.999"), (LEAST, "0.97 to 0.99"), (0.0, "below 0.97"))

Build = Callable[[], nn.Module]


def of_transformers() -> Iterator[tuple[str, Build]]:
    """A builder for each class of configuration that `AutoModel` knows."""
    stand_in_for_torchvision()
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    for config in MODEL_MAPPING:
        yield config.__name__.removesuffix("Config"), lambda config=config: transformers.AutoModel.from_config(config())


def of_timm() -> Iterator[tuple[str, Build]]:
    """A builder for each architecture of timm."""
    stand_in_for_torchvision()
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: timm.create_model(name)


SOURCES = {"transformers": of_transformers, "timm": of_timm}


# --- where torchvision does not load


class _Anything(type):
    """A class whose every attribute is such a class."""

    def __getattr__(cls, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Frozen(nn.Module):
    """Stands for torchvision's `FrozenBatchNorm2d`, which no architecture is built with by default."""


class _Empty(ModuleType):
    """A module that has whatever is imported from it."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Frozen if name == "FrozenBatchNorm2d" else _Anything(name, (), {})


def stand_in_for_torchvision() -> None:
    """Put empty modules in the place of torchvision, unless it loads."""
    try:
        importlib.import_module("torchvision.ops.misc")
    except Exception:  # noqa: BLE001 - without its binary for this torch it raises a RuntimeError
        inside = "ops ops.misc models models.feature_extraction transforms transforms.functional transforms.v2"
        names = f"{inside} transforms.v2.functional io datasets utils".split()
        for name in ("torchvision", *(f"torchvision.{one}" for one in names)):
            sys.modules[name] = module = _Empty(name)
            module.__spec__, module.__path__, module.__version__ = ModuleSpec(name, None), [], "0"
            above, _, last = name.rpartition(".")
            if above:
                setattr(sys.modules[above], last, module)


# --- one architecture


def share(build: Build) -> tuple[float, float, str]:
    """The share of a model's parameters that is followed, that of those in matrices, and why the rest is not."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = build()
        items = list(Select().apply(walk_source(model, experts="pooled", layout=shards_of)))
    total = max(1, num_parameters(model))
    why: Counter[str] = Counter()
    for item in items:
        if isinstance(item, Skipped) and item.shape and not item.reason.startswith(("tied", BUFFER)):
            why[item.reason] += math.prod(item.shape)
    kinds = kinds_of(items, total)
    why["vectors: biases, gains"] = round(sum(one.share_skipped for one in kinds if one.kind == "vector") * total)
    no_matrix = sum(size for reason, size in why.items() if reason.startswith(("vectors", *NO_MATRIX)))
    followed = sum(one.share for one in kinds)
    reasons = [f"{reason} {size / total:.1%}" for reason, size in why.most_common(3) if size > 0.001 * total]
    return followed, followed / max(followed, 1 - no_matrix / total), "; ".join(reasons)


def measure(sources: Iterable[str], into: Path | None) -> list[dict[str, Any]]:
    """A line an architecture: its source and name, and its share and reasons, or why it was not built."""
    lines = list(map(json.loads, into.read_text().splitlines())) if into and into.exists() else []
    known = {(line["source"], line["name"]) for line in lines}
    for source in sources:
        for name, build in SOURCES[source]():
            if (source, name) in known:
                continue
            line: dict[str, Any] = {"source": source, "name": name, "version": version(source)}
            try:
                signal.alarm(SECONDS)
                line["share"], line["of_matrices"], line["why"] = share(build)
            except Exception as error:  # noqa: BLE001 - many need a package or a configuration of their own
                line["not_built"] = f"{type(error).__name__}: {str(error).strip()[:120]}"
            finally:
                signal.alarm(0)
            lines.append(line)
            if into:
                with into.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return lines


# --- the tables


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """How many architectures of each source are at which level, and those below the last one."""
    sources = list(dict.fromkeys(line["source"] for line in lines))
    head, counts = "| followed, of all parameters |", [f"| {label} |" for _, label in LEVELS]
    for source in sources:
        of = [line for line in lines if line["source"] == source]
        shares = [line["share"] for line in of if "share" in line]
        head += f" {source} {of[0]['version']}, {len(shares)} of {len(of)} built |"
        levels = [next(at for at, (least, _) in enumerate(LEVELS) if share >= least) for share in shares]
        counts = [f"{row} {levels.count(at)} |" for at, row in enumerate(counts)]
    low = sorted((line for line in lines if line.get("share", 1.0) < LEAST), key=lambda line: line["of_matrices"])
    rows = [f"| {one['name']} | {one['of_matrices']:.1%} | {one['share']:.1%} | {one['why']} |" for one in low]
    below = ["| below 97 % of all | followed, of matrices | of all | the rest |", "|---|---|---|---|", *rows]
    return "\n".join([head, "|---" * (1 + len(sources)) + "|", *counts, "", *below])


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="source", help=" or ".join(SOURCES), default=list(SOURCES))
    parser.add_argument("--into", type=Path, help="a file of JSON Lines, which goes on where it ends")
    given = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    print(tables(measure(given.sources, given.into)))
    if isinstance(sys.modules.get("torchvision"), _Empty):
        print("\nEmpty modules stood in for torchvision.")


if __name__ == "__main__":
    main()

"""What share of the parameters is followed: every architecture of transformers, and of timm, on the meta device.

    python -m benchmarks.coverage [transformers] [timm]

Every architecture is built from the default configuration of its class, without weights. A line has the family, the
architecture, the share of its parameters in matrices that are followed, and the largest reasons for the rest.
"""

from __future__ import annotations

import math
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import nn

from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.names import BUFFER
from ww_monitor.walk.sharded import shards_of
from ww_monitor.walk.sources import walk_source

SECONDS = 30
"""How long building one architecture may take: some have a hundred thousand modules."""

Build = Callable[[], nn.Module]


def of_transformers() -> Iterator[tuple[str, Build]]:
    """A builder for each class of configuration that `AutoModel` knows."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    for config in MODEL_MAPPING:
        yield config.__name__.removesuffix("Config"), lambda config=config: transformers.AutoModel.from_config(config())


def of_timm() -> Iterator[tuple[str, Build]]:
    """A builder for each family of timm: the first architecture of its module."""
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            yield f"timm {names[0]}", lambda name=names[0]: timm.create_model(name)


def share(build: Build) -> tuple[float, str]:
    """The share of a model's parameters that is followed, and why the rest is not."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = build()
        items = list(walk_source(model, experts="pooled", layout=shards_of))
    total = max(1, sum(parameter.numel() for parameter in model.parameters()))
    why: Counter[str] = Counter()
    for item in items:
        own = isinstance(item, Skipped) and item.shape and not item.reason.startswith(("tied", BUFFER))
        if own:
            why[item.reason] += math.prod(item.shape)
    followed = sum(math.prod(item.shape) for item in items if isinstance(item, Matrix))
    why["vectors: biases, gains"] = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim < 2)
    return followed / total, "; ".join(f"{reason} {size / total:.1%}" for reason, size in why.most_common(2))


def main(sources: Iterable[str]) -> None:
    """Print a line an architecture, then how many are where."""
    shares: list[float] = []
    for source in sources:
        for name, build in {"transformers": of_transformers, "timm": of_timm}[source]():
            try:
                signal.alarm(SECONDS)
                part, why = share(build)
            except Exception as error:  # noqa: BLE001 - many need a package or a configuration of their own
                print(f"{name}: not built: {type(error).__name__}: {str(error)[:80]!r}", flush=True)
                continue
            finally:
                signal.alarm(0)
            shares.append(part)
            print(f"{name}: {part:.4f} ({why})", flush=True)
    levels = (1.0, 0.99, 0.97, 0.9, 0.0)
    for high, low in pairwise(levels):
        print(f"{low:.2f} to {high:.2f}: {sum(low <= min(part, 1 - 1e-9) < high for part in shares)}")


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _too_long)
    main(sys.argv[1:] or ("transformers", "timm"))

"""`analyze`: one call, one snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch

from ww_monitor.distributed import analyze_on_ranks
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import History, Snapshot
from ww_monitor.rules import SINGLE_RULES, apply_rules
from ww_monitor.settings import AnalysisOptions, Select, Stored, WalkOptions, warn
from ww_monitor.signatures import taking
from ww_monitor.walk.delta import delta
from ww_monitor.walk.sources import Source, walk_source

Progress = Callable[[float], object]
"""Told of the share of the work that is done, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Stored, WalkOptions, Select, AnalysisOptions):
    """What to analyse of one model or of each of several, and how."""

    device: Annotated[
        str | torch.device | None,
        'Where each weight is moved to, one at a time, and analysed (`"cuda"`); `None` for where it is. Weights in'
        " shards stay where they are.",
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            # torch.device takes the name of any device; whether this machine has it a tensor tells
            known = self.device is None or not torch.empty(0, dtype=torch.float32, device=self.device).is_meta
        except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was built without CUDA
            raise InvalidArgument(
                f"{self.where}: device must be one that torch has here; got {str(self.device)!r}"
                f" ({str(error).partition(chr(10))[0][:200]})"
            ) from error
        if not known:
            raise InvalidArgument(f"{self.where}: device must be one that holds numbers; got 'meta'")

    def items(self, source: Source, *, say: Callable[[str], None] = warn) -> Iterator[Matrix | Skipped]:
        """The matrices of a model after selection, read on the device."""
        walked = walk_source(source, **self.for_walker(self.preset), part=self.part)
        for item in Select.of(self).apply(walked, say=say):
            if self.device is not None and isinstance(item, Matrix) and item.shards is None:
                yield replace(item, load=partial(self._loaded, item))
            else:
                yield item

    def _loaded(self, matrix: Matrix) -> torch.Tensor:
        return matrix.load().to(self.device)


@dataclass(frozen=True, eq=False)  # tensors compare entry by entry
class AnalyzeOptions(SourceOptions):
    """What `analyze` takes."""

    where: ClassVar[str] = "analyze"
    model: Annotated[
        Source,
        "A torch module; a mapping from names to tensors; or the path of a checkpoint: a `.safetensors` file, a torch"
        " file (`.bin`, `.pt`, `.pth`, `.th`, `.ckpt`, `.pth.tar`; no pickled objects), weights of Keras, the index of"
        " shards, or a directory with such weights or with the checkpoints of a run.",
    ]
    _: KW_ONLY
    base: Annotated[Source | None, "A model to subtract first: the spectra are those of W − W₀, paired by name."] = None
    across_ranks: Annotated[
        bool,
        "Analyse together with all ranks of the `torch.distributed` job, each of which makes the same call with its"
        " part of the model; see `ww_monitor.distributed.analyze_on_ranks`. Weights in shards need it.",
    ] = False
    progress: Annotated[
        Progress | None,
        "Called as each weight is read, and at the end, with the share of the work that is done, from 0 to 1.",
    ] = None


@taking(AnalyzeOptions)
def analyze(given: AnalyzeOptions) -> Snapshot:
    """Spectra, metrics and findings of every weight matrix of a model.

    The model is only read: no gradient, buffer, training flag or global random state changes. A layer that cannot
    be analysed has a `status` that says why and NaN for its numbers, and costs the other layers nothing.

    Returns:
        A snapshot with `layers`, `summary`, `findings`, `skipped` and `to_pandas()`; its layers carry their
        eigenvalues.

    Raises:
        InvalidArgument: naming the argument, its value and the choices; or the layers that have no pair in `base`.
        LayerError: with `strict`, naming the layer, what was expected and what came.
        RankFailed: with `across_ranks`, if a rank is not heard of in time, naming it and what it last did.

    >>> import torch, ww_monitor
    >>> _ = torch.manual_seed(0)
    >>> snapshot = ww_monitor.analyze(torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Linear(100, 4)))
    >>> [(layer.name, layer.verdict) for layer in snapshot.layers], [layer.reason for layer in snapshot.skipped]
    ([('0', 'random_like')], ['4 eigenvalues, fewer than min_size=8'])
    """
    options = Options(**AnalysisOptions.of(given).keywords(), keep_eigenvalues=True)
    items = given.items(given.model)
    if given.base is not None:
        items = delta(items, replace(given, part="").items(given.base, say=lambda _: None))
    if given.progress is not None:
        items = _told(items, given.progress)
    snapshot = analyze_on_ranks(items, options) if given.across_ranks else analyze_matrices(items, options)
    if given.progress is not None:
        given.progress(1.0)
    return snapshot.with_findings(apply_rules(SINGLE_RULES, History([snapshot])))


def _told(items: Iterable[Matrix | Skipped], progress: Progress) -> Iterator[Matrix | Skipped]:
    """The same items; as each weight is read, what was read before it is counted as done."""
    listed = list(items)
    total = sum(item.cost for item in listed if isinstance(item, Matrix))
    done = 0.0

    def load(matrix: Matrix) -> torch.Tensor:
        nonlocal done
        progress(done / total)
        done += matrix.cost
        return matrix.load()

    for item in listed:
        yield replace(item, load=partial(load, item)) if isinstance(item, Matrix) else item

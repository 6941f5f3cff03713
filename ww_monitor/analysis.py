"""`analyze`: one call, one snapshot."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

from ww_monitor.distributed import analyze_on_ranks
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.record import History, Snapshot
from ww_monitor.rules import SINGLE_RULES, apply_rules
from ww_monitor.settings import AnalysisOptions, Select, WalkOptions
from ww_monitor.signatures import taking
from ww_monitor.walk.delta import delta
from ww_monitor.walk.sources import Source, walk_source


@dataclass(frozen=True, eq=False)
class AnalyzeOptions(WalkOptions, Select, AnalysisOptions):
    """What `analyze` takes."""

    where: ClassVar[str] = "analyze"
    model: Annotated[
        Source,
        "A torch module; a mapping from names to tensors; or the path of a checkpoint: a `.safetensors` file, a torch"
        " file (`.bin`, `.pt`, `.pth`, `.th`, `.ckpt`, `.pth.tar`; no pickled objects), weights of Keras, the index of"
        " shards, or a directory with such weights or with the checkpoints of a run.",
    ]
    _: KW_ONLY
    part: Annotated[
        str,
        'Which of several state dicts in a checkpoint or mapping to analyse, by its path (`"generator"`, `"ema"`);'
        " without it all but moving averages, their names with that path in front.",
    ] = ""
    base: Annotated[Source | None, "A model to subtract first: the spectra are those of W − W₀, paired by name."] = None
    across_ranks: Annotated[
        bool,
        "Analyse together with all ranks of the `torch.distributed` job, each of which makes the same call with its"
        " part of the model; see `ww_monitor.distributed.analyze_on_ranks`. Weights in shards need it.",
    ] = False


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
    select, how = Select.of(given), given.for_walker(given.preset)
    items = select.apply(walk_source(given.model, **how, part=given.part))
    if given.base is not None:
        items = delta(items, select.apply(walk_source(given.base, **how), say=lambda _: None))
    snapshot = analyze_on_ranks(items, options) if given.across_ranks else analyze_matrices(items, options)
    return snapshot.with_findings(apply_rules(SINGLE_RULES, History([snapshot])))

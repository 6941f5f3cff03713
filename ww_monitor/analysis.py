"""`analyze`: one call, one snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ww_monitor.distributed import analyze_on_ranks
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.matrix import Select
from ww_monitor.record import History, Snapshot
from ww_monitor.rules import SINGLE_RULES, apply_rules
from ww_monitor.spectra.marchenko_pastur import SIGNIFICANCE
from ww_monitor.spectra.traps import REPLICAS
from ww_monitor.walk.delta import delta
from ww_monitor.walk.sources import WHOLE, Source, walk_source


def analyze(
    model: Source,
    *,
    base: Source | None = None,
    preset: str = "default",
    metrics: Sequence[str] | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_size: int = 8,
    max_size: int | None = None,
    seed: int = 0,
    replicas: int = REPLICAS,
    significance: float = SIGNIFICANCE,
    fit: str = "csn",
    fit_k: int | None = None,
    fix_fingers: str | None = None,
    aspect_ratio: float | None = None,
    split: Mapping[str, int | Sequence[int]] | None = None,
    experts: Literal["separate", "pooled"] = "separate",
    lora: Sequence[str] = ("base", "delta"),
    strict: bool = False,
    across_ranks: bool = False,
) -> Snapshot:
    """Spectra, metrics and findings of every weight matrix of a model.

    The model is only read: no gradient, buffer, training flag or global random state changes. A layer that cannot
    be analysed has a `status` that says why and NaN for its numbers, and costs the other layers nothing.

    Args:
        model: A torch module; a mapping from names to tensors; or the path of a checkpoint: a `.safetensors` file, a
            torch file (`.bin`, `.pt`, `.pth`, `.th`, `.ckpt`; no pickled objects) or a directory with such weights.
        base: A model to subtract first: the spectra are those of W − W₀, paired by name.
        preset: `"default"`, or `"weightwatcher"` for that tool's columns and definitions (version 0.7.7).
        metrics: Names of metrics; `None` for the preset's standard ones, `"all"` for those that cost a multiple too.
        include: Globs on layer names; none keeps all.
        exclude: Globs on layer names to leave out.
        min_size: Least number of eigenvalues of a layer.
        max_size: Largest number of eigenvalues of a layer.
        seed: Seed of the private generator that shuffles.
        replicas: Shuffles a layer that may hold a trap.
        significance: Probability of a false spike in a random layer, and of a false trap in one shuffle of it.
        fit: `"csn"` (Clauset, Shalizi & Newman), `"hill"` (the `fit_k` largest eigenvalues), or `"truncated"` (a power
            law with exponential cut-off from the xmin of `"csn"` on).
        fit_k: Size of the Hill estimator's tail; `None` for half of the eigenvalues.
        fix_fingers: `"clip_xmax"` leaves up to ten largest eigenvalues out where that lowers alpha by more than 1.
        aspect_ratio: Fit the tail to windows of this ratio of long to short side (FARMS), so that alpha can be compared
            between layers of different shape; `None` fits the whole matrices.
        split: Glob on the name → number or sizes of the parts that a fused weight is cut into along its outputs;
            fused projections of known models are cut without it, 1 leaves them whole (as weightwatcher's preset does).
        experts: `"separate"` gives a matrix for each expert of a stacked weight, `"pooled"` one with a slice for each.
        lora: Which of `"base"`, `"delta"` (B·A with its scale) and `"merged"` to analyse of a layer with adapters.
        strict: Raise on the first layer that fails, instead of giving it a status.
        across_ranks: Analyse together with all ranks of the `torch.distributed` job, each of which makes the same call
            with its part of the model; see `ww_monitor.distributed.analyze_on_ranks`. Weights in shards need it.

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
    options = Options(
        preset=preset,
        metrics=metrics,
        seed=seed,
        replicas=replicas,
        significance=significance,
        fit=fit,
        fit_k=fit_k,
        fix_fingers=fix_fingers,
        aspect_ratio=aspect_ratio,
        strict=strict,
        keep_eigenvalues=True,
    )
    select = Select(include, exclude, min_size, max_size)
    if split is None and preset == "weightwatcher":
        split = WHOLE
    items = select.apply(walk_source(model, split=split, experts=experts, lora=lora))
    if base is not None:
        items = delta(items, select.apply(walk_source(base, split=split, experts=experts, lora=lora)))
    snapshot = analyze_on_ranks(items, options) if across_ranks else analyze_matrices(items, options)
    return snapshot.with_findings(apply_rules(SINGLE_RULES, History([snapshot])))

"""New weights from a spectrum: keep the leading singular components, or remove those that carry correlation traps."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.errors import InvalidArgument, as_python, check_choice
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.settings import Select
from ww_monitor.spectra.elements import elements
from ww_monitor.spectra.erg import correlation_space
from ww_monitor.spectra.marchenko_pastur import bulk
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE
from ww_monitor.walk.sources import walk_source

logger = logging.getLogger(__name__)

Homes = Mapping["tuple[int, torch.dtype]", torch.Tensor]
"""The storage of live weights → a tensor in the storage that is written to."""

_KEEP = ("erg", "detX", "alpha", "spikes")
_LEAST_TRAPS = 0.5  # as in `rules.trap`
_TRAP_SHARE = 0.25
"""Least share of a singular value that comes from trap entries in a direction that is removed. Our choice: for a lone
entry in a square random matrix it is (h² − 1)/(h² + 1) at headroom h (Benaych-Georges & Nadakuditi 2012), a quarter
from h = 1.3 on; of a learnt direction spread over all entries it is almost 0."""


@dataclass(frozen=True)
class TransformedLayer:
    """What became of one layer.

    Attributes:
        name: Name of the layer.
        kept: Singular components that stay, over all slices; with `method="clip"` entries that stay.
        of: Singular components (entries) there were.
        reason: Why the layer is unchanged, bit for bit, or `""` if it changed.
    """

    name: str
    kept: int
    of: int
    reason: str = ""


@dataclass(frozen=True)
class Transformed:
    """A transformed model.

    Attributes:
        state_dict: The model's own keys: copies that share nothing with it, or with `inplace=True` the live tensors.
        layers: One a weight of the model.
    """

    state_dict: dict[str, Any]
    layers: tuple[TransformedLayer, ...]

    @property
    def changed(self) -> tuple[TransformedLayer, ...]:
        """The layers that changed."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def unchanged(self) -> tuple[TransformedLayer, ...]:
        """The layers that did not, each with its reason."""
        return tuple(layer for layer in self.layers if layer.reason)


def svd_smooth(
    model: torch.nn.Module | Mapping[str, Any],
    keep: str | int | float = "erg",
    *,
    inplace: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Transformed:
    """W → Σ_{i ≤ K} s_i u_i v_iᵀ for every weight matrix W, its K leading singular components.

    A layer whose K is not known (the fit failed) or is 0 stays as it is and says why; so does one whose other
    components together weigh no more than the rounding of its storage precision, at most ½ eps ‖W‖_F, which makes
    smoothing twice the same as smoothing once. Only weights stored in a tensor of the model are written, fused ones
    part by part; one that is computed (pruned, parametrized, quantized) is left alone. Source: weightwatcher 0.7.7's
    `SVDSmoothing`, whose result is float32 and randomised; here the decomposition is exact and the precision stays.

    Args:
        model: A torch module or its state dict.
        keep: `"erg"` (or `"detX"`): the effective correlation space, as many leading eigenvalues as have a product
            of 1 after rescaling to mean 1, including the one that takes it below. `"alpha"`: the power-law tail.
            `"spikes"`: the eigenvalues above the random bulk. These count over all slices of a kernel together. An
            integer: components of every slice. A float in (0, 1]: that share of M of every slice, at least 1.
            A tail of fewer than 20 is fitted by another rule than a long spectrum, so only there `"alpha"` may cut
            a second time.
        inplace: Write into the model instead of into a copy.
        include: Globs on layer names; none keeps all.
        exclude: Globs on layer names to leave out.

    Returns:
        `.state_dict`, and `.changed` and `.unchanged` layers.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.

    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32))
    >>> smooth = svd_smooth(net, keep=4)
    >>> torch.linalg.matrix_rank(smooth.state_dict["0.weight"]).item(), smooth.changed
    (4, (TransformedLayer(name='0', kept=4, of=32, reason=''),))
    """
    keep = as_python(keep)
    whole = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not (whole or keep in _KEEP or (isinstance(keep, float) and 0 < keep <= 1)):
        listed = ", ".join(map(repr, _KEEP))
        raise InvalidArgument(
            f"svd_smooth: keep must be one of {listed}, an integer >= 1 or a float in (0, 1]; got {keep!r}"
        )
    return _transform(
        model, partial(_smooth, keep=keep), inplace=inplace, select=Select(include=include, exclude=exclude)
    )


def svd_sharpen(
    model: torch.nn.Module | Mapping[str, Any],
    *,
    method: str = "directions",
    inplace: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Transformed:
    """W → W − Σ s_i u_i v_iᵀ over the singular directions that carry its correlation traps.

    A trap entry has |w − mean| > σ(NM)^¼; a layer has traps if its shuffled de-meaned matrix has an outlier
    (`num_traps` ≥ ½) and there is such an entry. A direction carries a trap if its singular value
    s = Σ_ij u_i w_ij v_j exceeds the random bulk and at least a quarter of it comes from trap entries; at most
    ⌈num_traps⌉ are removed, the most concentrated first. Learnt directions spread over many entries and stay.
    A layer without traps stays bit for bit.
    weightwatcher 0.7.7 removes as many *leading* directions as there are traps, whether they carry them or not, and
    reduces a layer to rank one where its fit fails.

    Args:
        model: A torch module or its state dict.
        method: `"directions"`, or `"clip"` to set the trap entries to mean ± 0.8 σ(NM)^¼ instead, the headroom
            below which no shuffle shows an outlier. `"directions"` leaves an entry with a headroom below about 1.3
            where it is, because no direction has formed around it.
        inplace: Write into the model instead of into a copy.
        include: Globs on layer names; none keeps all.
        exclude: Globs on layer names to leave out.
        seed: Seed of the private generator that shuffles.

    Returns:
        `.state_dict`, and `.changed` and `.unchanged` layers.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.

    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.Linear(50, 20))
    >>> with torch.no_grad():
    ...     net[0].weight[3, 7] = 2.0
    >>> [(layer.name, layer.kept, layer.of, layer.reason) for layer in svd_sharpen(net).layers]
    [('0', 49, 50, ''), ('1', 20, 20, 'no traps')]
    """
    check_choice("svd_sharpen", "method", method, ("directions", "clip"))
    change = partial(_sharpen, method=method, seed=seed)
    return _transform(model, change, inplace=inplace, select=Select(include=include, exclude=exclude))


# --- one layer


@dataclass(frozen=True)
class _Change:
    """What becomes of a layer: new weights `[R, N, M]` in float64 of `kept` components, or `reason` why none."""

    weights: torch.Tensor | None
    kept: int
    of: int
    reason: str = ""


Change = Callable[[Matrix, torch.Tensor], _Change]
"""The transform of one layer: the matrix and its weights → what becomes of it."""


def _same(of: int, reason: str) -> _Change:
    return _Change(None, of, of, reason)


def _smooth(matrix: Matrix, weights: torch.Tensor, keep: str | int | float) -> _Change:
    components = matrix.num_eigenvalues
    if isinstance(keep, str):
        count, verdict = _pooled_count(matrix, keep)
    else:
        # 0.29 · 100 is less than 29.
        count = keep if isinstance(keep, int) else max(1, math.floor(keep * matrix.short_side + 1e-9))
        verdict = ""
    if not count >= 1:
        return _same(components, f"keep={keep!r} gives no number of components: {verdict}")
    u, s, vh = torch.linalg.svd(weights.double(), full_matrices=False)
    eigenvalues = s.square()
    if isinstance(keep, str):
        # over all slices, as the fit counted them
        smallest = eigenvalues.flatten().sort(descending=True).values[: int(count)].amin()
        kept = eigenvalues >= smallest
    else:
        kept = torch.arange(s.shape[1], dtype=torch.int64, device=s.device).expand_as(s) < count
    # Of float64 weights the SVD itself rounds more than they do.
    rounding = max(torch.finfo(weights.dtype).eps / 2, matrix.long_side * torch.finfo(torch.float64).eps)
    if bool(torch.where(kept, 0.0, eigenvalues).sum() <= rounding**2 * eigenvalues.sum()):
        return _same(components, "the rest is no more than the rounding of its precision")
    return _Change(u @ (torch.where(kept, s, 0.0)[:, :, None] * vh), int(kept.sum()), components)


def _pooled_count(matrix: Matrix, keep: str) -> tuple[float, str]:
    """The number of components that the pooled spectrum says to keep, NaN where that failed, and its verdict."""
    metric = "n_tail" if keep == "alpha" else "num_spikes"
    layer = analyze_matrices([matrix], Options(metrics=[metric], keep_eigenvalues=True)).layers[0]
    if keep in ("alpha", "spikes"):
        return layer.value(metric), layer.verdict
    spectrum = torch.tensor(layer.eigenvalues or [float("nan")], dtype=torch.float64, device="cpu")
    return float(correlation_space(spectrum[None]).size), layer.verdict


def _sharpen(matrix: Matrix, weights: torch.Tensor, method: str, seed: int) -> _Change:
    w = weights.double()
    stats = elements(w)
    mean, threshold = stats.mean[:, None, None], (stats.std * (w[0].numel() ** 0.25))[:, None, None]
    is_trap = (w - mean).abs() > threshold
    of = matrix.num_eigenvalues if method == "directions" else w.numel()
    if not bool(is_trap.any()):
        return _same(of, "no traps")
    num_traps = analyze_matrices([matrix], Options(metrics=["num_traps"], seed=seed)).layers[0].value("num_traps")
    if not num_traps >= _LEAST_TRAPS:
        return _same(of, "too small to count its traps" if math.isnan(num_traps) else "no traps")
    if method == "clip":
        limit = HEADROOM_TO_SHUFFLE * threshold
        return _Change(torch.where(is_trap, mean + (w - mean).sign() * limit, w), of - int(is_trap.sum()), of)
    removed, count = _trap_directions(w, torch.where(is_trap, w - mean, 0.0), math.ceil(num_traps))
    if count == 0:
        return _same(of, "no singular direction is concentrated on its traps; method='clip' removes them")
    return _Change(w - removed, of - count, of)


def _trap_directions(w: torch.Tensor, traps: torch.Tensor, most: int) -> tuple[torch.Tensor, int]:
    """The sum of the components that carry traps, `[R, N, M]`, and their number.

    Args:
        w: `[R, N, M]` float64.
        traps: `[R, N, M]` the trap entries, de-meaned, and 0 elsewhere.
        most: Largest number of components.
    """
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    long_side, short_side = max(w.shape[1:]), min(w.shape[1:])
    edge = bulk(s.square().flip(1), long_side=long_side, short_side=short_side).edge_max.sqrt()  # ascending
    share = torch.where(s > edge[:, None], ((u.mT @ traps) * vh).sum(2) / s, 0.0)
    best = share.flatten().topk(min(most, share.numel()))
    chosen = torch.zeros_like(share, dtype=torch.bool).flatten()
    chosen[best.indices[best.values >= _TRAP_SHARE]] = True
    chosen = chosen.view_as(share)
    return u @ (torch.where(chosen, s, 0.0)[:, :, None] * vh), int(chosen.sum())


# --- one model


@torch.no_grad()
def transform_matrices(
    items: Iterable[Matrix | Skipped], live: Mapping[str, Any], change: Change, *, inplace: bool
) -> Transformed:
    """Write `change(matrix, weights)` where the weights are a view of one of the tensors `live`.

    A layer that fails, or whose result is not finite, stays as it is.

    Args:
        items: What a walker yields, after selection.
        live: The model's tensors by key.
        change: The transform of one layer.
        inplace: Write into `live` instead of into a copy.
    """
    written = dict(live) if inplace else _copied(live)
    # by storage: fused weights, slices and tied layers are views of one tensor, and all are written through it
    homes = {_place(value): written[key].detach() for key, value in live.items() if _has_address(value)}
    rows = []
    for item in items:
        if isinstance(item, Skipped):
            rows.append(TransformedLayer(item.name, 0, 0, item.reason or "skipped"))
            continue
        try:
            result = _apply(item, change, homes)
        except Exception as error:
            logger.debug("layer %s stays as it is", item.name, exc_info=error)
            result = _same(item.num_eigenvalues, f"error: {type(error).__name__}: {error}")
        rows.append(TransformedLayer(item.name, result.kept, result.of, result.reason))
    return Transformed(written, tuple(rows))


def _transform(model: Any, change: Change, *, inplace: bool, select: Select) -> Transformed:
    if not isinstance(model, (torch.nn.Module, Mapping)):
        raise InvalidArgument(
            f"transform: model must be a torch.nn.Module or its state dict; got {type(model).__name__}"
        )
    live = model.state_dict() if isinstance(model, torch.nn.Module) else model
    return transform_matrices(select.apply(walk_source(model)), live, change, inplace=inplace)


def _apply(matrix: Matrix, change: Change, homes: Homes) -> _Change:
    """Change one layer where it is stored."""
    weights, size = matrix.load().detach(), matrix.num_eigenvalues
    home = homes.get(_place(weights)) if _has_address(weights) else None
    if home is None:
        return _same(size, "its weights are computed, not stored in one tensor")
    if not bool(torch.isfinite(weights.double()).all()):
        return _same(size, "not finite")
    result = change(matrix, weights)
    if result.weights is None:
        return result
    new = result.weights.to(weights.dtype)
    if not bool(torch.isfinite(new.double()).all()):
        return _same(size, f"the result does not fit into {weights.dtype}")
    home.as_strided(weights.shape, weights.stride(), weights.storage_offset()).copy_(new)
    return result


# --- where weights are stored


def _copied(live: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the tensors with the strides and the sharing of storage that they have among themselves."""
    memo: dict[int, Any] = {}  # torch notes copied storages here, so that tied weights and views stay what they are
    return {k: copy.deepcopy(v.detach(), memo) if isinstance(v, torch.Tensor) else v for k, v in live.items()}


def _has_address(value: Any) -> bool:
    plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return plain and value.layout is torch.strided and not value.is_meta and value.numel() > 0


def _place(tensor: torch.Tensor) -> tuple[int, torch.dtype]:
    """What a tensor and the views of it have in common."""
    return tensor.untyped_storage().data_ptr(), tensor.dtype

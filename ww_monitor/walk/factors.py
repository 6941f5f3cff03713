"""Factors of adapters among named tensors: which belong together, and the delta that they make."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ww_monitor.errors import WWMonitorError
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.folders import check_regular
from ww_monitor.walk.fused import hint
from ww_monitor.walk.lora import low_rank
from ww_monitor.walk.parts import KERNEL, WHOLE, joined, matrix
from ww_monitor.walk.reading import own_tensors
from ww_monitor.walk.roles import infer_role
from ww_monitor.walk.unread import Unread, layout, unread

Scaling = Callable[[str, int], float]
"""Name of the adapted module and rank → the scaling s of its delta s·B·A; NaN for an adapter of stacked parameters."""

_STACKED = "an adapter of a module's parameters, each with experts of its own, whose delta only its model gives"

_FACTOR = re.compile(
    r"(?P<name>.+?)(?P<stem>\.lora_(?:embedding_|linear_layer\.)?|[._]lora\d*\.)(?P<which>[ABEab]|down|mid|up)"
    r"(?P<end>(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?)"
)
_RIGHT = {"A": "B", "a": "b", "down": "up"}
"""Names of the factor that the inputs meet first, with those of the other: of PEFT and diffusers, of torchtune and
MLX, of kohya's scripts and of older diffusers."""

_OTHERS = re.compile(  # as PEFT 0.21 names what its adapters train, and what they share
    r"(^|\.)(hada_[wt]\d|lokr_[wt]\d|oft_(R|embedding_R|blocks)|boft_[Rs]|ia3_l|hra_u|(miss|bone)_block"
    r"|p?vera_(lambda_)?[abdAB]|(rand|vb|tiny|gra|de|g|supertuning_|poly_)lora_\w+|hira_(embedding_)?[AB]|adamss_\w+"
    r"|c3a_kernel|beft_bias|deft_[PR]|frod_\w+|psoft_R|osf_svd_params|peanut_([AB]|encoders|decoders)|poly_router"
    r"|lily_([AB]|router)|road_(theta|alpha)|ln_tuning_layers|shira_weight)(?![a-z])"
)
_ADALORA = 1e-5  # what AdaLoRA of PEFT adds to the rank that it divides by

MOST_WORK = 4e6
"""Steps that all patterns of a configuration may take for a name, at worst: a file may have been written to hang us."""

LONGEST_PATTERN = 500

MOST_CONFIG = 16 << 20
"""Bytes of an adapter_config.json, which has some thousand."""

MOST_MODELS = 64
"""Models that one file has adapters for (our choice: a pipeline of diffusers has four at most)."""


def factor_of(key: str) -> re.Match[str] | None:
    """Name, stem, which factor, end and adapter of a factor of a low-rank adapter; `None` for another tensor."""
    return _FACTOR.fullmatch(key)


def other_adapter(key: str) -> str:
    """Why the factor of an adapter of another kind is left out; `""` for another tensor."""
    return "factor of an adapter whose delta only its model gives" if _OTHERS.search(key) else ""


def delta(
    key: str, factor: re.Match[str], tensors: Mapping[str, Unread], scaling: Scaling | None
) -> Iterator[Matrix | Skipped]:
    """The delta s·B·A at the place of its factor A; a factor without its other half is left out.

    s is the `alpha` beside the factors divided by the rank, else what `scaling` says, else 1. MLX keeps the transposes
    of the factors: they are told by the sides that fit, and of square weights by the smaller one.
    """
    label = f"lora[{factor['adapter'] or 'default'}]"
    yield Skipped(key.removesuffix(".weight"), Kind.OTHER, tensors[key].shape, f"factor of {label}")
    # at A only, so that the delta is listed once; a lone factor has none
    stem, end, right, name = f"{factor['name']}{factor['stem']}", factor["end"], tensors[key], factor["name"]
    left = tensors.get(f"{stem}{_RIGHT.get(factor['which'], '')}{end}")
    if factor["which"] not in _RIGHT or left is None or 0 in (*left.shape, *right.shape):
        return
    diagonal, core = tensors.get(f"{stem}E{end}"), tensors.get(f"{stem}mid{end}")
    (rows, *inputs), (outputs, *columns) = right.shape, left.shape
    transposed = inputs == [outputs] and len(columns) == 1 and (rows != columns[0] or outputs < rows)
    if transposed:
        rows, inputs, outputs, columns = outputs, [rows], columns[0], [outputs]
    if math.prod(columns) != rows or (diagonal is not None and math.prod(diagonal.shape) != rows):
        return
    if core is not None and (core.shape[:2] != (rows, rows) or math.prod(inputs) != inputs[0]):
        return
    embedding, kernel = "_embedding_" in stem, len(inputs) > 1
    shape = (outputs, *(inputs if core is None else (inputs[0], *core.shape[2:])))
    kind = Kind.EMBEDDING if embedding else Kind.CONV if kernel else Kind.DENSE
    factors = [one for one in (right, left, diagonal, core) if one is not None]
    if reason := next((one.reason for one in factors if one.reason), ""):
        yield Skipped(f"{name}.{label}", kind, shape, reason)
        return
    scale = _scale(name, rows, tensors, scaling)
    if math.isnan(scale):
        yield Skipped(f"{name}.{label}", kind, shape, _STACKED)
        return
    made = _Delta(left, right, diagonal, core, scale, shape, embedding, transposed)
    part = KERNEL[0] if kernel else WHOLE[0]
    stored = shape[::-1] if embedding else shape  # it holds the transpose of B·A
    shards = layout(factors, part.stack, stored, computed=True)
    yield matrix(f"{name}.{label}", kind, part, stored, made.read, infer_role(name, kind), shards)


def of_parameters_left_out(tensors: Mapping[str, Unread]) -> dict[str, Unread]:
    """The tensors, with the reason for factors of parameters that have no layer: one is wrapped around the other.

    PEFT's `target_parameters` adapts stacks of experts so; what belongs to which the names do not say.
    """
    names = {key: factor["name"] for key in tensors if (factor := factor_of(key))}
    stacks = {key.rpartition(".")[0] for key, value in tensors.items() if names and len(value.shape) == 3}
    stacks = {name for name in stacks if f"{name}.weight" not in tensors}
    stacks |= {name.removesuffix(".base_layer") for name in names.values() if name.endswith(".base_layer")}
    left = {key for key, name in names.items() if name.removesuffix(".base_layer") in stacks}
    return {key: replace(value, reason=_STACKED) if key in left else value for key, value in tensors.items()}


def of_modules(found: Iterable[tuple[str, nn.Module]]) -> dict[str, Unread]:
    """The factors among the parameters of modules, and their alphas, by name; those that lie here as a whole only."""
    return {
        key: unread(tensor, tensor.detach)
        for path, module in found
        for key, tensor in ((joined(path, name), tensor) for name, tensor in own_tensors(module).items())
        if (key.endswith(".alpha") or factor_of(key)) and type(tensor) in (Tensor, Parameter)
        if not hasattr(tensor, "ds_id")
    }


def live_delta(
    key: str, found: Mapping[str, Unread], owners: Mapping[str, nn.Module], lora: Sequence[str]
) -> Iterator[Matrix | Skipped]:
    """`delta` of a parameter, if it is a factor; s is the `scaling` of the adapted module, or its alpha / rank."""
    factor = factor_of(key) if key in found else None
    if factor is not None:
        made = delta(key, factor, found, partial(_own_scaling, owners.get(factor["name"])))
        yield from (item for item in made if isinstance(item, Skipped) or "delta" in lora)


def _own_scaling(owner: nn.Module | None, _: str, rank: int) -> float:
    for attribute, divisor in (("scaling", 1), ("lora_alpha", rank), ("alpha", rank)):
        value = hint(owner, attribute)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value / divisor
    return 1.0


def _scale(name: str, rank: int, tensors: Mapping[str, Unread], scaling: Scaling | None) -> float:
    alpha = tensors.get(f"{name}.alpha")
    if alpha is not None and math.prod(alpha.shape) == 1:
        return float(alpha.read()) / rank
    return scaling(name, rank) if scaling else 1.0


@dataclass(frozen=True)
class _Delta:
    """s·B·diag(E)·A, or s·B·C·A with a core C, a kernel; computed when it is read."""

    left: Unread
    right: Unread
    diagonal: Unread | None
    core: Unread | None
    scale: float
    shape: tuple[int, ...]
    embedding: bool
    transposed: bool

    def read(self) -> Tensor:
        left, right, scale = self.left.read().flatten(1), self.right.read().flatten(1), self.scale
        if self.transposed:
            left, right = left.T, right.T
        if self.diagonal is not None:
            right, scale = right * self.diagonal.read().view(-1, 1), scale * len(right) / (len(right) + _ADALORA)
        if self.core is not None:
            core = self.core.read()
            right = (core.movedim(1, -1) @ right.to(core.dtype)).movedim(-1, 1).flatten(1)
        product = low_rank(left, right, scale)
        return product.T if self.embedding else product.view(self.shape)


# --- the scaling that a configuration says


def lora_scaling(weights: Path, header: Mapping[str, str]) -> Scaling | None:
    """The scaling alpha / r, or alpha / √r with `use_rslora`, by an adapter_config.json beside the weights or a header.

    Args:
        weights: The file with the factors.
        header: Its metadata: of diffusers and of kohya's scripts they say what a configuration does.

    Raises:
        WWMonitorError: if it is no such configuration, or has a pattern that is not matched.
    """
    file = weights.parent / "adapter_config.json"
    if not file.is_file():
        return _in_header(weights, header)
    if check_regular(file).stat().st_size > MOST_CONFIG:
        raise WWMonitorError(f"walk_files: expected a configuration of at most {MOST_CONFIG} bytes, got {file}")
    return _of_config(file.read_bytes(), "", file)


def _in_header(file: Path, header: Mapping[str, str]) -> Scaling | None:
    if "lora_adapter_metadata" in header:  # of diffusers: a configuration a model, flat
        text = header["lora_adapter_metadata"]
        models = set(re.findall(r'"(\w+)\.lora_alpha"', text))
        if len(models) > MOST_MODELS:
            raise WWMonitorError(f"walk_files: expected at most {MOST_MODELS} models in {file}, got {len(models)}")
        return partial(_by_model, models={model: _of_config(text, f"{model}.", file) for model in models})
    alpha = header.get("ss_network_alpha", "")  # of kohya's scripts
    number = re.fullmatch(r"\d+(\.\d+)?", alpha)
    return partial(_scaling, patterns=[], alpha=float(alpha), root=False) if number else None


def _by_model(name: str, rank: int, *, models: Mapping[str, Scaling]) -> float:
    model, _, inner = name.partition(".")
    return models[model](inner, rank) if model in models else 1.0


def _of_config(text: str | bytes, prefix: str, file: Path) -> Scaling:
    """What a configuration of PEFT or MLX in JSON says, under keys with a prefix."""
    try:
        config = {key.removeprefix(prefix): value for key, value in json.loads(text).items() if key.startswith(prefix)}
        if "scale" in (mlx := config.get("lora_parameters") or {}):  # of MLX: one number for all ranks
            return partial(_constant, scale=float(mlx["scale"]))
        found = dict(config.get("alpha_pattern") or {})
        patterns = [(_compiled(pattern, file), float(alpha)) for pattern, alpha in found.items()]
        if sum(map(_work, found)) > MOST_WORK:
            raise WWMonitorError(f"walk_files: expected patterns in {file} that take bounded time together")
        alpha = float(config["lora_alpha"]) if "lora_alpha" in config or patterns else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # the last of deep JSON
        raise WWMonitorError(f"walk_files: expected a LoRA configuration with `lora_alpha` in {file}") from error
    if alpha is None and config.get("peft_type", "LORA") in ("LORA", "ADALORA"):
        raise WWMonitorError(f"walk_files: expected a LoRA configuration with `lora_alpha` in {file}")
    stacked = tuple(str(name).rpartition(".")[0] for name in config.get("target_parameters") or ())
    return partial(
        _scaling, patterns=patterns, alpha=alpha or 0.0, root=bool(config.get("use_rslora")), stacked=stacked
    )


def _constant(name: str, rank: int, *, scale: float) -> float:
    return scale


def _scaling(
    name: str,
    rank: int,
    *,
    patterns: list[tuple[re.Pattern[str], float]],
    alpha: float,
    root: bool,
    stacked: tuple[str, ...] = (),
) -> float:
    if any(f".{name}".endswith(f".{module}") for module in stacked):
        return math.nan
    inner = name.removeprefix("base_model.model.")  # PEFT matches the names of the model that it was given
    own = next((value for pattern, value in patterns if pattern.match(inner)), alpha)
    return own / (math.sqrt(rank) if root else rank)


def _compiled(pattern: str, file: Path) -> re.Pattern[str]:
    """A pattern as PEFT means it: the end of a name, from a dot on, or with `^` in front all of it."""
    if not _work(pattern) < MOST_WORK:
        raise WWMonitorError(f"walk_files: expected patterns in {file} that take bounded time, got {pattern[:80]!r}")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise WWMonitorError(f"walk_files: expected a regular expression in {file}, got {pattern[:80]!r}") from error


def _work(pattern: str) -> float:
    """A bound on the steps that a pattern takes for a name of 64 characters: 64 a repeat, 2 an option, its branches.

    >>> [_work(pattern) < MOST_WORK for pattern in ("^model.layers.(0|1)..*q_proj", "(a+)+b", "a?" * 30)]
    [True, False, False]
    """
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)
    if len(pattern) > LONGEST_PATTERN or re.search(r"\)[*+{]|\(\?(?!:)", bare) or re.search(r"\\[1-9]", pattern):
        return math.inf  # a repeated group, a look-around, a reference
    repeats, options = len(re.findall(r"[*+{]", bare)), len(re.findall(r"(?<!\()\?", bare))
    groups = bare.count("(") or 1
    exponent = 6 * (repeats + 1) + options + groups * math.log2(bare.count("|") / groups + 1)  # 64 = 2⁶
    return math.inf if exponent > 60 else 2.0**exponent  # far beyond the bound; 2.0**1024 would raise

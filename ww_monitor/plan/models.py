"""The configuration of a language model → its weight matrices, built by transformers on the meta device."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ww_monitor.errors import InvalidArgument, MissingDependency, WWMonitorError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.folders import check_regular
from ww_monitor.walk.sharded import even_shards
from ww_monitor.walk.sources import walk_source
from ww_monitor.walk.torch import walk

Config = Mapping[str, Any]

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
_LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}

BUILT_IN: Mapping[str, Config] = {
    "gpt2": {"model_type": "gpt2"},
    "llama-3-8b": _LLAMA | {"intermediate_size": 14336},
    "llama-3-70b": _LLAMA | _LARGE,
    "moe-128": {"model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 128, "head_dim": 128},
}
"""Configurations by name; the rest is transformers' defaults. `moe-128` is ours (see docs/planning.md)."""

_MOST_LAYERS, _MOST = 2_000, 200_000
"""Several times the layers and the matrices of the largest models that are known; a plan of more would seem to hang."""

_MOST_BYTES = 16 << 20
"""Bytes of a configuration that is read (our choice: what a million names of classes take)."""


def configured(model: str | Path | Config | nn.Module) -> list[Matrix | Skipped]:
    """The weight matrices of a language model as it is configured, in its order; no weight is made or loaded.

    Args:
        model: A name of `BUILT_IN`, a Hugging Face `config.json` or its folder, what stands in one, a module or a state
            dict.

    Raises:
        InvalidArgument: if it is none of these, transformers cannot build it, or it is too large for a plan.
        MissingDependency: without transformers.
    """
    if isinstance(model, nn.Module):
        return list(walk(model, layout=even_shards))
    if isinstance(model, Mapping) and any(isinstance(value, torch.Tensor) for value in model.values()):
        return list(walk_source(model))
    config = dict(model if isinstance(model, Mapping) else BUILT_IN.get(str(model)) or _read(Path(model)))
    words = "layer|depth|block", "expert", "label"
    layers, experts, labels = (max(_counts(config, word), default=1) for word in words)
    # asked before transformers makes a module for each
    if layers > _MOST_LAYERS or max(layers * experts, labels) > _MOST:
        got = f"{layers:,} layers with {experts:,} experts, and {labels:,} labels"
        wanted = f"at most {_MOST_LAYERS:,} layers and {_MOST:,} experts in all, and as many labels"
        raise InvalidArgument(f"plan: expected {wanted}; got {got}")
    items = list(islice(walk(_built(config), layout=even_shards), _MOST + 1))
    if len(items) > _MOST:
        raise InvalidArgument(f"plan: expected a model of at most {_MOST:,} matrices; got more")
    return items


def _counts(config: Config, word: str) -> Iterator[int]:
    """The numbers of layers, experts or labels in a configuration and in those that it holds."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value, word)
        elif re.search(f"({word})s?$", key):
            numbers = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
            yield sum(numbers) if re.match("n_|num|depth", key) else max([*numbers, len(numbers)])  # else places


def _built(config: dict[str, Any]) -> torch.nn.Module:
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError as error:
        raise MissingDependency("plan: needs transformers; pip install 'ww-monitor[huggingface]'") from error
    family = config.pop("model_type", None)
    try:
        made = AutoConfig.for_model(family, **config)
        # private: transformers says nowhere else which configurations have a language model with a head
        auto = AutoModelForCausalLM if type(made) in AutoModelForCausalLM._model_mapping else AutoModel
        with torch.device("meta"):
            model: torch.nn.Module = auto.from_config(made)  # type: ignore[no-untyped-call]
    except Exception as error:
        what = f"model_type={family!r}: {error}; of another model give plan_ranks what a walker yields"
        raise InvalidArgument(f"plan: transformers must be able to build the configuration; got {what}") from error
    return model


def _read(path: Path) -> Config:
    try:
        file = check_regular(path / "config.json" if path.is_dir() else path)
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError, WWMonitorError) as error:
        got = f"{str(path)!r} ({type(error).__name__})"
        choices = ", ".join(map(repr, BUILT_IN))
        raise InvalidArgument(
            f"plan: model must be a config.json, its folder, or one of {choices}; got {got}"
        ) from error

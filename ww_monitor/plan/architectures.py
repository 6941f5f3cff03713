"""The configuration of a language model → its weight matrices, by shape alone.

Names, shapes and order are those that the PyTorch walker yields of the model that `transformers` builds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ww_monitor.errors import InvalidArgument, WWMonitorError
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix
from ww_monitor.walk.roles import infer_role

Config = Mapping[str, Any]

BUILT_IN: Mapping[str, Config] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024},
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "moe-128": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
"""Configurations by name. `moe-128` is ours: 48 blocks of width 2048, 128 experts of width 768 in each, 32 query and 4
key heads of 128, 151,936 tokens; 30 G weights."""

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
"""Values of `model_type` that are known."""

_HEAD_DIM = {"qwen3": 128}
"""Where it is not hidden_size / num_attention_heads if the configuration leaves it out."""


@dataclass(frozen=True)
class Laid:
    """A matrix, and how it lies in the tensor that is stored.

    Attributes:
        matrix: Its name and shape; it has no weights.
        stack: Its place and their number, where the tensor is a stack of matrices (experts); else `None`.
    """

    matrix: Matrix
    stack: tuple[int, int] | None = None


def architecture(model: str | Path | Config) -> list[Laid]:
    """The weight matrices of a configured language model, in the order of the model; nothing is built or loaded.

    Args:
        model: A name of `BUILT_IN`, a Hugging Face `config.json` or its folder, or what stands in one.

    Raises:
        InvalidArgument: if it is none of these, of an unknown family, or lacks a number.

    >>> [laid.matrix.shape for laid in architecture("gpt2")[:3]], len(architecture("gpt2"))
    ([(1, 50257, 768), (1, 1024, 768), (1, 768, 768)], 74)
    """
    config = _Config(model if isinstance(model, Mapping) else _read(model))
    family = config.values.get("model_type")
    if family not in FAMILIES:
        raise InvalidArgument(
            f"plan: model_type must be one of {', '.join(map(repr, FAMILIES))}; got {family!r}; "
            "for another give plan_ranks what a walker yields of the model"
        )
    return list(_gpt2(config) if family == "gpt2" else _decoder(config, family))


def _read(model: str | Path) -> Config:
    if str(model) in BUILT_IN:
        return BUILT_IN[str(model)]
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"plan: model must be a config.json, its folder, or one of {', '.join(map(repr, BUILT_IN))}; "
            f"got {str(model)!r} ({type(error).__name__})"
        ) from error
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"plan: {path.name} must hold an object; got {type(values).__name__}")
    return values


@dataclass(frozen=True)
class _Config:
    """Numbers of a configuration by name."""

    values: Config

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of the names that is there."""
        value = next((found for name in names if (found := self.values.get(name)) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument(f"plan: {names[0]} of the configuration must be an integer >= 1; got {value!r}")
        return value

    def tied(self, *, default: bool) -> bool:
        """Whether the head is the embedding."""
        return bool(self.values.get("tie_word_embeddings", default))


def _dense(name: str, rows: int, columns: int) -> Laid:
    return Laid(Matrix(name, Kind.DENSE, (1, rows, columns), _nothing, infer_role(name, Kind.DENSE)))


def _table(name: str, rows: int, columns: int) -> Laid:
    return Laid(Matrix(name, Kind.EMBEDDING, (1, rows, columns), _nothing, infer_role(name, Kind.EMBEDDING)))


def _nothing() -> torch.Tensor:
    raise WWMonitorError("a matrix of a plan has no weights")


# --- GPT-2: kernels are stored [inputs, outputs]


def _gpt2(config: _Config) -> Iterator[Laid]:
    width, blocks = config.size("n_embd", "hidden_size"), config.size("n_layer", "num_hidden_layers")
    inner, tokens = config.size("n_inner", default=4 * width), config.size("vocab_size")
    yield _table("transformer.wte", tokens, width)
    yield _table("transformer.wpe", config.size("n_positions", "n_ctx", default=1024), width)
    for block in range(blocks):
        here = f"transformer.h.{block}"
        for part in "qkv":
            yield Laid(Matrix(f"{here}.attn.c_attn.{part}", Kind.DENSE, (1, width, width), _nothing, part))
        yield _dense(f"{here}.attn.c_proj", width, width)
        yield _dense(f"{here}.mlp.c_fc", width, inner)
        yield _dense(f"{here}.mlp.c_proj", inner, width)
    if not config.tied(default=True):
        yield _dense("lm_head", tokens, width)


# --- Llama and its like: kernels are stored [outputs, inputs]


def _decoder(config: _Config, family: str) -> Iterator[Laid]:
    width, tokens = config.size("hidden_size"), config.size("vocab_size")
    yield _table("model.embed_tokens", tokens, width)
    for block in range(config.size("num_hidden_layers")):
        here = f"model.layers.{block}"
        yield from _attention(config, f"{here}.self_attn", family)
        if _has_experts(config, family, block):
            yield from _mixture(config, f"{here}.mlp", family)
        else:
            yield from _feed_forward(f"{here}.mlp", config.size("intermediate_size"), width)
    if not config.tied(default=False):
        yield _dense("lm_head", tokens, width)


def _attention(config: _Config, here: str, family: str) -> Iterator[Laid]:
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head = config.size("head_dim", default=_HEAD_DIM.get(family, width // heads))
    queries, keys = heads * head, config.size("num_key_value_heads", default=heads) * head
    yield _dense(f"{here}.q_proj", queries, width)
    yield _dense(f"{here}.k_proj", keys, width)
    yield _dense(f"{here}.v_proj", keys, width)
    yield _dense(f"{here}.o_proj", width, queries)


def _feed_forward(here: str, inner: int, width: int) -> Iterator[Laid]:
    yield _dense(f"{here}.gate_proj", inner, width)
    yield _dense(f"{here}.up_proj", inner, width)
    yield _dense(f"{here}.down_proj", width, inner)


def _has_experts(config: _Config, family: str, block: int) -> bool:
    if family == "mixtral":
        return True
    if not family.endswith("_moe") or block in (config.values.get("mlp_only_layers") or ()):
        return False
    return (block + 1) % config.size("decoder_sparse_step", default=1) == 0


def _mixture(config: _Config, here: str, family: str) -> Iterator[Laid]:
    """The router and the experts, which are stored as two stacks."""
    width, experts = config.size("hidden_size"), config.size("num_local_experts", "num_experts")
    inner = config.size("intermediate_size" if family == "mixtral" else "moe_intermediate_size")
    router = [_dense(f"{here}.gate", experts, width)]
    stacks = [
        *_stack(f"{here}.experts.gate_up_proj.gate", "gate", experts, (1, inner, width)),
        *_stack(f"{here}.experts.gate_up_proj.up", "up", experts, (1, inner, width)),
        *_stack(f"{here}.experts.down_proj", "down", experts, (1, width, inner)),
    ]
    yield from (*stacks, *router) if family == "qwen3_moe" else (*router, *stacks)
    if family == "qwen2_moe":
        yield from _feed_forward(f"{here}.shared_expert", config.size("shared_expert_intermediate_size"), width)
        yield _dense(f"{here}.shared_expert_gate", 1, width)


def _stack(name: str, role: str, experts: int, shape: tuple[int, int, int]) -> Iterator[Laid]:
    for place in range(experts):
        yield Laid(Matrix(f"{name}.{place}", Kind.DENSE, shape, _nothing, role), (place, experts))

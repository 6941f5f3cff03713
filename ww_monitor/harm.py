"""Is a trap harmful? The outputs of a model with the entries of its traps cut down, beside its own."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix
from ww_monitor.record import Snapshot, TrapEntry
from ww_monitor.spectra.elements import elements
from ww_monitor.walk.sources import walk_source

LEAST_TRAPS = 0.5
"""Traps a shuffle from which on a layer has one, as for the rule `trap`."""

MEAN, STD = 0.06, 0.2
"""Mean and deviation of Gaussian inputs. Our choice, for nets on numbers from 0 to 1: inputs of mean 0 leave all units
of the three collapsed nets of `trap_harm` silent, whatever their deviation, and would call their traps harmless. Both
were chosen on those four nets."""

SIZES = (32, 28, 64, 224, 299, 16, 8)
"""Sides of an image that are tried, in this order, where the model does not say."""

Inputs = Any
"""A tensor or an array, a mapping (passed by name), or a sequence of arguments."""

Run = Callable[[Inputs], Any]


@dataclass(frozen=True)
class TrapHarm:
    """How much the outputs change without the large entries of the traps; near 0 they are benign.

    Attributes:
        divergence: With those of all layers cut down, 0 where there is no trap, NaN where none could be cut down;
            `float` of this object is it.
        layers: Name → with those of this layer alone cut down.
        skipped: Name → why a layer with a trap was left as it is.
    """

    divergence: float
    layers: Mapping[str, float]
    skipped: Mapping[str, str]

    def __float__(self) -> float:
        return self.divergence


def trap_harm(model: Any, snapshot: Snapshot, inputs: Inputs = None, *, samples: int = 1000, seed: int = 0) -> TrapHarm:
    """Mean over inputs of JS(softmax f(x), softmax f′(x)), f′ with the trap entries brought back to the threshold.

    JS is the Jensen–Shannon divergence in nats, 0 to ln 2; the entries are those that the snapshot names
    (`Layer.trap_entries`, at most eight a layer), the threshold is mean ± σ(NM)^¼. Idea: Prakash & Martin 2026 (arXiv
    2605.12394, §6), who replace the trap's direction by a random one. On four nets of anti-grokking and Gaussian
    inputs it is 0.0013 to 0.0029, by seed, for the three that collapsed and 0.0002 for the one that did not. It depends
    on the inputs (0.002 to 0.005 and 0.0005 with mean 0.1 and deviation 0.3): compare models on the same ones, and give
    real ones where you can.

    Everything is done in a copy of the model, in evaluation mode, without its hooks; of a Keras model in a stateless
    scope. Model, buffers, hooks, training flag and random state stay as they are. One copy of the weights and two runs
    of the model a trapped layer are what it costs.

    Args:
        model: A torch module or a Keras model that gives logits, probabilities, or an object with `logits`; the classes
            lie along the last axis, of images along that of the channels, and `[samples]` is one output a sample.
        snapshot: Of this model, from `ww_monitor.analyze` or a monitor.
        inputs: A batch: a tensor, a mapping passed by name, or a tuple of arguments. `None` draws Gaussian numbers, or
            random tokens where the model begins with an embedding.
        samples: How many of those to draw; an eighth of it images or texts of up to 32 tokens.
        seed: Seed of the private generator that draws.

    Raises:
        InvalidArgument: if the model is none of these, is spread over ranks, has no layer of a trap's name, or no
            inputs can be found for it.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    >>> with torch.no_grad():
    ...     net[0].weight[3, 4] = 5.0
    >>> import ww_monitor
    >>> harm = trap_harm(net, ww_monitor.analyze(net))
    >>> list(harm.layers), 0 < float(harm) < 0.1
    (['0'], True)
    """
    traps = {
        layer.name: layer.trap_entries
        for layer in snapshot.layers
        if layer.trap_entries and layer.value("num_traps") >= LEAST_TRAPS
    }
    if not traps:
        return TrapHarm(0.0, MappingProxyType({}), MappingProxyType({}))
    with _own_random_state(model), torch.no_grad(), _copied(model) as (double, run):
        matrices = {item.name: item for item in walk_source(double) if isinstance(item, Matrix)}
        unknown = sorted(traps.keys() - matrices.keys())
        if unknown:
            raise InvalidArgument(f"trap_harm: snapshot has traps in layers that the model lacks; got {unknown}")
        given, own = _given(inputs, double, run, samples, seed)
        layers: dict[str, float] = {}
        skipped: dict[str, str] = {}
        for name, entries in traps.items():
            try:
                restore, check = _cut_down(matrices[name], entries)
                found = divergence(own, _logits(run(given)))
                check()
            except Exception as error:  # noqa: BLE001 - a weight that is computed from others costs its own value
                skipped[name] = str(error)
                continue
            layers[name] = found
            restore()
        for name in layers:
            _cut_down(matrices[name], traps[name])
        total = divergence(own, _logits(run(given))) if layers else math.nan
    return TrapHarm(total, MappingProxyType(layers), MappingProxyType(skipped))


def divergence(first: Tensor, second: Tensor) -> float:
    """Mean of ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2, p and q the softmax of two outputs `[…, C]`, float64, nats.

    What is a distribution already stays as it is. One output a sample is the logit of two classes, or the probability
    of one where all lie between 0 and 1. Outputs that are not finite make it NaN: not known.

    >>> round(divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])), 6)
    0.693147
    """
    rounding = 1e-3 + torch.finfo(first.dtype).eps  # shares in half precision add up to 1 only to their rounding
    values = [one.detach().double().cpu() for one in (first, second)]
    values = [one[:, None] if one.ndim == 1 else one for one in values]
    done = all(bool((one >= 0).all()) and bool(((one.sum(-1) - 1).abs() < rounding).all()) for one in values)
    if values[0].shape[-1] == 1:
        done = all(bool(((one >= 0) & (one <= 1)).all()) for one in values)
        values = [torch.cat([1 - one if done else torch.zeros_like(one), one], -1) for one in values]
    p, q = values if done else [torch.softmax(one, -1) for one in values]
    middle = (p + q) / 2
    middle = middle.clamp(min=torch.finfo(middle.dtype).tiny)  # both are 0 there
    each = [torch.special.xlogy(one, one / middle).sum(-1) for one in (p, q)]
    return float((each[0] + each[1]).mean() / 2)


def _cut_down(matrix: Matrix, entries: Sequence[TrapEntry]) -> tuple[Callable[[], object], Callable[[], None]]:
    """Bring entries back to mean ± σ(NM)^¼ of their slice, in place; what undoes it, and a check that it holds.

    The check raises a `ValueError` where the weight is computed anew, here or in a forward.
    """
    if matrix.shards is not None:
        raise InvalidArgument(f"trap_harm: expected a whole model, got layer {matrix.name!r} spread over ranks")
    weights = matrix.load()
    places = [(entry.slice, entry.row, entry.column) for entry in entries]
    at = torch.tensor(places, dtype=torch.int64, device=weights.device).unbind(1)
    slices = sorted({entry.slice for entry in entries})
    stats, reach = elements([weights[one] for one in slices]), weights[0].numel() ** 0.25
    place = [slices.index(entry.slice) for entry in entries]
    before, mean = weights[at].clone(), stats.mean[place].to(weights.device)
    limit = (stats.std[place] * reach).to(weights.device)
    weights[at] = cut = torch.clamp(before.double(), mean - limit, mean + limit).to(weights.dtype)

    def check() -> None:
        if not torch.equal(matrix.load()[at], cut):
            raise ValueError("its weight is computed from others (an adapter, a parametrization): no entry can be set")

    check()
    return lambda: weights.index_put_(at, before), check


# --- the copy


@contextmanager
def _copied(model: Any) -> Iterator[tuple[Any, Run]]:
    """What may be changed in place of the model, and a function that runs it."""
    keras = sys.modules.get("keras")  # whoever has a Keras model has imported it
    if keras is not None and isinstance(model, keras.layers.Layer):
        from ww_monitor.walk.keras import to_torch

        def own(variable: Any) -> Any:
            value = to_torch(variable.value).clone()
            if keras.backend.backend() == "torch":
                return value
            value = value.float() if value.dtype == torch.bfloat16 else value  # which numpy lacks
            return keras.ops.convert_to_tensor(value.cpu().numpy(), dtype=variable.dtype)

        with keras.StatelessScope(state_mapping=[(variable, own(variable)) for variable in model.variables]):
            last = keras.config.image_data_format() == "channels_last"

            def read(output: Any) -> Tensor:
                tensor = to_torch(output)
                return tensor.movedim(-1, 1) if last and tensor.ndim > 3 else tensor

            def run(given: Inputs) -> Any:
                return keras.tree.map_structure(read, model(given, training=False))

            yield model, run
    elif isinstance(model, nn.Module):
        while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
            # torch.compile's wrapper has no public name for what it wraps
            model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        double = _without_hooks(model)
        yield double, lambda given: _call(double, given)
    else:
        raise InvalidArgument(f"trap_harm: model must be a torch module or a Keras model; got {type(model).__name__}")


def _without_hooks(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode: what a user's hooks do is not to be done twice.

    Torch's own stay, of pruning and of norms of the older kind, without which a layer has no weight.
    """
    try:
        double = copy.deepcopy(model).eval()
    except Exception as error:
        raise InvalidArgument(f"trap_harm: expected a module that copy.deepcopy copies, got {error}") from error
    for module in double.modules():
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            hooks = getattr(module, f"_{kind}_hooks")
            for number in [at for at, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils.")]:
                del hooks[number]
    return double


def _call(model: nn.Module, given: Inputs) -> Any:
    """Run on a copy of the inputs, so that a layer in place changes none."""
    device = next((one.device for one in model.parameters()), torch.device("cpu"))

    def own(value: Any) -> Any:
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value

    with _same_random_numbers(model):
        if isinstance(given, Mapping):
            return model(**{name: own(value) for name, value in given.items()})
        return model(*map(own, given)) if isinstance(given, (tuple, list)) else model(own(given))


def _same_random_numbers(model: Any) -> Any:
    tensors = model.parameters() if isinstance(model, nn.Module) else ()
    devices = sorted({one.device.index for one in tensors if one.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)  # which are named, or it would start CUDA on all there are


@contextmanager
def _own_random_state(model: Any) -> Iterator[None]:
    """Leave every global stream where it is, whatever a forward draws."""
    python, numpy = random.getstate(), np.random.get_state()  # a forward may draw from any of the three
    try:
        with _same_random_numbers(model):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _logits(output: Any) -> Tensor:
    """The first tensor of an output that has a number a sample, its `logits` before others, classes last."""
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else tuple(output.values())
    if isinstance(output, (tuple, list)):
        inner = (one for one in output if not isinstance(one, Tensor) or one.ndim)  # a loss may stand before them
        return _logits(next(inner, None))
    if not isinstance(output, Tensor) or not output.ndim or not output.is_floating_point():
        got = f"{output.dtype} of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InvalidArgument(f"trap_harm: the model must give a tensor of numbers a sample; got {got}")
    return output.movedim(1, -1) if output.ndim > 3 else output


# --- inputs


def _given(inputs: Inputs, model: Any, run: Run, samples: int, seed: int) -> tuple[Inputs, Tensor]:
    """The inputs and what the model makes of them: those of the caller, or the first guess that it takes."""
    if inputs is not None:
        return inputs, _logits(run(inputs))
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for guess in _guesses(model, samples, generator):
        try:
            return guess, _logits(run(guess))
        except InvalidArgument:
            raise
        except Exception:  # noqa: BLE001 - a shape that the model does not take
            continue
    raise InvalidArgument("trap_harm: inputs must be given: the model takes none of those that were tried; got None")


def _guesses(model: Any, samples: int, generator: torch.Generator) -> Iterator[Inputs]:
    """Inputs that a model may take, by what it begins with."""
    few = max(1, samples // 8)

    def normal(*shape: int) -> Tensor:
        return MEAN + STD * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def tokens(size: int, length: int) -> Tensor:
        return torch.randint(0, size, (few, length), generator=generator, dtype=torch.int64, device="cpu")

    if not isinstance(model, nn.Module) or "keras" in {base.__module__.split(".")[0] for base in type(model).__mro__}:
        shape = getattr(model, "input_shape", None)
        if isinstance(shape, tuple) and not isinstance(next(iter(shape), None), tuple):
            sizes = [getattr(layer, "input_dim", None) for layer in model.layers if layer.weights][:1]
            sides = [32 if side is None else side for side in shape[1:]]
            count = samples if len(sides) == 1 else few
            yield np.asarray(tokens(sizes[0], sides[0]) if sizes and sizes[0] else normal(count, *sides))
        return
    config = getattr(model, "config", None)
    vocabulary, longest = getattr(config, "vocab_size", 0), getattr(config, "max_position_embeddings", None)
    if vocabulary:
        yield {"input_ids": tokens(vocabulary, min(32, longest or 32))}
    first: Any = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if isinstance(first, (nn.Embedding, nn.EmbeddingBag)):
        yield from (tokens(first.num_embeddings, length) for length in (32, 16, 8, 4, 1))
    elif (channels := getattr(first, "in_channels", None)) is not None and hasattr(first, "kernel_size"):
        for side in SIZES:
            yield normal(few, channels, *[side] * len(first.kernel_size)).to(dtype)
    elif (width := getattr(first, "in_features", getattr(first, "input_size", None))) is not None:
        yield normal(samples, width).to(dtype)
        yield normal(few, 16, width).to(dtype)

"""A Keras 3 model on any backend → its weight matrices, read in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from ww_monitor.errors import MissingDependency, WWMonitorError
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import names
from ww_monitor.walk.parts import (
    WHOLE,
    Part,
    Split,
    blocks,
    check_split,
    flat,
    matrix,
    resolved,
    split_parts,
    unfit,
    unique,
)
from ww_monitor.walk.reading import tied_to
from ww_monitor.walk.roles import infer_role

_PLAIN = ("kernel", "embeddings")  # what a name does not end with, where the layer has one weight
_OF_ATTENTION = {  # name of a layer inside an attention layer → kind and role
    "query": (Kind.ATTENTION, "q"),
    "key": (Kind.ATTENTION, "k"),
    "value": (Kind.ATTENTION, "v"),
    "attention_output": (Kind.DENSE, "o"),
}


def load_keras_file(path: str | Path) -> Any:
    """The Keras model in a `.keras` or a legacy `.h5` file, not compiled, with Keras' safe mode left on.

    Args:
        path: The file, written by `model.save`.

    Returns:
        The model, on the backend Keras is set to.

    Raises:
        MissingDependency: if keras, or the backend it is set to, is not installed.
        WWMonitorError: if Keras cannot read the file, with its reason.
    """
    path = Path(path)
    try:
        import keras
    except ImportError as error:
        if error.name == "keras":
            wanted = "needs keras; install `ww-monitor[keras]`"
        else:
            wanted = f"needs a backend of keras ({error}); set the environment variable KERAS_BACKEND=torch"
        raise MissingDependency(f"walk_files: reading {path.name} {wanted}") from error
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # what a damaged or refused file raises is as varied as what it holds
        reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
        raise WWMonitorError(
            f"walk_files: expected a model written by `model.save` in {path}; Keras could not load it: {reason}"
        ) from error


def walk_keras(model: Any, *, split: Split | None = None) -> Iterator[Matrix | Skipped]:
    """The weight matrices of a Keras model in layer order, and what was left out with the reason.

    Matrices are (inputs, outputs), as Keras stores them. A convolution kernel `[*k, a, b]` gives prod(k) slices a × b;
    a depthwise kernel has the depth multiplier for b. The kernels of a recurrent cell are cut into gates (LSTM i, f,
    c, o; GRU z, r, h). An `EinsumDense` kernel is flattened to all its summed axes × all its new axes, so an
    attention's query is D × H·K. A layer with LoRA gives the merged weight it computes with. Biases are not listed.

    Args:
        model: A Keras 3 model or layer; nested and subclassed models and wrapped layers come with it.
        split: As for `ww_monitor.walk.torch.walk`, for the kernels of `Dense`.

    Returns:
        A `Matrix` for every weight, named by the layers around it, without the root and a plain `kernel` or
        `embeddings`; what a layer of an unknown class trains is read by name and shape. A `Skipped` for every other
        variable of two or more dimensions, for quantized kernels and for
        layers that are not built. Numbers are read, without a copy, when `Matrix.load` is called.

    Raises:
        InvalidArgument: if `split` is malformed.
    """
    check_split("walk_keras", split)
    return unique(item for item, _ in _found(model, split))


@dataclass(frozen=True)
class Holder:
    """A variable that holds matrices of these names; under LoRA it is not trained, though its layer is not frozen."""

    variable: Any
    names: Sequence[str]
    trained: bool
    frozen: bool


def holders(model: Any, *, split: Split | None = None) -> list[Holder]:
    """The variables that hold the matrices of a Keras model; `split` as for `walk_keras`."""
    trained, held = {id(variable) for variable in model.trainable_variables}, dict[int, list[tuple[Matrix, Any]]]()
    found = list(_found(model, split))
    for item, (_, variable) in zip(unique(item for item, _ in found), found, strict=True):
        if isinstance(item, Matrix):
            held.setdefault(id(variable), []).append((item, variable))
    return [
        Holder(parts[0][1], [item.name for item, _ in parts], key in trained, parts[0][0].frozen)
        for key, parts in held.items()
    ]


# --- which variables of a layer are weights


@dataclass(frozen=True)
class _Layout:
    """What layers of some classes hold.

    Attributes:
        classes: Names of the Keras classes that have this layout.
        kind: The kind of their matrices.
        attributes: Where they have their weights.
        gates: What a recurrent kernel is cut into along its columns, one letter a gate; `""` leaves it whole.
    """

    classes: tuple[type, ...]
    kind: Kind
    attributes: tuple[str, ...] = ("kernel",)
    gates: str = ""


def _layouts() -> tuple[_Layout, ...]:
    from keras import layers as k

    convolutions = (k.Conv1D, k.Conv2D, k.Conv3D, k.Conv1DTranspose, k.Conv2DTranspose, k.Conv3DTranspose)
    return (
        _Layout((k.Dense, k.EinsumDense), Kind.DENSE),
        _Layout((k.Embedding,), Kind.EMBEDDING, ("embeddings", "reverse_embeddings")),
        _Layout((*convolutions, k.DepthwiseConv1D, k.DepthwiseConv2D), Kind.CONV),
        _Layout((k.SeparableConv1D, k.SeparableConv2D), Kind.CONV, ("depthwise_kernel", "pointwise_kernel")),
        _Layout((k.LSTMCell,), Kind.RECURRENT, ("kernel", "recurrent_kernel"), "ifco"),
        _Layout((k.GRUCell,), Kind.RECURRENT, ("kernel", "recurrent_kernel"), "zrh"),
        _Layout((k.SimpleRNNCell,), Kind.RECURRENT, ("kernel", "recurrent_kernel")),
    )


def _nested(layer: Any, path: str, seen: set[int]) -> Iterator[tuple[Any, str]]:
    """A layer and all inside it, each once, with the names of the layers around it.

    Not the paths of the variables: these depend on where a layer was built, and change when a model is loaded.
    """
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer, path or layer.name
    # private: only models have the public `layers`, and a wrapped layer is in no model's
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        yield from _nested(inner, f"{path}.{inner.name}".lstrip("."), seen)


def _layers(model: Any) -> Iterator[tuple[Any, _Layout, str]]:
    """Every layer of a known class, once, in the order of the model's weights; those that are not built come last."""
    layouts = _layouts()
    # by id: variables compare element by element
    places = {id(variable): place for place, variable in enumerate(model.weights)}

    def place(found: tuple[Any, str]) -> int:
        return min((places[id(variable)] for variable in found[0].weights), default=len(places))

    for layer, path in sorted(_nested(model, "", set()), key=place):
        layout = next((layout for layout in layouts if isinstance(layer, layout.classes)), None)
        if layout is not None:
            yield layer, layout, path


def _inside_attention(model: Any) -> dict[int, tuple[Kind, str]]:
    """Kind and role of the projections of attention layers, by identity."""
    from keras import layers as k

    return {
        id(inner): _OF_ATTENTION[inner.name]
        for layer in model._flatten_layers()
        if isinstance(layer, (k.MultiHeadAttention, k.GroupQueryAttention))
        for inner in layer._flatten_layers(include_self=False)
        if inner.name in _OF_ATTENTION
    }


# --- from layers to items, each with the variable that holds it


def _found(model: Any, split: Split | None) -> Iterator[tuple[Matrix | Skipped, Any]]:
    split = resolved(split, [path for *_, path in _layers(model)]) if split else None
    return chain(_known(model, split), _others(model))


def _known(model: Any, split: Split | None) -> Iterator[tuple[Matrix | Skipped, Any]]:
    """The weights of the layers of known classes."""
    attentions = _inside_attention(model)
    seen: dict[int, str] = {}
    for layer, layout, path in _layers(model):
        kind, role = attentions.get(id(layer), (layout.kind, None))
        variables = {variable.name: variable for variable in layer.weights}
        mode = getattr(layer, "quantization_mode", None)
        if layout.attributes[0] not in variables:
            reason = f"quantized to {mode}" if layer.built else "not built: no weights before the first call"
            yield Skipped(path, kind, (), reason), None
            continue
        for attribute in filter(variables.__contains__, layout.attributes):
            variable = variables[attribute]
            plain = attribute in _PLAIN and layout.kind is not Kind.RECURRENT
            name, shape = path if plain else f"{path}.{attribute}", tuple(variable.shape)
            parts = _parts(layer, layout, name, shape, split)
            reason = _defect(variable, mode, kind, parts) or tied_to(seen.get(id(variable)))
            if reason:
                yield Skipped(name, kind, shape, reason), variable
                continue
            seen[id(variable)] = name
            of_name = infer_role(name, kind) if role is None else role
            load, frozen = partial(_read, layer, attribute), not layer.trainable_weights
            inputs_first = "Transpose" not in type(layer).__name__  # whose kernels are [*k, outputs, inputs]
            depthwise = "depthwise" in attribute or "Depthwise" in type(layer).__name__  # [*k, channels, multiplier]
            groups = (shape[-2], 1) if depthwise else (1, getattr(layer, "groups", 1) if kind is Kind.CONV else 1)
            for part in parts:
                item = matrix(name, kind, part, shape, load, of_name)
                yield replace(item, frozen=frozen, inputs_first=inputs_first, groups=groups), variable


def _others(model: Any) -> Iterator[tuple[Matrix | Skipped, Any]]:
    """The variables of two or more dimensions, but for biases, that belong to no layer of a known class."""
    seen = {id(variable) for layer, *_ in _layers(model) for variable in layer.weights}
    for layer, path in _nested(model, "", set()):
        # private: freezing a layer makes its public lists say that it has no trainable variables
        for variable in [*layer._trainable_variables, *layer._non_trainable_variables]:
            if id(variable) in seen or len(variable.shape) < 2 or variable.name == "bias":
                continue
            seen.add(id(variable))
            learns = any(variable is own for own in layer._trainable_variables)
            reason = "" if learns else names.BUFFER
            if type(layer).__name__.endswith("Normalization") and learns:
                reason = f"parameters of {type(layer).__name__} are not a known weight"
            yield _by_name(variable, path, reason), variable


def _by_name(variable: Any, path: str, reason: str) -> Matrix | Skipped:
    """What the rules by name and shape make of a variable, with kernels as Keras stores them."""
    name = path if variable.name in _PLAIN else f"{path}.{variable.name}"
    if variable.name != "kernel" and names.no_weight(path) == names.POSITIONS:
        reason = reason or names.POSITIONS
    shape, dtype = tuple(variable.shape), getattr(torch, variable.dtype)
    found = names.read_shape(shape)
    long = len(shape) > 3 and max(shape[:-2]) <= names.LARGEST_KERNEL
    kernel = found.kernel or long
    part = Part("", partial(torch.flatten, end_dim=-3)) if kernel else (found.parts or WHOLE)[0]
    reason = reason or names.no_weight(variable.name) or ("" if long else found.reason)
    reason = reason or unfit(dtype, shape, Kind.PARAMETER)
    if reason:
        return Skipped(name, Kind.OTHER, shape, reason)
    role = infer_role(name, Kind.CONV if kernel else Kind.PARAMETER)
    item = matrix(name, Kind.PARAMETER, part, shape, partial(_value, variable), role)
    return replace(item, frozen=not variable.trainable, inputs_first=True)


def _value(variable: Any) -> Tensor:
    return to_torch(variable.value)


def _defect(variable: Any, mode: str | None, kind: Kind, parts: Sequence[Part]) -> str:
    """Why a variable has no spectrum, or `""`; a float8 layer keeps its kernel in floating point."""
    if mode not in (None, "float8"):
        return f"quantized to {mode}"
    if not parts:
        return "its equation does not make it a matrix from summed to new axes"
    shape = variable.shape if kind is Kind.CONV else parts[0].shape(variable.shape)[1:]
    return unfit(getattr(torch, variable.dtype), shape, kind)


# --- layouts


def _parts(layer: Any, layout: _Layout, name: str, shape: Sequence[int], split: Split | None) -> Sequence[Part]:
    """What a weight is cut into; nothing where it is no matrix."""
    equation = getattr(layer, "equation", None)
    if layout.kind is Kind.CONV:
        return (Part("", partial(torch.flatten, end_dim=-3)),)  # [*k, a, b] → [prod(k), a, b]
    if layout.gates:
        return blocks(layout.gates, (layer.units,) * len(layout.gates), axis=1)
    if equation is not None:
        rows = _summed_axes(equation)
        return (Part("", partial(flat, axes=rows)),) if rows else ()
    return (split_parts(split, name, shape, 1) if layout.kind is Kind.DENSE else ()) or WHOLE


def _summed_axes(equation: str) -> int:
    """How many leading axes of the kernel make one side of its matrix; 0 if the sides are mixed or an axis is neither.

    >>> [_summed_axes(e) for e in ("abc,cde->abde", "abcd,cde->abe", "...x,xy->...y", "ebc,ecd->ebd", "abc,bc->abc")]
    [1, 2, 1, 0, 0]
    """
    left, _, output = equation.replace(".", "").replace(" ", "").partition("->")
    inputs, _, kernel = left.partition(",")
    # b: a batch axis, in both; i: summed; o: new
    sides = "".join("b" if axis in inputs and axis in output else "i" if axis in inputs else "o" for axis in kernel)
    first = sides.count(sides[0])
    mixed = "b" in sides or first == len(sides) or len(set(sides[:first])) > 1
    return 0 if mixed else first


# --- numbers


def _read(layer: Any, attribute: str) -> Tensor:
    """The weight a layer computes with now: a variable's value, or the tensor that LoRA makes of it."""
    weight = getattr(layer, attribute)  # with LoRA a property that adds the factors, and so no variable
    return to_torch(getattr(weight, "value", weight))


def to_torch(value: Any) -> Tensor:
    """A tensor of any backend as a torch tensor on the same memory; one that JAX has on several devices is gathered."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value).__module__.startswith("tensorflow"):
        tensorflow: Any = sys.modules["tensorflow"]
        value = tensorflow.experimental.dlpack.to_dlpack(tensorflow.convert_to_tensor(value))
    elif len(getattr(value, "devices", set)()) > 1:
        value = sys.modules["jax"].device_put(value, min(value.devices(), key=lambda device: device.id))
    tensor: Tensor = torch.utils.dlpack.from_dlpack(value)
    return tensor

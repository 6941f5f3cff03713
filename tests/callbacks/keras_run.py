"""The same layers and the same training on the backend that KERAS_BACKEND names: writes what came out as JSON."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import sys
import warnings
from pathlib import Path

if os.environ["KERAS_BACKEND"] != "tensorflow":
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # nothing here needs it

import keras
import keras_acting
import numpy as np
import torch

from ww_monitor import History, SpectralWarning, analyze
from ww_monitor.callbacks.keras import SpectralMonitor
from ww_monitor.matrix import Matrix
from ww_monitor.sinks.tensorboard import TensorBoard
from ww_monitor.walk.keras import walk_keras

k = keras.layers
BACKEND = keras.backend.backend()


class Block(keras.Model):
    """A subclassed model that holds another one."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.parts = [k.Dense(16, name="up"), keras.Sequential([k.Dense(16, name="down")], name="inner")]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


LAYERS = {  # name → layer, shapes of its inputs
    "dense": (lambda name: k.Dense(20, name=name), (24,)),
    "einsum": (lambda name: k.EinsumDense("abc,cde->abde", (None, 4, 8), name=name), (5, 24)),
    "conv1d": (lambda name: k.Conv1D(12, 3, name=name), (9, 10)),
    "conv2d": (lambda name: k.Conv2D(12, 3, name=name), (9, 9, 10)),
    "conv2d_grouped": (lambda name: k.Conv2D(20, 3, groups=2, name=name), (9, 9, 20)),
    "conv3d": (lambda name: k.Conv3D(12, 2, name=name), (5, 5, 5, 10)),
    "up1d": (lambda name: k.Conv1DTranspose(12, 3, name=name), (9, 10)),
    "up2d": (lambda name: k.Conv2DTranspose(12, 3, name=name), (9, 9, 10)),
    "up3d": (lambda name: k.Conv3DTranspose(12, 2, name=name), (5, 5, 5, 10)),
    "depthwise1d": (lambda name: k.DepthwiseConv1D(3, depth_multiplier=9, name=name), (9, 10)),
    "depthwise2d": (lambda name: k.DepthwiseConv2D(3, depth_multiplier=9, name=name), (9, 9, 10)),
    "separable1d": (lambda name: k.SeparableConv1D(12, 3, depth_multiplier=8, name=name), (9, 10)),
    "separable2d": (lambda name: k.SeparableConv2D(12, 3, depth_multiplier=8, name=name), (9, 9, 10)),
    "embedding": (lambda name: k.Embedding(40, 16, name=name), (7,)),
    "reversible": (lambda name: k.ReversibleEmbedding(40, 16, tie_weights=False, name=name), (7,)),
    "attention": (lambda name: k.MultiHeadAttention(2, 8, name=name), ((7, 16), (7, 16))),
    "grouped": (lambda name: k.GroupQueryAttention(8, 4, 2, name=name), ((7, 16), (7, 16))),
    "lstm": (lambda name: k.LSTM(12, name=name), (7, 16)),
    "gru": (lambda name: k.GRU(12, name=name), (7, 16)),
    "both": (lambda name: k.Bidirectional(k.LSTM(12, name="lstm"), name=name), (7, 16)),
    "conv_lstm": (lambda name: k.ConvLSTM1D(4, 3, name=name), (5, 9, 10)),
    "each": (lambda name: k.TimeDistributed(k.Dense(12, name="inner"), name=name), (7, 16)),
    "block": (Block, (16,)),
    "bfloat16": (lambda name: k.Dense(20, dtype="bfloat16", name=name), (24,)),
    "mixed_bfloat16": (lambda name: k.Dense(20, dtype="mixed_bfloat16", name=name), (24,)),
    "float16": (lambda name: k.Dense(20, dtype="float16", name=name), (24,)),
    "lora_dense": (lambda name: k.Dense(20, name=name), (24,)),
    "lora_einsum": (lambda name: k.EinsumDense("abc,cd->abd", (None, 20), name=name), (5, 24)),
    "lora_embedding": (lambda name: k.Embedding(40, 16, name=name), (7,)),
    "lora_conv2d": (lambda name: k.Conv2D(12, 3, name=name), (9, 9, 10)),
    "int8_dense": (lambda name: k.Dense(20, name=name), (24,)),
    "int4_dense": (lambda name: k.Dense(20, name=name), (24,)),
    "int8_einsum": (lambda name: k.EinsumDense("abc,cd->abd", (None, 20), name=name), (5, 24)),
    "int8_embedding": (lambda name: k.Embedding(40, 16, name=name), (7,)),
    "float8_dense": (lambda name: k.Dense(20, name=name), (24,)),
}


def build(name: str):
    """The layer with weights that depend on its name alone; what adapters add is exact in float32."""
    make, shape = LAYERS[name]
    layer = make(name)
    if not isinstance(layer, keras.Model):  # JAX compiles every other initializer anew for every shape
        config = layer.get_config()
        layer = type(layer).from_config({n: "zeros" if n.endswith("initializer") else c for n, c in config.items()})
    shapes = shape if isinstance(shape[0], tuple) else (shape,)
    inputs = [keras.Input(s, dtype="int32" if "embedding" in name or name == "reversible" else None) for s in shapes]
    keras.Model(inputs, layer(*inputs))
    kind = name.partition("_")[0]
    if kind == "lora":
        layer.enable_lora(2, lora_alpha=4, a_initializer="zeros")
    generator = np.random.default_rng(sum(name.encode()))
    for variable in layer.weights:
        if variable.dtype.startswith(("float", "bfloat")):
            values = generator.normal(size=variable.shape) / 4
            variable.assign(np.round(8 * values) / 8 if "lora" in variable.name else values.astype("float32"))
    if kind in ("int8", "int4", "float8"):
        layer.quantize(kind)
    return layer


def zoo() -> dict:
    """Of every layer: its matrices with their numbers and alpha, and what was left out."""
    found = {}
    for name in LAYERS:
        layer = build(name)
        items = list(walk_keras(layer))
        rows = {row.name: row for row in analyze(layer, min_size=4).layers}
        found[name] = {
            "matrices": {item.name: describe(item, rows[item.name]) for item in items if isinstance(item, Matrix)},
            "skipped": {item.name: item.reason for item in items if not isinstance(item, Matrix)},
        }
    return found


def describe(item: Matrix, row) -> dict:
    weights = item.load()
    digest = hashlib.sha256(weights.double().contiguous().numpy().tobytes()).hexdigest()
    return {
        "kind": item.kind,
        "role": item.role,
        "shape": list(weights.shape),
        "listed": list(item.shape),
        "dtype": str(weights.dtype),
        "numbers": digest,
        "status": row.status,
        "alpha": row.metrics["alpha"],
    }


def copies() -> bool:
    """Whether a walked weight lies on the memory of the backend's own array."""
    dense = k.Dense(64, name="d")
    dense.build((None, 64))
    (matrix,) = walk_keras(dense)
    value = dense.kernel.value
    if BACKEND == "jax":
        return matrix.load().data_ptr() != value.unsafe_buffer_pointer()
    if BACKEND == "torch":
        return matrix.load().data_ptr() != value.data_ptr()
    import tensorflow as tf

    return matrix.load().data_ptr() != torch.from_dlpack(tf.experimental.dlpack.to_dlpack(value.value())).data_ptr()


def matches_torch() -> float:
    """How far alpha is from that of a torch layer with the same weights."""
    twin = torch.nn.Linear(96, 64)
    values = np.random.default_rng(3).standard_t(3, size=(96, 64)).astype("float32")
    twin.weight.data = torch.from_numpy(values.T.copy())
    dense = k.Dense(64, name="d")
    dense.build((None, 96))
    dense.kernel.assign(values)
    ours, theirs = (analyze(model).layers[0].metrics["alpha"] for model in (dense, torch.nn.Sequential(twin)))
    return abs(ours - theirs)


def sharded() -> bool:
    """Whether the weights that JAX has spread over two devices are read whole."""
    devices = keras.distribution.list_devices()
    layout = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((2,), ["columns"], devices))
    layout["d/kernel"] = (None, "columns")
    spread = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="columns")
    with spread.scope():
        dense = k.Dense(64, dtype="bfloat16", name="d")
        dense.build((None, 48))
    assert len(dense.kernel.value.sharding.device_set) == 2
    assert not dense.kernel.value.is_fully_replicated
    (matrix,) = walk_keras(dense)
    return bool(np.array_equal(matrix.load()[0].float().numpy(), np.asarray(dense.kernel.value).astype("float32")))


# --- training


def net(**compiled):
    """Weights, dropout and order of the data from one seed."""
    keras.utils.set_random_seed(1)
    layers = [k.Dense(32, "relu", name="in"), k.BatchNormalization(), k.Dropout(0.3), k.Dense(10, name="out")]
    model = keras.Sequential([keras.Input((24,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**{"optimizer": "adam", "loss": loss, **compiled})
    return model


def fit(model, *callbacks, epochs=1, batches=8, **arguments):
    x = np.random.default_rng(0).normal(size=(8 * batches, 24)).astype("float32")
    y = np.arange(8 * batches) % 10
    return model.fit(x, y, batch_size=8, epochs=epochs, callbacks=list(callbacks), verbose=0, **arguments)


def monitor(folder: Path, every_n_steps: int | None = 3, **arguments) -> SpectralMonitor:
    return SpectralMonitor(every_n_steps, folder=folder, console=False, **arguments)


def steps(folder: Path) -> list:
    return [snapshot.step for snapshot in History.read(folder / "ww_history.jsonl")]


def fingerprint(*callbacks) -> dict:
    """All that training leaves: weights, the optimizer, the seeds of dropout, the global streams, the losses."""
    model = net()
    log = fit(model, *callbacks, epochs=2, validation_split=0.25)
    arrays = [keras.ops.convert_to_numpy(v) for v in (*model.variables, *model.optimizer.variables)]
    streams = (np.random.get_state()[1].tobytes(), str(random.getstate()).encode(), torch.get_rng_state().numpy())
    return {
        "weights": hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest(),
        "streams": [hashlib.sha256(bytes(stream)).hexdigest() for stream in streams],
        "losses": [log.history["loss"], log.history["val_loss"]],
    }


def harm(folder: Path) -> dict:
    watched = monitor(folder, 4, track_delta=True, metrics="all")
    found = {"without": fingerprint(), "with": fingerprint(watched)}
    return {**found, "steps": steps(folder), "moved": watched.monitor.history.last.summary["delta_norm"]}


def counted(folder: Path) -> dict:
    """Steps of the snapshots, however the updates are counted."""
    found = {}
    for name, compiled in {
        "accumulating": {"optimizer": keras.optimizers.Adam(gradient_accumulation_steps=4)},
        "scaling_accumulating": {
            "optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(gradient_accumulation_steps=2))
        },
        "several_per_execution": {"steps_per_execution": 4},
    }.items():
        if name == "several_per_execution" and BACKEND == "torch":
            continue  # Keras refuses it there
        fit(net(**compiled), monitor(folder / name, 2), epochs=2)
        found[name] = steps(folder / name)
    return found


def seen(folder: Path) -> dict:
    """What Keras' own callbacks make of the values."""
    watched = monitor(folder, 100, sinks=[TensorBoard(folder / "tb")])
    best = keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras", monitor="ww_alpha", mode="min", verbose=0)
    stopper = keras.callbacks.EarlyStopping(monitor="ww_alpha", mode="min", min_delta=1e6, patience=2)
    folder.mkdir()
    table = keras.callbacks.CSVLogger(str(folder / "log.csv"))
    log = fit(net(), watched, best, stopper, table, epochs=6)
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    alphas = dict(zip(*watched.monitor.history.series("alpha"), strict=True))
    return {
        "epochs": log.epoch,
        "checkpoints": sorted(path.name for path in folder.glob("*.keras")),
        "history": log.history["ww_alpha"],
        "csv": [float(row["ww_alpha"]) for row in rows],
        "alphas": [alphas[8], alphas[16], alphas[24]],
        "scalars": scalars(folder / "tb"),
        "snapshots": [s.scalars()["ww/alpha"] for s in watched.monitor.history],
    }


def scalars(folder: Path) -> list:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("ww/alpha")]


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 4:
            raise KeyboardInterrupt


def interrupted(folder: Path) -> dict:
    """A run that is interrupted after its fifth step, and the one that goes on with the model."""
    model, watched = net(), monitor(folder, 2)
    try:
        fit(model, watched, Interrupt())
    except KeyboardInterrupt:
        before = steps(folder)
    fit(model, watched)
    return {"before": before, "after": steps(folder), "iterations": int(model.optimizer.iterations)}


def main(folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {
            "zoo": zoo(),
            "copies": copies(),
            "torch": matches_torch(),
            "sharded": BACKEND == "jax" and sharded(),
            "harm": harm(folder / "harm"),
            "counted": counted(folder / "counted"),
            "seen": seen(folder / "seen"),
            "interrupted": interrupted(folder / "interrupted"),
            "acting": keras_acting.error(folder / "acting"),
            "late": keras_acting.late(folder / "late"),
        }
    found["warnings"] = [str(w.message) for w in caught if issubclass(w.category, SpectralWarning)]
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

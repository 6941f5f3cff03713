"""Folders that cannot be used, or not always, in three trainers: a run ends with the weights that it would have."""

from __future__ import annotations

import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import Counts
from benchmarks.faults.disk import snapshot, steps
from ww_monitor.callbacks._adapter import Adapter

STEPS = 6
Act = Callable[[Path], object]
FILE = "ww_history.jsonl"


def nothing(folder: Path) -> None:
    """As it is."""


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink() if path.is_file() else path.rmdir()


def gone(folder: Path) -> None:
    empty(folder)
    folder.rmdir()


def torn(folder: Path) -> None:
    folder.mkdir()
    (folder / FILE).write_text(snapshot(3).to_json() + '\n{"sch')


def full(folder: Path) -> None:
    folder.mkdir()
    (folder / FILE).symlink_to("/dev/full")


def blocked(folder: Path) -> None:
    gone(folder)
    folder.write_text("")


def freed(folder: Path) -> None:
    folder.unlink()


def replaced(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


STATES: dict[str, tuple[Act, Act, str]] = {
    "new": (nothing, nothing, ""),
    "there": (Path.mkdir, nothing, ""),
    "deep": (nothing, nothing, "a/b/c"),
    "with a space": (nothing, nothing, "a b ü"),
    "a file": (Path.touch, nothing, ""),
    "below a file": (Path.touch, nothing, "below"),
    "a file that goes away": (Path.touch, freed, ""),
    "a name too long": (nothing, nothing, "x" * 5000),
    "a null byte": (nothing, nothing, "a\0b"),
    "a loop of links": (lambda folder: folder.symlink_to(folder), nothing, ""),
    "a link to nothing": (lambda folder: folder.symlink_to(folder.parent / "no" / "where"), nothing, ""),
    "a link to a folder": (lambda folder: folder.symlink_to(folder.parent), nothing, ""),
    "with a torn history": (torn, nothing, ""),
    "with a folder as history": (lambda folder: (folder / FILE).mkdir(parents=True), nothing, ""),
    "with a pipe as history": (lambda folder: (folder.mkdir(), os.mkfifo(folder / FILE)), nothing, ""),
    "with a link to a full disk": (full, nothing, ""),
    "emptied in mid-run": (nothing, empty, ""),
    "deleted in mid-run": (nothing, gone, ""),
    "a file from mid-run on": (nothing, blocked, ""),
    "a folder as history from mid-run on": (nothing, replaced, ""),
}  # fmt: skip
"""What is done to it before the run, what in the middle of it, and which place in it is used."""

LOST = {
    "a file", "below a file", "a name too long", "a null byte", "a loop of links", "a file from mid-run on",
    "a folder as history from mid-run on",
}  # fmt: skip
"""Where nothing can be written at the end."""

LEFT = {"emptied in mid-run": 3, "deleted in mid-run": 3}
"""Where somebody has thrown snapshots away: those that follow are there."""


class At:
    """The monitor's folder is another than the trainer's, which would fail there by itself."""

    def __init__(self, callback: Any, folder: Path, act: Callable[[], object]) -> None:
        self.callback, self.folder, self.act = callback, folder, act
        callback._open = self.open

    def open(self, **keywords: Any) -> None:
        Adapter._open(self.callback, **{**keywords, "folder": lambda: self.folder})

    def __call__(self, step: int) -> None:
        if step == STEPS // 2:
            self.act()


def lightning(place: Path, act: Callable[[], object] | None, folder: Path) -> list[torch.Tensor]:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    from ww_monitor.callbacks.lightning import SpectralMonitor

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    callbacks = []
    if act is not None:
        at = At(monitor := SpectralMonitor(every_n_steps=1, console=False), folder, act)

        class Acting(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                at(trainer.global_step)

        callbacks = [monitor, Acting()]
    module = Net()
    trainer = pl.Trainer(
        max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=place, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(_data()), batch_size=4))
    return list(module.net.state_dict().values())


def huggingface(place: Path, act: Callable[[], object] | None, folder: Path) -> list[torch.Tensor]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ww_monitor.callbacks.huggingface import SpectralMonitor

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).square().mean()}

    callbacks: list[Any] = []
    if act is not None:
        at = At(monitor := SpectralMonitor(every_n_steps=1, console=False), folder, act)

        class Acting(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                at(state.global_step)

        callbacks = [monitor, Acting()]
    model = Net()
    arguments = TrainingArguments(
        str(place), num_train_epochs=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"x": row} for row in _data()], callbacks=callbacks).train()
    return list(model.net.state_dict().values())


def keras(place: Path, act: Callable[[], object] | None, folder: Path) -> list[torch.Tensor]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    from ww_monitor.callbacks.keras import SpectralMonitor

    keras.utils.set_random_seed(0)
    callbacks: list[Any] = []
    if act is not None:
        at = At(monitor := SpectralMonitor(every_n_steps=1, console=False, folder=place), folder, act)
        callbacks = [monitor, keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: at(batch + 1))]
    net = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16)])
    net.compile("sgd", "mse")
    data = _data().numpy()
    net.fit(data, data, batch_size=4, epochs=1, verbose=0, callbacks=callbacks, shuffle=False)
    return [torch.as_tensor(one) for one in net.get_weights()]


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(16, 16)


def _data() -> torch.Tensor:
    return torch.randn(4 * STEPS, 16, generator=torch.Generator().manual_seed(1))


def survives(train: Callable[..., list[torch.Tensor]], name: str, expected: list[torch.Tensor]) -> bool:
    before, during, below = STATES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        before(folder)
        try:
            weights = train(Path(place), lambda: during(folder), folder / below if below else folder)
        except Exception as error:  # noqa: BLE001 - what is counted
            print(f"not survived: {train.__name__}, {name}: {type(error).__name__}: {error}")
            return False
        same = all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))
        found = _found(folder / below if below else folder) if name not in LOST else set(range(STEPS + 1))
    wanted = set(range(STEPS + 1)[-LEFT.get(name, STEPS + 1) :])
    if not (same and wanted <= found):
        print(f"not survived: {train.__name__}, {name}: same weights {same}, steps {sorted(found)}")
    return same and wanted <= found


def _found(folder: Path) -> set[int | None]:
    return {step for path in folder.glob("ww_history*.jsonl") if path.is_file() for step in steps(path)}


def run(*, quick: bool) -> Counts:
    tried = survived = 0
    logging.disable(logging.INFO)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as said:
        warnings.simplefilter("ignore")
        for train in (lightning, huggingface, keras):
            with tempfile.TemporaryDirectory() as place:
                expected = train(Path(place), None, Path(place))
            for name in list(STATES)[:: 7 if quick else 1]:
                tried += 1
                survived += survives(train, name, expected)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("not survived")]
    print("\n".join(lines), end="\n" * bool(lines))
    return {"states of a folder in three trainers": (tried, survived)}

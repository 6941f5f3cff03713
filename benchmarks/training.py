"""A training run with the monitor or without it, timed: in a loop of our own, or in the Trainer of transformers."""

from __future__ import annotations

import contextlib
import gc
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.nets import Step
from ww_monitor.monitor import Monitor
from ww_monitor.walk.torch import walk

Options = Mapping[str, Any]
"""Of `Monitor`, or of a callback."""


@dataclass(frozen=True)
class Run:
    """A training run that was timed.

    Attributes:
        seconds: From the first step to the end, with every analysis; the making of the model is not in it.
        loss: The last one; the mean one in the Trainer.
        steps: How many.
        peak: The most bytes that tensors held on the CUDA device; 0 elsewhere.
        snapshots: That the monitor made.
        dropped: That it gave up.
        lost: Seconds, by the monitor's own count.
    """

    seconds: float
    loss: float
    steps: int
    peak: int = 0
    snapshots: int = 0
    dropped: int = 0
    lost: float = 0.0


def in_loop(build: Callable[[], tuple[nn.Module, Step]], steps: int, options: Options | None) -> Run:
    """The steps, and around them what every callback does; the first analysis is timed too."""
    model, step = build()
    monitor = None if options is None else Monitor(**options)
    gc.collect()
    loss = step()  # allocators and caches, on both sides
    device = loss.device
    start = started(device)
    if monitor is not None:
        monitor.begin(0)
        monitor.observe(walk(model), step=0, whole=True)
    for number_of in range(1, steps + 1):
        loss = step()
        if monitor is not None:
            _watch(monitor, model, number_of)
    if monitor is not None:
        monitor.finish()
        if not monitor.is_seen(steps):
            monitor.observe(walk(model), step=steps, whole=True)
        monitor.close()
    synchronize(device)
    return Run(time.perf_counter() - start, float(loss), steps, peak(device), *_counted(monitor))


def in_trainer(
    device: torch.device, steps: int, options: Options | None, *, batch: int = 8, length: int = 1024, **sizes: int
) -> Run:
    """GPT-2 small (or of other `sizes`) in transformers' Trainer, bf16, on random tokens; the monitor is a callback."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from ww_monitor.callbacks.huggingface import SpectralMonitor

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=length, **sizes))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (8 * batch, length), generator=generator)
    monitor = None if options is None else SpectralMonitor(console=False, **options)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, bf16=True, use_cpu=device.type == "cpu",
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[monitor] if monitor else [])
        gc.collect()
        start = started(device)
        loss = trainer.train().training_loss
        synchronize(device)
        seconds = time.perf_counter() - start
    return Run(seconds, loss, steps, peak(device), *_counted(monitor and monitor.monitor))


def started(device: torch.device) -> float:
    """The time now that the device has nothing to do; its peak memory is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> int:
    """Bytes since `started`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _watch(monitor: Monitor, model: nn.Module, step: int) -> None:
    """What a callback does after a step."""
    if monitor.due(step):
        monitor.collect()
        monitor.observe(walk(model), step=step)
    else:
        monitor.collect()


def _counted(monitor: Monitor | None) -> tuple[int, int, float]:
    """Snapshots, dropped ones, and the seconds that the monitor counts as lost."""
    if monitor is None or not len(monitor.history):
        return 0, 0, 0.0
    dropped = int(monitor.history.last.summary.get("snapshots_dropped", 0))
    return len(monitor.history) + monitor.history.left_out, dropped, monitor.budget.lost

"""Offline W&B runs for the sinks, finished whatever happens, and what several files ask of an event file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def start_wandb(monkeypatch, _stop_wandb):
    """Begin an offline run in a folder; it becomes the active one unless `active=False`."""
    begun: list[Any] = []

    def start(folder: Path, *, active: bool = True):
        wandb = pytest.importorskip("wandb", reason="wandb, the tracker, is not installed")
        monkeypatch.setenv("WANDB_SILENT", "true")
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", x_disable_stats=True)
        reinit = "finish_previous" if active else "create_new"
        begun.append(wandb.init(mode="offline", dir=folder, settings=settings, reinit=reinit))
        return begun[-1]

    yield start
    for run in begun:
        run.finish()


@pytest.fixture(autouse=True)
def _stop_wandb():
    """The service process that runs share ends with the test: it remembers the settings it was begun with."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def read_events():
    """Every event of the event files in a folder, by TensorBoard's own reader."""

    def read(folder: Path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
        return EventAccumulator(str(folder), size_guidance=everything).Reload()

    return read

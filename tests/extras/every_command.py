"""What `ww-monitor[all]` must do beside the callbacks, every command and both dashboards; run by CI."""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import wandb
from typer.testing import CliRunner

from ww_monitor.cli import app
from ww_monitor.errors import SpectralWarning
from ww_monitor.monitor import Monitor
from ww_monitor.plots import SpectralFigures
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.sinks.tensorboard import TensorBoard
from ww_monitor.sinks.wandb import WandB
from ww_monitor.walk.torch import walk

os.environ["WANDB_SILENT"] = "true"
net = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Linear(100, 50))
with tempfile.TemporaryDirectory() as name:
    folder, model = Path(name), Path(name) / "net.pt"
    torch.save(net.state_dict(), model)
    with warnings.catch_warnings(record=True) as caught, wandb.init(mode="offline", dir=folder) as run:
        warnings.simplefilter("always")
        boards = [TensorBoard(folder / "events", figures=SpectralFigures()), WandB(run, figures=SpectralFigures())]
        with Monitor(sinks=[JsonLines(folder / "ww_history.jsonl"), *boards]) as monitor:
            for step in range(3):
                monitor.observe(walk(net), step=step)
    said = [str(one.message) for one in caught if issubclass(one.category, SpectralWarning)]
    assert not said, said
    calls = {
        "analyze": [model, "--html", folder / "model.html"],
        "compare": [model, model],
        "describe": [model, "--json"],
        "metrics": [],
        "plan": ["gpt2"],
        "replay": [folder],
        "report": [folder, "--output", folder / "run.html"],
        "watch": [folder, "--once"],
    }
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert known == calls.keys(), known
    for command, arguments in calls.items():
        for given in ([command, *map(str, arguments)], [command, "--help"]):
            ended = CliRunner().invoke(app, given)
            assert ended.exit_code == 0, (given, ended.output)
print("every command and both dashboards work", file=sys.stderr)

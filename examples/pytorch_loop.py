"""A training loop of one's own learns scikit-learn's digits, watched by a Monitor: `python examples/pytorch_loop.py`.

Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ww_monitor import Monitor
from ww_monitor.sinks.console import Console, table
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.walk.torch import walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/pytorch_loop"))
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = Monitor(
        every_n_steps=25,
        stop_on="traps",
        sinks=[JsonLines(options.output / "ww_history.jsonl"), Console()],
    )

    step = 0
    monitor.observe(walk(model), step=step)  # the weights before the first step
    for epoch in range(options.epochs):
        for images, digits in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), digits).backward()
            optimizer.step()
            step += 1
            if monitor.due(step):
                monitor.observe(walk(model), step=step, epoch=epoch)
        if monitor.stop_reason:
            print(f"stopping at step {step}: {monitor.stop_reason}")
            break
    if not monitor.is_seen(step):
        monitor.observe(walk(model), step=step, whole=True)
    monitor.close()
    print(table(monitor.history))


if __name__ == "__main__":
    main()

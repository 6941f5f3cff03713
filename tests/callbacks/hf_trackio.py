"""Trains a small GPT that reports to trackio, then reads its local store back into FOLDER/rows.json.

Run as `TRACKIO_DIR=… python hf_trackio.py FOLDER`.
"""

import json
import sys
from pathlib import Path

import torch
import trackio
from trackio.sqlite_storage import SQLiteStorage
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ww_monitor.callbacks.huggingface import SpectralMonitor


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=1, n_head=2))
    tokens = torch.randint(0, 64, (32, 8))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    args = TrainingArguments(
        str(folder), max_steps=4, logging_steps=2, use_cpu=True, report_to="trackio", project="gpt", save_strategy="no"
    )
    monitor = SpectralMonitor(2, include=["*mlp*"])
    Trainer(model, args, train_dataset=data, callbacks=[monitor]).train()
    (run,) = trackio.Api().runs("gpt")
    (folder / "rows.json").write_text(json.dumps(SQLiteStorage.get_logs("gpt", run.name)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

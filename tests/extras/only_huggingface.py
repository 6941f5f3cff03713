"""What `ww-monitor[huggingface]` alone must do; run by CI in an environment with nothing else."""

import sys
import tempfile
from importlib.util import find_spec

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ww_monitor import History
from ww_monitor.callbacks.huggingface import SpectralMonitor

assert not any(find_spec(name) for name in ("pytorch_lightning", "keras", "wandb", "tensorboard", "matplotlib"))

model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
tokens = torch.randint(64, (64, 16))
data = [{"input_ids": row, "labels": row} for row in tokens]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[SpectralMonitor(every_n_steps=3)]).train()
    steps = [snapshot.step for snapshot in History.read(f"{folder}/ww_history.jsonl")]
assert steps == [0, 3, 6, 8], steps
print("the extra huggingface is enough", file=sys.stderr)

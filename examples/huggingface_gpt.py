"""A small GPT learns to write Python, watched by SpectralMonitor: `python examples/huggingface_gpt.py [TEXT FILE]`.

The text is a file of the standard library unless you name another; a token is a byte. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import inspect
import typing
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ww_monitor.callbacks.huggingface import SpectralMonitor

LENGTH = 64


def pieces(text: bytes) -> list[dict[str, torch.Tensor]]:
    tokens = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="?", default=inspect.getsourcefile(typing))
    parser.add_argument("--output", default="runs/huggingface_gpt")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    data = pieces(Path(options.text).read_bytes())
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, loss_type="ForCausalLM")
    args = TrainingArguments(
        options.output,
        max_steps=options.steps,
        learning_rate=3e-3,
        logging_steps=10,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="best",
        metric_for_best_model="ww_alpha",  # any model-level metric; "loss" works as ever
        greater_is_better=False,
        use_cpu=True,
    )
    trainer = Trainer(
        GPT2LMHeadModel(config),
        args,
        train_dataset=data[:-32],
        eval_dataset=data[-32:],
        callbacks=[SpectralMonitor(every_n_steps=20), EarlyStoppingCallback(early_stopping_patience=5)],
    )
    trainer.train()
    print(f"tensorboard --logdir {options.output}")


if __name__ == "__main__":
    main()

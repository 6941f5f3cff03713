"""LoRA fine-tuning of a small local model, watched by SpectralMonitor: `python examples/lora.py [TEXT FILE]`.

A small GPT is trained on one text, then an adapter on another: the monitor shows the adapter's own update B·A, and how
far it has moved the matrices that it is added to. The texts are files of the standard library; a token is a byte.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import email
import inspect
import typing
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ww_monitor.callbacks.huggingface import SpectralMonitor

LENGTH = 64


def pieces(path: str | Path) -> list[dict[str, torch.Tensor]]:
    text = Path(path).read_bytes()
    tokens = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="?", default=inspect.getsourcefile(email))
    parser.add_argument("--output", default="runs/lora")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, loss_type="ForCausalLM")
    arguments = {"max_steps": options.steps, "logging_steps": 20, "save_strategy": "no", "use_cpu": True}
    base = GPT2LMHeadModel(config)
    before = TrainingArguments(f"{options.output}/base", learning_rate=3e-3, **arguments)
    Trainer(base, before, train_dataset=pieces(inspect.getsourcefile(typing))).train()

    model = get_peft_model(base, LoraConfig(r=16, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    monitor = SpectralMonitor(
        every_n_steps=20, lora=["delta", "merged"], track_delta=True, include=["*.lora[[]*", "*.merged"]
    )
    after = TrainingArguments(f"{options.output}/adapter", learning_rate=1e-2, **arguments)
    Trainer(model, after, train_dataset=pieces(options.text), callbacks=[monitor]).train()
    for layer in monitor.monitor.history.last.layers:
        stable_rank, moved = layer.value("stable_rank"), layer.value("delta_norm")
        print(f"{layer.name}  stable rank {stable_rank:.2f}  moved by {moved:.2f}")


if __name__ == "__main__":
    main()

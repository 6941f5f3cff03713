"""Trains a small GPT on two ranks, watched by SpectralMonitor; each rank leaves what it saw in a file.

Run as `python -m tests.callbacks.hf_ddp FOLDER`: trains four times, each time in a folder of its own.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.processes import on_two_ranks
from ww_monitor.callbacks.huggingface import SpectralMonitor


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Count(TrainerCallback):
    """How often this rank's logs have a value of ours."""

    calls = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.calls += "ww/num_traps" in logs


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=1, n_head=2))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[3, 4] = 2.0
    return model


WATCHING = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "ww_num_traps",
    "greater_is_better": False,
    "save_strategy": "best",
}


def train(folder: Path, monitor: SpectralMonitor | None, *others: TrainerCallback, resume=None, **arguments) -> None:
    """One run of at most 8 steps, and what this rank saw of it in rank0.json or rank1.json."""
    model, count = make_model(), Count()
    args = TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=["tensorboard"],
        logging_steps=2,
        disable_tqdm=True,
        **{"save_strategy": "no", **arguments},
    )
    callbacks = [count, *([monitor] if monitor else []), *others]
    trainer = Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    report = {
        "step": trainer.state.global_step,
        "traps": [entry["ww/num_traps"] for entry in trainer.state.log_history if "ww/num_traps" in entry],
        "best": trainer.state.best_metric,
        "log calls": count.calls,
        "snapshots": len(monitor.monitor.history) if monitor else None,
        "weights": sum(parameter.detach().double().sum().item() for parameter in model.parameters()),
    }
    (folder / f"rank{args.process_index}.json").write_text(json.dumps(report))


def spectral_monitor(**arguments) -> SpectralMonitor:
    return SpectralMonitor(2, include=["*mlp*"], **arguments)


def main(folder: Path) -> None:
    sys.modules["tensorflow"] = None  # PyTorch's TensorBoard writer imports it where it is there, for seconds
    gc.freeze()  # the Trainer collects after every run
    train(folder / "without", None)
    train(folder / "early_stopping", spectral_monitor(), EarlyStoppingCallback(2), **WATCHING)
    train(folder / "stop_on", spectral_monitor(stop_on="traps", patience=2))
    train(folder / "resume", spectral_monitor(), save_strategy="steps", save_steps=4)
    train(folder / "resume", spectral_monitor(), resume=str(folder / "resume" / "checkpoint-4"))


if __name__ == "__main__":
    on_two_ranks(lambda: main(Path(sys.argv[1])))

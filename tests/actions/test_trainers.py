"""Actions in the trainers: dry runs change nothing, runs that act resume bit for bit, and logs have the base rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ww_monitor import History, SpectralWarning
from ww_monitor.actions import LayerwiseDecay, LayerwiseRate, param_groups

EVERY = 4
ACTING = [LayerwiseRate(low=1, high=5, dry_run=False), LayerwiseDecay(dry_run=False)]
DRY = [LayerwiseRate(low=1, high=5), LayerwiseDecay()]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def data() -> TensorDataset:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.arange(96) % 10)


def make_optimizer(model: nn.Module, grouped: bool) -> torch.optim.Optimizer:
    groups = param_groups(model) if grouped else model.parameters()
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def decaying(optimizer: torch.optim.Optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def lightning(folder: Path, actions, *, steps: int = 11, resume: Path | None = None, grouped: bool = True) -> Any:
    """Weights, base rates as a callback sees them, and a checkpoint after the last step."""
    pl = pytest.importorskip("pytorch_lightning")
    from ww_monitor.callbacks.lightning import SpectralMonitor

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, index):
            seen.append(self.optimizers().param_groups[0]["lr"])  # inside the closure of the optimizer
            rows = slice(8 * self.global_step, 8 * self.global_step + 8)  # Lightning resumes with another batch
            return nn.functional.cross_entropy(self.net(data().tensors[0][rows]), data().tensors[1][rows])

        def configure_optimizers(self):
            optimizer = make_optimizer(self, grouped)
            return [optimizer], [{"scheduler": decaying(optimizer), "interval": "step"}]

    seen: list[float] = []
    monitor = SpectralMonitor(every_n_steps=EVERY, console=False, actions=actions)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[monitor],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(data(), batch_size=8), ckpt_path=resume)
    checkpoint = folder / f"{steps}.ckpt"
    trainer.save_checkpoint(checkpoint)
    return flat(module), seen, checkpoint


def trainer(folder: Path, actions, *, steps: int = 11, resume: Path | None = None, grouped: bool = True) -> Any:
    """The same with the Trainer."""
    library = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ww_monitor.callbacks.huggingface import SpectralMonitor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x, labels):
            seen.append(optimizer.param_groups[0]["lr"])
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

    seen: list[float] = []
    model = Model()
    optimizer = make_optimizer(model, grouped)
    args = library.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, save_strategy="steps", save_steps=steps,
        logging_strategy="steps", logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, max_grad_norm=0,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in data()]
    monitor = SpectralMonitor(every_n_steps=EVERY, console=False, actions=actions)
    done = library.Trainer(
        model, args, train_dataset=rows, callbacks=[monitor], optimizers=(optimizer, decaying(optimizer))
    )
    done.remove_callback(library.PrinterCallback)
    done.train(resume_from_checkpoint=None if resume is None else str(resume))
    logged = [one["learning_rate"] for one in done.state.log_history if "learning_rate" in one]
    assert logged[-len(seen) :] == pytest.approx(seen)
    assert sum(map(len, (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks))) == 0
    return flat(model), seen, folder / f"checkpoint-{steps}"


def flat(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.fixture(params=[lightning, trainer])
def train(request):
    return request.param


def test_a_dry_run_changes_no_bit_and_its_factors_are_in_the_history(train, tmp_path):
    dry, *_ = train(tmp_path / "dry", DRY)
    plain, *_ = train(tmp_path / "plain", [])
    assert dry == plain
    history = History.read(next((tmp_path / "dry").rglob("ww_history.jsonl")))
    rates = [layer.value("rate_factor") for layer in history.snapshots[0].layers]
    assert (sorted(rates[:2]), rates[2] == rates[2]) == ([1.0, 5.0], False)  # ten outputs: too few eigenvalues
    assert history.last.summary["decay_factor"] == pytest.approx((2 / 3 + 3) / 2)


def test_a_run_that_acts_differs_and_shows_the_rates_of_its_scheduler(train, tmp_path):
    acting, seen, _ = train(tmp_path / "acting", ACTING)
    plain, base, _ = train(tmp_path / "plain", [])
    assert acting != plain
    assert seen == base == pytest.approx([1e-2 * 0.9**step for step in range(11)])


@pytest.mark.parametrize("cut", [5, 8])
def test_a_resumed_run_that_acts_is_the_uninterrupted_one_bit_for_bit(train, tmp_path, cut):
    whole, *_ = train(tmp_path / "whole", ACTING)
    *_, checkpoint = train(tmp_path / "cut", ACTING, steps=cut)
    resumed, *_ = train(tmp_path / "cut", ACTING, resume=checkpoint)
    assert resumed == whole


def test_an_optimizer_without_groups_gives_one_warning_and_trains_as_ever(train, tmp_path):
    with pytest.warns(SpectralWarning, match="LayerwiseRate does nothing: .*make its groups with") as caught:
        acting, *_ = train(tmp_path / "acting", ACTING[:1], grouped=False)
    plain, *_ = train(tmp_path / "plain", [], grouped=False)
    assert acting == plain
    assert len([one for one in caught if issubclass(one.category, SpectralWarning)]) == 1

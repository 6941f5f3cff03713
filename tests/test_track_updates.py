"""What one optimizer step changed, in loops of one's own: several optimizers, half precision, the budget."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from ww_monitor import Monitor, SpectralWarning, schedule
from ww_monitor.walk.torch import walk


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).to(dtype)


def ratio(now: torch.Tensor, before: torch.Tensor) -> float:
    return float((now.detach() - before).double().norm() / before.double().norm())


def learn(net: nn.Module, step: int) -> None:
    net.zero_grad()
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
    net(x.to(next(net.parameters()).dtype)).float().square().mean().backward()


def rates(snapshot) -> list[float]:
    return [layer.value("update_ratio") for layer in snapshot.layers]


def test_two_optimizers_each_change_their_own_matrix_in_one_step():
    net, monitor = make_net(), Monitor(every_n_steps=2, track_updates=True)
    optimizers = [torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.AdamW(net[2].parameters(), lr=1e-3)]
    for step in range(1, 5):
        before = [net[k].weight.detach().clone() for k in (0, 2)]
        for optimizer in optimizers:
            learn(net, step)
            with monitor.step(walk(net), step=step, optimizers=optimizers):
                optimizer.step()
        if monitor.due(step):
            snapshot = monitor.observe(walk(net), step=step)
            assert rates(snapshot) == pytest.approx(
                [ratio(net[k].weight, w) for k, w in zip((0, 2), before, strict=True)], rel=1e-6
            )
    assert [one.step for one in monitor.history] == [1, 2, 4]


def test_no_weight_is_read_before_a_step_without_a_snapshot_nor_of_a_frozen_layer():
    net, read = make_net(), []
    net[0].requires_grad_(False)
    monitor = Monitor(every_n_steps=5, track_updates=True)

    def walked(step):
        for item in walk(net):
            read.append((step, item.name))
            yield item

    for step in range(1, 8):
        learn(net, step)
        with monitor.step(walked(step), step=step):
            torch.optim.SGD(net.parameters(), lr=0.1).step()
        if monitor.due(step):
            snapshot = monitor.observe(walk(net), step=step)
    assert {step for step, _ in read} == {1, 5}
    assert (math.isnan(rates(snapshot)[0]), rates(snapshot)[1] > 0) == (True, True)
    assert snapshot.summary["update_ratio"] == rates(snapshot)[1]  # what is frozen enters no mean


def test_within_the_budget_every_planned_snapshot_knows_its_update(monkeypatch):
    seconds = itertools.count(0.0, 0.1)  # every look at the clock takes as long, whatever else the machine does
    monkeypatch.setattr("ww_monitor.monitor.pacing.perf_counter", lambda: next(seconds))
    net, monitor = make_net(), Monitor(max_overhead=0.9, track_updates=True)
    monitor.budget = schedule.Budget(0.9, clock=lambda: next(seconds))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor.observe(walk(net), step=0)
    lost = monitor.budget.lost
    with monitor.step(walk(net), step=1, due=True):
        pass
    assert monitor.budget.lost > lost  # the copy costs
    for step in range(1, 200):
        learn(net, step)
        with monitor.step(walk(net), step=step):
            optimizer.step()
        if monitor.due(step):
            monitor.observe(walk(net), step=step)
    assert len(monitor.history) > 1
    assert all(one.summary["update_ratio"] > 0 for one in list(monitor.history)[1:])


class Master(torch.optim.Optimizer):
    """SGD on float32 masters; where they are is for the classes below to say."""

    def __init__(self, parameters, lr: float = 1e-4):
        super().__init__(list(parameters), {"lr": lr})
        self.masters = {p: p.detach().float() + 1e-4 for p in self.param_groups[0]["params"]}
        self.masters = {p: torch.where(m.to(p.dtype) == p, m, p.detach().float()) for p, m in self.masters.items()}

    @torch.no_grad()
    def step(self):
        for p, master in self.masters.items():
            master.sub_(p.grad.float(), alpha=self.defaults["lr"])
            p.copy_(master)


class InState(Master):
    def __init__(self, parameters):
        super().__init__(parameters)
        for p, master in self.masters.items():
            self.state[p].update({"exp_avg": torch.zeros_like(master), "master_param": master})


class InGroups(Master):
    def __init__(self, parameters):
        super().__init__(parameters)
        self.param_groups_master = [{"params": list(self.masters.values())}]


class Wrapped:
    """A mixed-precision optimizer around one whose parameters are the masters."""

    def __init__(self, parameters):
        self.outer = Master(parameters)
        self.optimizer = torch.optim.SGD(list(self.outer.masters.values()), lr=1.0)
        self.masters, self.step = self.outer.masters, self.outer.step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [InState, InGroups, Wrapped])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_in_half_precision_the_masters_are_read(dtype, kind, mode):
    net, monitor = make_net(dtype), Monitor(every_n_steps=2, track_updates=True, mode=mode)
    optimizer = kind(net.parameters())
    masters = [optimizer.masters[net[k].weight] for k in (0, 2)]
    for step in range(1, 5):
        learn(net, step)
        before = [master.clone() for master in masters]
        with monitor.step(walk(net), step=step, optimizers=[optimizer]):
            optimizer.step()
        if monitor.due(step):
            monitor.observe(walk(net), step=step)
            monitor.finish()
            expected = [ratio(*both) for both in zip(masters, before, strict=True)]
            assert rates(monitor.history.last) == pytest.approx(expected, rel=1e-6)
            assert ratio(net[0].weight.float(), before[0].to(dtype).float()) != pytest.approx(expected[0], rel=0.01)
    monitor.close()


def test_in_half_precision_without_masters_the_update_is_not_known_and_this_is_said():
    net, monitor = make_net(torch.bfloat16), Monitor(every_n_steps=1, track_updates=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def train():
        for step in range(1, 4):
            learn(net, step)
            with monitor.step(walk(net), step=step, optimizers=[optimizer]):
                optimizer.step()
            monitor.observe(walk(net), step=step)

    with pytest.warns(SpectralWarning, match="update of 2 matrices is not known.*float32 master of torch.bfloat16"):
        train()
    snapshot = monitor.history.last
    assert all(map(math.isnan, (*rates(snapshot), snapshot.summary["update_ratio"])))


def test_a_step_that_changes_nothing_has_ratio_zero_and_no_direction():
    net, monitor = make_net(), Monitor(track_updates=True)
    with monitor.step(walk(net), step=1):
        pass
    layer = monitor.observe(walk(net), step=1).layers[0]
    assert (layer.value("update_ratio"), layer.value("update_spectral_norm")) == (0.0, 0.0)
    assert math.isnan(layer.value("update_stable_rank"))


def test_a_step_that_failed_leaves_no_weights_behind():
    net, monitor = make_net(), Monitor(track_updates=True)
    with pytest.raises(KeyboardInterrupt), monitor.step(walk(net), step=1):
        raise KeyboardInterrupt
    assert math.isnan(monitor.observe(walk(make_net()), step=1).summary["update_ratio"])


def test_lightning_with_two_optimizers_in_a_batch_counts_the_batch_as_the_step(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    from ww_monitor.callbacks.lightning import SpectralMonitor

    weights = {}

    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = make_net(), False

        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                learn(self.net, index)
                optimizer.step()
            weights[self.trainer.global_step] = [self.net[k].weight.detach().clone() for k in (0, 2)]

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[k].parameters(), lr=0.1) for k in (0, 2)]

    monitor = SpectralMonitor(every_n_steps=3, track_updates=True, console=False, history=False)
    trainer = pl.Trainer(
        max_steps=16, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(Two(), torch.utils.data.DataLoader(torch.zeros(20, 1), batch_size=1))
    seen = [one for one in monitor.monitor.history if one.step > 2]
    assert len(seen) >= 4
    for one in seen:
        expected = [ratio(*both) for both in zip(weights[one.step], weights[one.step - 2], strict=True)]
        assert rates(one) == pytest.approx(expected, rel=1e-6)

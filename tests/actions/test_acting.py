"""Actions in loops of one's own: schedulers, closures, failures, resuming, and that a dry run changes nothing."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ww_monitor import InvalidArgument, Monitor, SpectralWarning
from ww_monitor.actions import LayerwiseDecay, LayerwiseRate, param_groups
from ww_monitor.walk.torch import walk

EVERY = 4
RATE = LayerwiseRate(low=1, high=5, dry_run=False)
DECAY = LayerwiseDecay(dry_run=False)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def loss(net: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
    return (net(x) - x.flip(1)).square().mean()


def make_optimizer(net: nn.Module, groups: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(net) if groups else net.parameters(), lr=1e-2, weight_decay=0.1)


def make_scheduler(optimizer: torch.optim.Optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=40, cycle_momentum=False)


def train(monitor: Monitor, *, steps: int, start: int = 0, state=None, observe_also=(), groups: bool = True):
    """The net, the optimizer's base rates at every step, and a checkpoint after the last one."""
    net = make_net()
    optimizer = make_optimizer(net, groups)
    scheduler = make_scheduler(optimizer)
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        monitor.load_state_dict(state["monitor"])
    monitor.act_on(optimizer)
    rates = []
    for step in range(start, steps + 1):
        if step > start:
            optimizer.zero_grad()
            loss(net, step).backward()
            optimizer.step()
            scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
        if (monitor.due(step) and (step > start or state is None)) or step in observe_also:
            monitor.observe(walk(net), step=step)
    state = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "monitor": monitor}
    return net, rates, {name: copy.deepcopy(one.state_dict()) for name, one in state.items()}


def weights(net: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()


def by_hand(history, steps: int) -> nn.Module:
    """The same loop with the factors that a history has, by a scheduler of another optimizer's."""
    net = make_net()
    optimizer = make_optimizer(net)
    base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = make_scheduler(base)
    factors = {one.step: {layer.name: layer.metrics for layer in one.layers} for one in history}
    now: dict[str, dict[str, float]] = factors[0]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(net, step).backward()
        for group in optimizer.param_groups:
            row = now[group["ww_matrices"][0]] if "ww_matrices" in group else {}
            group["lr"] = base.param_groups[0]["lr"] * row.get("rate_factor", 1.0)
            group["weight_decay"] = 0.1 * row.get("decay_factor", 1.0)
        optimizer.step()
        base.step()
        scheduler.step()
        now = factors.get(step, now)
    return net


@pytest.mark.parametrize("actions", [[RATE], [DECAY], [RATE, DECAY]])
def test_a_scheduled_run_steps_by_its_own_rate_times_the_factors_bit_for_bit(actions):
    monitor = Monitor(every_n_steps=EVERY, actions=actions)
    net, rates, _ = train(monitor, steps=10)
    plain, base, _ = train(Monitor(every_n_steps=EVERY), steps=10)
    assert weights(net) == weights(by_hand(monitor.history, 10))
    assert weights(net) != weights(plain)
    assert rates == base  # outside of a step nobody sees a factor
    for action in actions:
        values = [layer.value(action.metric) for layer in monitor.history.last.layers]
        assert (min(values), max(values)) == pytest.approx((action.low, action.high))
        assert monitor.history.last.summary[action.metric] == pytest.approx(sum(values) / 3)


def test_two_actions_on_one_option_multiply():
    monitor = Monitor(every_n_steps=EVERY, actions=[RATE, LayerwiseRate(low=2, high=2, dry_run=False)])
    net, *_ = train(monitor, steps=6)
    assert max(layer.value("rate_factor") for layer in monitor.history.last.layers) == 10.0
    assert weights(net) == weights(by_hand(monitor.history, 6))


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_dry_run_logs_the_factors_and_changes_nothing(mode, groups):
    actions = [LayerwiseRate(low=1, high=5), LayerwiseDecay()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(every_n_steps=EVERY, actions=actions, mode=mode) as monitor:
            net, _, state = train(monitor, steps=9, groups=groups)
    plain, _, other = train(Monitor(every_n_steps=EVERY), steps=9, groups=groups)
    assert weights(net) == weights(plain)
    assert str(state["optimizer"]) == str(other["optimizer"])
    assert sorted(layer.value("rate_factor") for layer in monitor.history.last.layers)[::2] == [1.0, 5.0]
    assert monitor.history.last.summary["decay_factor"] > 0
    (note,) = [finding.message for one in monitor.history for finding in one.findings if finding.rule == "actions"]
    assert note.startswith("LayerwiseRate(low=1, high=5, ")
    assert note.count("is logged only") == 2


def test_a_dry_run_puts_no_hook_on_the_optimizer():
    net = make_net()
    optimizer, monitor = make_optimizer(net), Monitor(actions=[LayerwiseRate()])
    monitor.act_on(optimizer)
    assert hooks(optimizer) == 0
    with Monitor(every_n_steps=1, actions=[RATE]) as acting:
        acting.act_on(optimizer)
        acting.act_on(optimizer)  # a cell of a notebook that is run twice
        assert hooks(optimizer) == 3
    assert hooks(optimizer) == 0


def hooks(optimizer) -> int:
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return sum(len(getattr(optimizer, kind)) for kind in kinds) + ("step" in vars(optimizer))


@pytest.mark.parametrize("cut", [5, 8])
@pytest.mark.parametrize("looks", [(), (5, 6)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(cut, looks):
    whole, *_ = train(Monitor(every_n_steps=EVERY, actions=[RATE, DECAY]), steps=11)
    *_, state = train(Monitor(every_n_steps=EVERY, actions=[RATE, DECAY]), steps=cut)
    monitor = Monitor(every_n_steps=EVERY, actions=[RATE, DECAY])
    resumed, *_ = train(monitor, steps=11, start=cut, state=pickle.loads(pickle.dumps(state)), observe_also=looks)
    assert weights(resumed) == weights(whole)


def test_a_look_between_two_multiples_changes_no_factor():
    one, other = (Monitor(every_n_steps=EVERY, actions=[RATE]) for _ in range(2))
    assert weights(train(one, steps=7, observe_also=(2, 5, 6))[0]) == weights(train(other, steps=7)[0])
    assert one.history.snapshots[0].findings[-1].message.endswith(" acts")
    values = {one.step: [layer.value("rate_factor") for layer in one.layers] for one in one.history}
    assert values[0] == values[2] != values[4] == values[5] == values[6]


def test_a_checkpoint_of_a_run_with_other_actions_begins_anew():
    *_, state = train(Monitor(every_n_steps=EVERY, actions=[DECAY]), steps=5)
    monitor = Monitor(every_n_steps=EVERY, actions=[RATE])
    train(monitor, steps=6, start=5, state=state, observe_also=(6,))
    assert max(layer.value("rate_factor") for layer in monitor.history.last.layers) == 5.0


@dataclass(frozen=True)
class Double:
    """An action of one's own."""

    option: str = "lr"
    metric: str = "rate_factor"
    needs: tuple[str, ...] = ("stable_rank",)
    dry_run: bool = False
    factor: float = 2.0

    def factors(self, snapshot):
        return {layer.name: self.factor for layer in snapshot.layers if layer.value("stable_rank") > 0}


def test_an_action_of_ones_own_has_the_metrics_that_it_needs():
    net = nn.Sequential(nn.Linear(16, 16, bias=False))
    monitor = Monitor(every_n_steps=1, actions=[Double()], options=Monitor().options.__class__(metrics=["alpha"]))
    optimizer = torch.optim.SGD(param_groups(net), lr=0.1)
    monitor.act_on(optimizer)
    monitor.observe(walk(net), step=0)
    before = net[0].weight.detach().clone()
    net[0].weight.grad = torch.ones(16, 16)
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), before - 0.2)
    assert set(monitor.history.last.layers[0].metrics) == {"alpha", "stable_rank", "rate_factor"}


def test_one_monitor_at_a_time_acts_on_an_optimizer_and_its_rates_stay_what_they_were():
    net = nn.Sequential(nn.Linear(16, 16, bias=False))
    first, second = (Monitor(every_n_steps=1, actions=[Double(factor=factor)]) for factor in (2.0, 3.0))
    optimizer = torch.optim.SGD(param_groups(net), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    first.act_on(optimizer)
    with pytest.warns(SpectralWarning, match="actions take an optimizer over from another monitor"):
        second.act_on(optimizer)
    for monitor in (first, second):
        monitor.observe(walk(net), step=0)
    for _ in range(3):
        before = net[0].weight.detach().clone()
        net[0].weight.grad = torch.ones(16, 16)
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(net[0].weight.detach(), before - 0.3)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    first.close()
    second.close()
    before = net[0].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), before - 0.1)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0])
def test_a_factor_that_is_no_rate_leaves_the_base(factor):
    monitor = Monitor(every_n_steps=EVERY, actions=[Double(factor=factor)])
    plain, *_ = train(Monitor(every_n_steps=EVERY), steps=3)
    assert weights(train(monitor, steps=3)[0]) == weights(plain)


def test_an_action_that_fails_is_said_once_and_costs_nothing_else():
    class Broken(Double):
        def factors(self, snapshot):
            raise ZeroDivisionError("none")

    plain, *_ = train(Monitor(every_n_steps=EVERY), steps=6)
    monitor = Monitor(every_n_steps=EVERY, actions=[Broken()])
    with pytest.warns(SpectralWarning, match="actions failed: ZeroDivisionError: none") as caught:
        net, *_ = train(monitor, steps=6)
    assert (weights(net), len(caught), len(monitor.history)) == (weights(plain), 1, 2)


def test_a_closure_sees_the_base_rate_and_the_step_the_scaled_one():
    net, seen = make_net(), []
    optimizer, monitor = make_optimizer(net), Monitor(every_n_steps=1, actions=[RATE])
    monitor.act_on(optimizer)
    snapshot = monitor.observe(walk(net), step=0)

    def closure():
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.zero_grad()
        value = loss(net, 1)
        value.backward()
        return value

    before = copy.deepcopy(net)
    assert optimizer.step(closure) > 0
    optimizer.step(closure=closure)
    assert seen == [[1e-2] * 4] * 2
    moved = {k: (net[k].weight.detach() - before[k].weight.detach()).abs().max().item() for k in (0, 2, 4)}
    factors = {int(layer.name): layer.value("rate_factor") for layer in snapshot.layers}
    assert max(factors, key=factors.get) == max(moved, key=moved.get)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupt)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 4


def interrupt():
    raise KeyboardInterrupt


def rates_of(groups) -> list[float]:
    return [group["lr"] for group in groups]


@pytest.mark.parametrize("look", ["state_dict", "close", "set"])
def test_a_step_that_raises_leaves_no_factor_in_a_checkpoint_nor_at_the_end_nor_over_a_rate_that_is_set(look):
    net = make_net()
    optimizer, monitor = make_optimizer(net), Monitor(every_n_steps=1, actions=[RATE])
    monitor.act_on(optimizer)
    monitor.observe(walk(net), step=0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p).to_sparse()  # which Adam refuses
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
    if look == "state_dict":
        assert rates_of(optimizer.state_dict()["param_groups"]) == [1e-2] * 4
    elif look == "set":
        for group in optimizer.param_groups:
            group["lr"] = 5e-3
        loss(net, optimizer.zero_grad() or 1).backward()
        optimizer.step()
    monitor.close()
    assert rates_of(optimizer.param_groups) == [5e-3 if look == "set" else 1e-2] * 4


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_step_that_raises_and_is_caught_leaves_a_chained_scheduler_its_rates(scheduler_first):
    net = make_net()
    optimizer = torch.optim.SGD(param_groups(net), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if scheduler_first else None
    monitor = Monitor(every_n_steps=1, actions=[RATE])
    monitor.act_on(optimizer)
    scheduler = scheduler or torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    monitor.observe(walk(net), step=0)
    optimizer.register_step_pre_hook(lambda *_: interrupt() if scheduler.last_epoch == 1 else None)  # after ours
    for step in range(3):
        optimizer.zero_grad()
        loss(net, step).backward()
        with contextlib.suppress(KeyboardInterrupt):
            optimizer.step()
        scheduler.step()
        assert rates_of(optimizer.param_groups) == [0.1 * 0.5 ** (step + 1)] * 4
    monitor.close()
    loss(net, 3).backward()
    optimizer.step()
    scheduler.step()
    assert rates_of(optimizer.param_groups) == [0.1 * 0.5**4] * 4


def test_a_dry_action_beside_one_that_acts_is_only_logged():
    monitor = Monitor(every_n_steps=EVERY, actions=[DECAY, LayerwiseRate(low=1, high=5)])
    alone = Monitor(every_n_steps=EVERY, actions=[DECAY])
    assert weights(train(monitor, steps=6)[0]) == weights(train(alone, steps=6)[0])
    assert monitor.history.last.summary["rate_factor"] > 1


def test_a_fused_weight_steps_by_the_mean_of_its_parts_factors():
    torch.manual_seed(0)
    net = nn.MultiheadAttention(64, 4, bias=False)
    optimizer = torch.optim.SGD(param_groups(net), lr=1.0)
    monitor = Monitor(every_n_steps=1, actions=[RATE])
    monitor.act_on(optimizer)
    *parts, out = monitor.observe(walk(net), step=0).layers
    before = [net.in_proj_weight.detach().clone(), net.out_proj.weight.detach().clone()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [before[0] - net.in_proj_weight.detach(), before[1] - net.out_proj.weight.detach()]
    fused = sum(part.value("rate_factor") for part in parts) / 3
    assert len({part.value("rate_factor") for part in parts}) == 3
    torch.testing.assert_close(moved[0], torch.full((192, 64), fused))
    torch.testing.assert_close(moved[1], torch.full((64, 64), out.value("rate_factor")))


def test_a_rate_that_is_a_tensor_stays_the_tensor_that_a_scheduler_writes_to():
    net, rate = make_net(), torch.tensor(1e-2)
    optimizer = torch.optim.Adam(param_groups(net), lr=rate)
    monitor = Monitor(every_n_steps=1, actions=[RATE])
    monitor.act_on(optimizer)
    monitor.observe(walk(net), step=0)
    loss(net, 1).backward()
    optimizer.step()
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert rate.item() == pytest.approx(1e-2)


def test_a_step_that_the_gradient_scaler_skips_changes_neither_weights_nor_rates():
    net = make_net()
    optimizer, monitor = make_optimizer(net), Monitor(every_n_steps=1, actions=[RATE])
    monitor.act_on(optimizer)
    monitor.observe(walk(net), step=0)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0), weights(net)
    for grows in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(loss(net, 1) * grows).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (weights(net) == before) == (grows != 1.0)
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 4


@pytest.mark.parametrize("optimizer", [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), object()])
def test_an_optimizer_without_a_group_for_each_matrix_gives_one_warning_and_nothing_else(optimizer):
    monitor = Monitor(every_n_steps=1, actions=[RATE])
    match = f"LayerwiseRate does nothing: expected .* group for each matrix, got {type(optimizer).__name__}; make its"
    with pytest.warns(SpectralWarning, match=match) as caught:
        monitor.act_on(optimizer)
    assert len(caught) == 1
    for step in range(3):  # a warning is an error here
        monitor.observe(walk(make_net()), step=step)


def test_a_weight_decay_that_the_optimizer_has_not_is_said():
    class Plain(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__(groups, {"lr": 0.1})

    with pytest.warns(SpectralWarning, match="LayerwiseDecay does nothing: expected an optimizer with weight_decay"):
        Monitor(every_n_steps=1, actions=[DECAY]).act_on(Plain(param_groups(make_net())))


def test_actions_that_never_get_an_optimizer_are_said():
    monitor = Monitor(every_n_steps=1, actions=[RATE])
    monitor.observe(walk(make_net()), step=0)
    with pytest.warns(SpectralWarning, match="actions do nothing: expected an optimizer, got none; call act_on"):
        monitor.observe(walk(make_net()), step=1)


def test_groups_of_another_model_than_the_monitors_are_said():
    net = make_net()
    outer = nn.ModuleDict({"net": net})
    monitor = Monitor(every_n_steps=1, actions=[RATE])
    monitor.act_on(make_optimizer(net))
    with pytest.warns(
        SpectralWarning, match="3 layers keep the base, such as 'net.0': .*no parameter group of their own; param_"
    ):
        monitor.observe(walk(outer), step=0)


@pytest.mark.parametrize("given", [{}, {"every_n_epochs": 1}, {"every_n_steps": 2, "mode": "async"}])
def test_actions_whose_times_would_depend_on_a_clock_are_refused(given):
    with pytest.raises(
        InvalidArgument, match="Monitor: actions that are no dry run need every_n_steps and mode='sync'"
    ):
        Monitor(actions=[RATE], **given)
    Monitor(actions=[LayerwiseRate()], **given)


@pytest.mark.parametrize("wrong", [LayerwiseRate, object(), "rate"])
def test_what_is_no_action_is_refused(wrong):
    with pytest.raises(InvalidArgument, match=r"Monitor: actions must be as ww_monitor.record.Action; got"):
        Monitor(actions=[wrong])


def test_a_monitor_that_acts_can_be_copied_without_its_optimizer():
    optimizer, monitor = make_optimizer(make_net()), Monitor(every_n_steps=1, actions=[RATE])
    monitor.act_on(optimizer)
    for other in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        other.close()
        assert hooks(optimizer) == 3
    monitor.close()
    assert hooks(optimizer) == 0


def test_a_run_that_begins_anew_forgets_the_factors_of_the_last_one():
    monitor = Monitor(every_n_steps=EVERY, actions=[RATE])
    train(monitor, steps=6)
    again, fresh = make_net(), Monitor(every_n_steps=EVERY, actions=[RATE])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralWarning)
        again, *_ = train(monitor, steps=6)
    assert weights(again) == weights(train(fresh, steps=6)[0])

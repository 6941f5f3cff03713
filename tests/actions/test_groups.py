"""Parameter groups: one a matrix, every trainable parameter once, options kept."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import ww_monitor
from ww_monitor import InvalidArgument
from ww_monitor.actions import param_groups


class Net(nn.Module):
    """Fused, tied, frozen, parametrized, and plain."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 64)
        self.attention = nn.MultiheadAttention(64, 4)
        self.norm = nn.LayerNorm(64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.kernel = nn.Conv2d(8, 16, 3)
        self.spectral = parametrizations.spectral_norm(nn.Linear(64, 64))
        self.free = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(64, 80, bias=False)
        self.head.weight = self.embedding.weight


def ids(groups) -> list[int]:
    return [id(p) for group in groups for p in group["params"]]


def test_every_trainable_parameter_is_there_once_and_matrices_have_the_names_that_a_snapshot_has():
    net = Net()
    groups = param_groups(net)
    assert sorted(ids(groups)) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    named = [name for group in groups for name in group.get("ww_matrices", ())]
    layers = {layer.name for layer in ww_monitor.analyze(net).layers}
    assert set(named) == layers - {"frozen", "spectral"}
    assert len(named) == len(set(named))
    assert all(len(group["params"]) == 1 for group in groups if "ww_matrices" in group)
    (fused,) = [group for group in groups if group["params"][0] is net.attention.in_proj_weight]
    assert len(fused["ww_matrices"]) == 3


def test_groups_of_ones_own_keep_their_options():
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    decayed = [net[0].weight, net[2].weight, net[1].weight]
    rest = [net[0].bias, net[1].bias, net[2].bias]
    groups = param_groups(net, [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    assert [(group.get("ww_matrices"), group["weight_decay"], len(group["params"])) for group in groups] == [
        (["0"], 0.1, 1), (["2"], 0.1, 1), (None, 0.1, 1), (None, 0.0, 3),
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * 4
    again = torch.optim.AdamW(param_groups(net), lr=1e-3)
    again.load_state_dict(torch.optim.AdamW(param_groups(net), lr=1e-3).state_dict())
    assert [group.get("ww_matrices") for group in again.param_groups] == [["0"], ["2"], None]


def test_parameters_may_be_given_bare_or_as_a_generator():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert [group.get("ww_matrices") for group in param_groups(net, net[1].parameters())] == [["1"], None]
    assert [group.get("ww_matrices") for group in param_groups(net, [{"params": net[0].weight}])] == [["0"]]


def test_matrices_that_share_one_buffer_are_told_apart():
    net, buffer = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)), torch.randn(512)
    net[0].weight = nn.Parameter(buffer[:256].view(16, 16))
    net[1].weight = nn.Parameter(buffer[256:].view(16, 16))
    found = [(group["ww_matrices"], group["params"][0]) for group in param_groups(net)]
    assert [name for name, _ in found] == [["0"], ["1"]]
    assert all(parameter is net[int(name)].weight for (name,), parameter in found)


def test_a_model_without_memory_has_the_rest_only():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    (rest,) = param_groups(net)
    assert (len(rest["params"]), "ww_matrices" in rest) == (4, False)


def test_a_parameter_in_two_groups_is_refused():
    net = nn.Linear(16, 16)
    with pytest.raises(InvalidArgument, match="param_groups: groups must have every parameter once; got one that is"):
        param_groups(net, [{"params": [net.weight]}, {"params": [net.weight, net.bias]}])


def test_parameters_may_come_with_their_names():
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    named, plain = list(net.named_parameters()), list(net.parameters())
    for given, same in (
        (named, plain),
        ([{"params": named[:2]}, {"params": named[2:]}], [{"params": plain[:2]}, {"params": plain[2:]}]),
        ([{"params": named[0]}], [{"params": plain[0]}]),
        ([{"params": tuple(plain)}], [{"params": plain}]),
    ):
        assert param_groups(net, given) == param_groups(net, same)

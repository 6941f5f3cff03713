"""State dicts inside checkpoints: found by what they hold, at any depth, and said where there was a choice."""

import pytest
import torch

from ww_monitor import analyze
from ww_monitor.errors import InvalidArgument, SpectralWarning, WWMonitorError
from ww_monitor.matrix import Matrix
from ww_monitor.walk.files import walk_files
from ww_monitor.walk.sources import walk_source


def weights(seed, rows=12):
    generator = torch.Generator().manual_seed(seed)
    return {"fc.weight": torch.randn(rows, 16, generator=generator), "fc.bias": torch.randn(rows, generator=generator)}


ONE, OTHER, THIRD = weights(1), weights(2, rows=10), weights(3)
ADAM = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(9, 9)}}, "param_groups": [{"lr": 0.1}]}


@pytest.fixture(params=["mapping", "file"])
def read(request, tmp_path):
    """A function: the items of a checkpoint, given as it is or as a file."""

    def items(content, part=""):
        if request.param == "file":
            torch.save(content, tmp_path / "net.pt")
        source = tmp_path / "net.pt" if request.param == "file" else content
        return {item.name: item for item in walk_source(source, part=part)}

    return items


def check(items, expected):
    """The matrices are those, by name and number, and no other."""
    found = {name: item.load()[0] for name, item in items.items() if isinstance(item, Matrix)}
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


SINGLE = {
    **{name: {name: ONE, "epoch": 3} for name in ("module", "netG", "g_ema", "params_ema", "teacher", "net", "x")},
    "deep": {"a": {"b": [{"c": ({"d": ONE},)}]}},
    "stray tensors": {"log_alpha": torch.zeros(1), "loss": torch.tensor(2.0), "rng_state": torch.ones(9), "net": ONE},
    "stray table": {"confusion": torch.ones(9, 9), "net": ONE},
    "optimizer": {"net": ONE, "opt": ADAM, "optimizer": {"fc": {"m.weight": torch.ones(9, 9)}}, "all": [ADAM]},
    "number keys": {0: {"net": ONE}, 1: None},
    "one mapping twice": {"net": ONE, "again": ONE},
    "dotted": {"a.b": ONE},
}


@pytest.mark.parametrize("case", SINGLE)
def test_the_only_state_dict_is_read_under_its_own_names(read, case):
    check(read(SINGLE[case]), {"fc": ONE["fc.weight"]})


def test_several_are_all_read_with_their_path_in_front(read):
    content = {"gan": {"generator": ONE, "discriminator": OTHER}, "critics": [THIRD], "optim": ADAM}
    with pytest.warns(
        SpectralWarning, match=r"found 'gan.generator' \(2 tensors\), .*part='critics.0' reads that alone"
    ):
        items = read(content)
    expected = {"gan.generator.fc": ONE, "gan.discriminator.fc": OTHER, "critics.0.fc": THIRD}
    check(items, {name: tensors["fc.weight"] for name, tensors in expected.items()})


def test_networks_of_the_same_shapes_are_no_copies(read):
    with pytest.warns(SpectralWarning, match="read 'actor', 'critic'"):
        items = read({"actor": ONE, "critic": THIRD})
    check(items, {"actor.fc": ONE["fc.weight"], "critic.fc": THIRD["fc.weight"]})


@pytest.mark.parametrize("name", ["ema", "model_ema", "g_ema", "state_dict_ema", "swa_model", "teacher"])
def test_a_moving_average_is_read_on_request(read, name):
    averaged = {f"module.{key}": value for key, value in THIRD.items()}
    content = {name: {"decay": 0.99, "average": averaged}, "model": ONE}
    with pytest.warns(SpectralWarning, match=f"left out '{name}.average', the same model averaged; part="):
        check(read(content), {"fc": ONE["fc.weight"]})
    check(read(content, part=name), {"fc": THIRD["fc.weight"]})
    check(read(content, part="model"), {"fc": ONE["fc.weight"]})


def test_a_part_is_a_path_the_start_of_one_or_a_name_in_it(read):
    content = {"a": {"x": ONE, "y": OTHER}, "b": {"x": THIRD}}
    check(read(content, part="a.y"), {"fc": OTHER["fc.weight"]})
    check(read(content, part="a"), {"a.x.fc": ONE["fc.weight"], "a.y.fc": OTHER["fc.weight"]})
    check(read(content, part="y"), {"fc": OTHER["fc.weight"]})
    with pytest.raises(InvalidArgument, match=r"got 'c'; use one of 'a.x' \(2 tensors\), 'a.y'"):
        read(content, part="c")


def test_part_is_an_option_of_analyze():
    content = {"actor": weights(1, 30), "critic": weights(2, 40)}
    (layer,) = analyze(content, part="critic").layers
    assert (layer.name, layer.shape) == ("fc", (1, 40, 16))
    with pytest.raises(InvalidArgument, match="part is for mappings and files; got 'actor' with Linear"):
        analyze(torch.nn.Linear(9, 9), part="actor")


def test_an_entry_that_is_no_tensor_costs_itself_only(read):
    items = read({**ONE, "step": 3, "none": None, "kind": torch.float32, "fc._extra_state": None})
    check(items, {"fc": ONE["fc.weight"]})
    reasons = {name: item.reason for name, item in items.items() if name != "fc"}
    assert reasons == {"step": "no tensor: int", "none": "no tensor: NoneType", "kind": "no tensor: dtype"}


def test_a_dict_that_holds_itself_is_read_once(read):
    content = {"model": {"net": ONE}}
    content["model"]["model"] = content["model"]
    check(read(content), {"fc": ONE["fc.weight"]})


def test_containers_that_are_too_deep_are_an_error(read):
    content = ONE
    for _ in range(300):
        content = {"model": content}
    with pytest.raises(WWMonitorError, match="nested more than 100 deep"):
        read(content)


@pytest.mark.parametrize("content", [{"a": {"b": torch.ones(3)}}, {"log_alpha": torch.ones(1), "step": 4}], ids=str)
def test_what_has_no_matrix_is_an_error_that_lists_it(tmp_path, content):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(WWMonitorError, match=rf"net.pt: expected tensors of two or more.*{next(iter(content))}"):
        walk_files(tmp_path / "net.pt")


def test_a_file_whose_weights_are_all_left_out_is_an_error_with_the_reasons(tmp_path):
    torch.save({"fc.weight": torch.ones(9, 9, dtype=torch.int64)}, tmp_path / "net.pt")
    with pytest.raises(WWMonitorError, match=r"expected weight matrices in .*; got fc \(9, 9\) \(integer weights\)"):
        walk_files(tmp_path / "net.pt")


def test_only_small_vectors_in_a_mapping_are_no_error():
    assert list(walk_source({"norm.weight": torch.ones(4)})) == []


def test_a_list_of_tensors_is_read_where_nothing_else_has_weights_or_on_request(read):
    averages = [THIRD["fc.weight"], torch.zeros(3)]
    check(read({"shadow_params": averages, "decay": 0.9}), {"0": THIRD["fc.weight"]})
    content = {"model": ONE, "ema": {"shadow_params": averages}}
    check(read(content), {"fc": ONE["fc.weight"]})
    check(read(content, part="ema"), {"0": THIRD["fc.weight"]})


def test_the_part_that_is_suggested_is_the_one_that_is_left_out():
    with pytest.warns(SpectralWarning, match="read 'student', left out 'teacher', .*; part='teacher' reads that alone"):
        list(walk_source({"teacher": ONE, "student": THIRD}))


def test_averages_whose_names_have_lost_their_dots_are_copies(read):
    plain = {f"model.net.{key}": value for key, value in ONE.items()}
    copies = {f"model_ema.net{key.replace('.', '')}": value * 2 for key, value in ONE.items()}
    items = read({**plain, **copies, "model_ema.decay": torch.ones(())})
    check(items, {"model.net.fc": ONE["fc.weight"]})
    assert items["model_ema.netfcweight"].reason == "a copy of model.net.fc.weight, averaged"

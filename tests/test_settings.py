"""An option is written once: signature, help, checks, types and YAML of whoever takes it come from its field."""

from __future__ import annotations

import inspect
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest
import torch
from torch import nn

import ww_monitor
from tests.processes import run_python
from ww_monitor import InvalidArgument, Monitor, Options, SpectralWarning, svd_smooth
from ww_monitor.actions import LayerwiseRate
from ww_monitor.analysis import AnalyzeOptions
from ww_monitor.errors import check_positive_int
from ww_monitor.monitor import MonitorOptions
from ww_monitor.rules import broken_layer
from ww_monitor.settings import CallbackOptions, KerasOptions
from ww_monitor.signatures import Settings, method_taking, options_of, taking
from ww_monitor.sinks.memory import Memory


def callback(framework: str):
    """The class, if its framework is installed."""
    module = pytest.importorskip(f"ww_monitor.callbacks.{framework}", exc_type=ImportError)
    return module.SpectralMonitor


TAKERS = {
    "analyze": (lambda: ww_monitor.analyze, AnalyzeOptions, {"model": nn.Linear(16, 16)}),
    "Monitor": (lambda: Monitor, MonitorOptions, {}),
    "lightning": (lambda: callback("lightning"), CallbackOptions, {}),
    "huggingface": (lambda: callback("huggingface"), CallbackOptions, {}),
    "keras": (lambda: callback("keras"), KerasOptions, {}),
}


@pytest.fixture(params=TAKERS)
def taker(request):
    """What takes the options, their class, and the arguments that must be given."""
    find, kind, given = TAKERS[request.param]
    return find(), kind, given


def test_signature_and_help_list_every_option_with_its_default_and_text(taker):
    take, kind, _ = taker
    parameters, options = inspect.signature(take).parameters, options_of(kind)
    assert list(parameters) == [option.name for option in options]
    text = " ".join((take.__init__ if inspect.isclass(take) else take).__doc__.split())
    for option in options:
        parameter = parameters[option.name]
        assert (parameter.default is inspect.Parameter.empty) == (option.name == "model")
        assert parameter.annotation == option.type
        assert f"{option.name}: {' '.join(option.text.split())}" in text
        if option.name != "model":
            assert parameter.default == option.default
            assert f"Default: {' '.join(repr(option.default).split())}." in text
    assert text.index("Args:") < text.index("Raises:")


def test_an_unknown_argument_is_named_with_the_nearest(taker):
    take, kind, given = taker
    name = options_of(kind)[-1].name
    with pytest.raises(
        InvalidArgument, match=rf"{kind.where}: there is no argument '{name}x'; did you mean '{name}'\?"
    ):
        take(**given, **{f"{name}x": 1})
    with pytest.raises(TypeError, match=r"no argument 'zzz'; use one of .*" + name):
        take(**given, zzz=1)


WRONG = [
    ("preset", "ww", "preset must be one of 'default', 'weightwatcher'; got 'ww'"),
    ("fit", "mle", "fit must be one of 'csn', 'hill', 'truncated'; got 'mle'"),
    ("experts", "all", "experts must be one of 'separate', 'pooled'; got 'all'"),
    ("replicas", 0, "replicas must be an integer >= 1; got 0"),
    ("significance", 1.0, "significance must be between 0 and 1; got 1.0"),
    ("strict", "no", "strict must be one of True, False; got 'no'"),
    ("mode", "threads", "mode must be one of 'sync', 'async'; got 'threads'"),
    ("copy_budget_bytes", 0, "copy_budget_bytes must be an integer >= 1; got 0"),
    ("max_overhead", "little", "max_overhead must be between 0 and 1; got 'little'"),
    ("include", "fc*", r"include must be a sequence of globs; got the string 'fc\*'"),
    ("seed", 1.5, "seed must be an integer; got 1.5"),
    ("seed", True, "seed must be an integer; got True"),
    ("exclude", None, "exclude must be a sequence of strings; got None"),
    ("include", [3], r"include must be a sequence of strings; got \[3\]"),
    ("metrics", 3, "metrics must be a sequence of strings or a string or None; got 3"),
    ("aspect_ratio", "1", "aspect_ratio must be a number or None; got '1'"),
    ("lora", "base", "lora must be a sequence of some of 'base', 'delta', 'merged'; got 'base'"),
    ("metrics", ["alfa"], "metrics must be among 'alpha', .*; got 'alfa'"),
    ("every_n_steps", np.int64(0), "every_n_steps must be an integer >= 1; got 0"),
    ("significance", np.float32(2), "significance must be between 0 and 1; got 2.0"),
    ("split", {3: 1}, "split must map globs, which are strings; got 3"),
    ("split", {"fc": 0}, r"split\['fc'\] must be a number of parts or .*; got 0"),
    ("lora", [], r"lora must be a sequence of some of 'base', 'delta', 'merged'; got \[\]"),
    ("split", "c_attn", "split must be a mapping or None; got 'c_attn'"),
    ("rules", "traps", "rules must be a sequence or None; got 'traps'"),
    ("rules", [3], r"rules must be a sequence or None; got \[3\]"),
    ("sinks", None, "sinks must be a sequence; got None"),
    ("actions", 3, "actions must be a sequence; got 3"),
    ("prefix", 3, "prefix must be a string; got 3"),
    ("progress", 3, "progress must be a function or None; got 3"),
    ("folder", 3, "folder must be a string or Path; got 3"),
    ("options", 3, "options must be Options or None; got 3"),
    ("select", 3, "select must be Select or None; got 3"),
]


@pytest.mark.parametrize(
    ("taker", "name", "value", "message"),
    [
        (taker, *case)
        for taker, (_, kind, _) in TAKERS.items()
        for case in WRONG
        if case[0] in {option.name for option in options_of(kind)}
    ],
    indirect=["taker"],
)
def test_a_wrong_value_is_refused_with_argument_value_and_choices(taker, name, value, message):
    take, kind, given = taker
    with pytest.raises(InvalidArgument, match=f"{kind.where}: {message}"):
        take(**given, **{name: value})


def test_an_option_that_may_be_missing_may_be_none():
    assert Monitor(every_n_steps=None, copy_budget_bytes=None, stop_on=None, rules=None).within_budget


@pytest.mark.parametrize("taker", ["Monitor", "lightning", "huggingface", "keras"], indirect=True)
def test_names_of_the_last_release_are_taken_with_a_warning(taker):
    take, _, _ = taker
    with pytest.warns(SpectralWarning, match="still_bytes is called copy_budget_bytes now") as caught:
        made = take(still_bytes=123)
    assert caught[0].filename == __file__
    assert getattr(made, "monitor", made).analyzer.copy_budget_bytes == 123
    with pytest.warns(SpectralWarning, match="layers_per_step is ignored: a snapshot is of one step"):
        take(layers_per_step="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(copy_budget_bytes=123)


@pytest.mark.parametrize("taker", ["Monitor", "lightning", "huggingface", "keras"], indirect=True)
def test_an_old_and_a_new_name_of_one_option_are_not_taken_together(taker):
    take, kind, _ = taker
    message = f"{kind.where}: still_bytes is called copy_budget_bytes now; expected one of them, got both"
    with pytest.raises(InvalidArgument, match=message):
        take(still_bytes=123, copy_budget_bytes=3)


def test_a_new_option_is_a_field_and_the_place_that_uses_it():
    """Everything else is made from the field: here of a class that a caller extends."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(Settings):
        loud: Annotated[int, "How loud.", check_positive_int] = 3

    Mine.__annotations__["loud"] = Annotated[int, "How loud.", check_positive_int]  # no name of this module

    class Speaker:
        @method_taking(Mine)
        def __init__(self, given) -> None:
            """Made with care."""
            self.loud = given.loud

    @taking(Mine)
    def shout(given) -> str:
        """The text.

        Returns:
            It.
        """
        return "!" * given.loud

    assert (shout(loud=2), Speaker(loud=4).loud) == ("!!", 4)
    assert str(inspect.signature(shout)) == "(*, loud: int = 3) -> str"
    assert shout.__doc__ == "The text.\n\nArgs:\n    loud: How loud. Default: 3.\n\nReturns:\n    It."
    assert Speaker.__init__.__doc__ == "Made with care.\n\nArgs:\n    loud: How loud. Default: 3."
    with pytest.raises(InvalidArgument, match="loud must be an integer >= 1; got 0"):
        shout(loud=0)


TYPED = """
from ww_monitor.analysis import analyze
from ww_monitor.monitor import Monitor
analyze("m.pt", preset="weightwatcher", min_size=3, base=None)
analyze(model="m.pt", split={"qkv": 3})
Monitor(every_n_steps=3, mode="async", stop_on="traps")
analyze("m.pt", preset="ww")  # wrong
analyze("m.pt", min_sise=3)  # wrong
analyze("m.pt", seed="0")  # wrong
analyze()  # wrong
Monitor(evry_n_steps=3)  # wrong
Monitor(mode="threads")  # wrong
Monitor(sinks=[3])  # wrong
"""

WITHOUT_LIBRARIES = """
[mypy]
strict = true
[mypy-torch.*,numpy.*,scipy.*,threadpoolctl.*,keras.*,transformers.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_a_type_checker_sees_names_and_types(tmp_path):
    """Each wrong line of the script is an error, and no other."""
    pytest.importorskip("mypy", reason="mypy, the type checker, is not installed")
    script, settings = tmp_path / "script.py", tmp_path / "mypy.ini"
    script.write_text(TYPED)
    settings.write_text(WITHOUT_LIBRARIES)
    places = ["--config-file", str(settings), "--cache-dir", str(tmp_path / "cache"), str(script)]
    done = run_python("-m", "mypy", *places, timeout=300)
    mine = [line for line in done.stdout.splitlines() if "script.py:" in line and "error:" in line]
    found = sorted({int(line.split(":")[1]) for line in mine})
    wrong = [number for number, line in enumerate(TYPED.splitlines(), start=1) if line.endswith("# wrong")]
    assert found == wrong, done.stdout


CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: ww_monitor.callbacks.lightning.SpectralMonitor
      init_args:
        every_n_steps: 50
        preset: weightwatcher
        metrics: [alpha]
        include: ["net.*"]
        split: {"qkv": 3}
        copy_budget_bytes: 1000
        console: false
        rules: [ww_monitor.rules.broken_layer]
        sinks: [{class_path: ww_monitor.sinks.memory.Memory}]
        actions: [{class_path: ww_monitor.actions.LayerwiseRate, init_args: {high: 2.0}}]
"""


@pytest.fixture
def from_yaml(tmp_path, monkeypatch):
    """The callback that Lightning's command line makes of a configuration, and the configuration as it saves it."""
    pl = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    pytest.importorskip("jsonargparse", reason="jsonargparse, which reads the YAML, is not installed")
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train"])

    def made(config):
        (tmp_path / "config.yaml").write_text(config)
        cli = LightningCLI(
            pl.LightningModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            args=["--config", str(tmp_path / "config.yaml")],
        )
        one = next(one for one in cli.trainer.callbacks if isinstance(one, callback("lightning")))
        return one, cli.parser.dump(cli.config)

    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Lightning's use of jsonargparse
def test_lightnings_command_line_makes_the_callback_from_yaml(from_yaml):
    monitor = from_yaml(CONFIG)[0].monitor
    assert monitor.options == Options(preset="weightwatcher", metrics=["alpha", "alpha_hill"])  # the action's
    assert (monitor.every_n_steps, monitor.select.include, monitor.analyzer.copy_budget_bytes) == (50, ["net.*"], 1000)
    assert monitor.rules == (broken_layer,)
    assert [type(sink) for sink in monitor.sinks] == [Memory]
    assert monitor.acting.actions == (LayerwiseRate(high=2.0, exclude=[]),)
    for wrong in (("weightwatcher", "ww"), ("copy_budget_bytes", "copy_budget_byte")):
        with pytest.raises(SystemExit):
            from_yaml(CONFIG.replace(*wrong))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("value", "expected", "layers"), [("null", None, "null"), ("1234", 1234, "auto")])
def test_a_configuration_that_the_last_release_saved_makes_the_callback_with_a_warning(
    from_yaml, value, expected, layers
):
    old = CONFIG.replace("copy_budget_bytes: 1000", f"still_bytes: {value}\n        layers_per_step: {layers}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SpectralWarning)
        made, _ = from_yaml(old)
    said = " ".join(str(one.message) for one in caught)
    assert "still_bytes is called copy_budget_bytes now" in said
    assert "layers_per_step is ignored: a snapshot is of one step" in said
    assert made.monitor.analyzer.copy_budget_bytes == expected
    saved = from_yaml(CONFIG)[1]
    assert "copy_budget_bytes: 1000" in saved
    assert "still_bytes" not in saved
    assert "layers_per_step" not in saved


def test_numbers_of_numpy_are_taken_as_pythons():
    grid = {"significance": np.float64(0.25), "replicas": np.int64(2), "seed": np.int32(5)}
    options = MonitorOptions(every_n_steps=np.int64(4), max_overhead=np.float32(0.5))
    assert [type(one) for one in (options.every_n_steps, options.max_overhead)] == [int, float]
    net = nn.Linear(16, 40)
    plain = {name: number.item() for name, number in grid.items()}
    assert ww_monitor.analyze(net, **grid).summary["alpha"] == ww_monitor.analyze(net, **plain).summary["alpha"]
    assert len(ww_monitor.analyze(net, split={"*": np.int64(2)}).layers) == 2
    assert svd_smooth(net, keep=np.int64(3)).changed == svd_smooth(net, keep=3).changed


def test_an_option_reaches_the_analysis():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert [layer.name for layer in ww_monitor.analyze(net, exclude=["0"]).layers] == ["1"]
    assert ww_monitor.analyze(model=net, metrics=["alpha"]).summary.keys() == {"alpha"}

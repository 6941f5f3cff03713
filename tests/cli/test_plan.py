"""The command line."""

import json
import re
import shlex
from pathlib import Path

import pytest

from ww_monitor.description import Rates
from ww_monitor.plan import BUILT_IN, plan_ranks

CliRunner = pytest.importorskip("typer.testing").CliRunner
pytest.importorskip("transformers")

from ww_monitor.cli import app  # noqa: E402 - needs typer

PLANNING = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")


def called(*arguments):
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == 0, found.output
    return found.output


def cells(output):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]


def documented():
    """Every command in docs/planning.md with the table below it."""
    blocks = re.findall(
        r"```console\n\$ (ww-monitor plan .*?)\n```\n\n(.*?)\n\n(\|.*?)(?:\n\n|\Z)", PLANNING, re.DOTALL
    )
    return [(command.replace("\\\n", " "), said, table.strip()) for command, said, table in blocks]


@pytest.mark.parametrize("number", range(2), ids=["fsdp", "ddp"])
def test_the_tables_of_the_documentation_are_what_the_commands_give(number):
    command, said, table = documented()[number]
    output = called(*shlex.split(command)[1:])
    assert output.strip() == f"{said}\n\n{table}"


def test_the_documentation_plans_the_models_and_sizes_that_it_should():
    lines = cells(documented()[0][2])[2:]
    assert [line[:2] for line in lines] == [[name, n] for name in BUILT_IN for n in ("1", "8", "64", "1024")]


def test_the_command_gives_what_the_function_gives(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BUILT_IN["gpt2"]))
    lines = cells(called("plan", str(folder / "config.json"), "--world-size", "8", "--rate", "20,8"))
    plan = plan_ranks("gpt2", 8, rates=Rates(2e10, 8e9))
    assert len(lines) == 3
    assert lines[2] == ["mine", "8", *plan.overall()]


@pytest.mark.parametrize(
    "option",
    [["--sharding", "ddp"], ["--dtype", "bfloat16"], ["--world-size", "4"], ["--rate", "10,8"], ["--per-rank"]],
)
def test_every_option_of_a_plan_counts(option):
    plain = ["plan", "gpt2", "--world-size", "8", "--rate", "20,8"]
    assert cells(called(*plain, *option)) != cells(called(*plain))


def test_a_line_a_rank():
    lines = cells(called("plan", "gpt2", "--world-size", "3", "--rate", "20,8", "--per-rank"))[2:]
    assert [line[2] for line in lines] == ["0", "1", "2"]
    assert sum(int(line[3]) for line in lines) == 74


def test_the_rate_is_measured_where_none_is_given():
    assert "(measured here)" in called("plan", "gpt2", "--world-size", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt3"], "'moe-128'; got 'gpt3'"),
        (["gpt2", "--rate", "1,1", "--world-size", "1000000000"], "world_size must be at most 16384; got 1000000000"),
        (["gpt2", "--rate", "20"], "rate must be two numbers of GFLOP/s, GRAM,EIGENVALUES; got '20'"),
        (["gpt2", "--rate", "20,-1"], "got '20,-1'"),
        (["gpt2", "--rate", "inf,1"], "got 'inf,1'"),
        (["gpt2", "--rate", "1,1", "--world-size", "0"], "world_size must be an integer >= 1; got 0"),
        (["gpt2", "--rate", "1,1", "--sharding", "tp"], "sharding must be one of 'fsdp', 'ddp'; got 'tp'"),
    ],
)
def test_what_is_wrong_is_named_without_a_traceback(arguments, message):
    found = CliRunner().invoke(app, ["plan", *arguments])
    assert found.exit_code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", found.output).split())

"""Saved checkpoints in the order of their steps, and the history that they give."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

import ww_monitor
from ww_monitor import History, InvalidArgument, SpectralWarning, WWMonitorError, replay_checkpoints
from ww_monitor.checkpoints import checkpoints_in_order
from ww_monitor.errors import NoSuchFile

pytestmark = pytest.mark.filterwarnings("default::ww_monitor.SpectralWarning")


def weights(step: int, *, trap: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    fc = torch.randn(24, 16, generator=generator)
    fc[0, 0] += trap
    return {"fc.weight": fc}


def saved(folder, name: str, **content) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / name)


def order(*paths) -> list[tuple[str, int]]:
    return [(one.path.name, one.step) for one in checkpoints_in_order([str(path) for path in paths])]


def test_lightning_says_its_step_and_epoch(tmp_path):
    saved(tmp_path, "last.ckpt", state_dict=weights(1), global_step=30, epoch=2)
    saved(tmp_path, "epoch=0-step=10.ckpt", state_dict=weights(2), global_step=10, epoch=0)
    assert order(tmp_path / "*.ckpt") == [("epoch=0-step=10.ckpt", 10), ("last.ckpt", 30)]
    assert [one.epoch for one in checkpoints_in_order(tmp_path)] == [0, 2]


def test_trainer_keeps_a_folder_a_step_beside_the_final_model(tmp_path):
    for step in (1000, 200):
        saved(tmp_path / f"checkpoint-{step}", "pytorch_model.bin", **weights(step))
        saved(tmp_path / f"checkpoint-{step}", "optimizer.pt", state={})
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    saved(tmp_path, "pytorch_model.bin", **weights(3))
    expected = [("checkpoint-200", 200), ("checkpoint-1000", 1000)]
    assert order(tmp_path) == order(tmp_path / "checkpoint-*") == expected


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["net-step_20.pt", "net-step_3.pt"], [3, 20]),
        (["iter-8-epoch-1.pt", "iter-4-epoch-2.pt"], [4, 8]),
        (["epoch=2-loss=0.25.pt", "epoch=10-loss=0.20.pt"], [2, 10]),
        (["model.05-0.35.pt", "model.12-0.31.pt"], [5, 12]),
        (["gpt2_100_v2.pt", "gpt2_20_v2.pt"], [20, 100]),
        (["stepwise7.pth.tar", "stepwise10.pth.tar"], [7, 10]),
    ],
)
def test_a_name_says_the_step_else_the_epoch_else_a_number_that_differs(tmp_path, names, steps):
    for name in names:
        saved(tmp_path, name, **weights(1))
    assert [step for _, step in order(tmp_path)] == steps


def test_one_of_several_at_a_step_counts_and_the_others_are_said(tmp_path):
    saved(tmp_path, "a.ckpt", state_dict=weights(1), global_step=10)
    saved(tmp_path, "last.ckpt", state_dict=weights(1), global_step=10)
    with pytest.warns(SpectralWarning, match=r"left out 1 of 2 .*last\.ckpt \(step 10, as .*a\.ckpt\)$"):
        assert order(tmp_path) == [("a.ckpt", 10)]


def test_a_step_that_counts_anew_in_every_epoch_loses_no_checkpoint(tmp_path):
    """`step` is the batch in the epoch: the epoch is what tells them apart, in the file or in the name, or a number."""
    for epoch in range(6):
        saved(tmp_path / "file", f"ck_{'abcdef'[epoch]}.pt", model=weights(epoch), epoch=epoch, step=99)
        saved(tmp_path / "name", f"epoch{epoch}.pt", model=weights(epoch), step=99)
        saved(tmp_path / "number", f"ck_{epoch}.pt", model=weights(epoch), step=99 if epoch < 5 else 57)
    for folder in ("file", "name", "number"):
        assert [step for _, step in order(tmp_path / folder)] == list(range(6))
    for name, epoch in (("ck_1", 0), ("ck_2_b7", 1), ("ck_3", 0)):
        saved(tmp_path / "odd", f"{name}.pt", model=weights(epoch), step=99, epoch=epoch)
    with pytest.raises(InvalidArgument, match="cannot tell the order of 3"):
        order(tmp_path / "odd")


@pytest.mark.parametrize(
    ("names", "copies"),
    [
        (
            ["checkpoint-0.pth.tar", "checkpoint-1.pth.tar", "checkpoint-2.pth.tar"],
            ["last.pth.tar", "model_best.pth.tar"],
        ),
        (["model_0.pth", "model_1.pth", "model_2.pth"], ["checkpoint.pth"]),
    ],
    ids=["timm", "torchvision"],
)
def test_the_last_and_the_best_may_repeat_an_epoch(tmp_path, names, copies):
    for epoch, name in enumerate(names):
        saved(tmp_path, name, model=weights(epoch), epoch=epoch)
    for name in copies:
        saved(tmp_path, name, model=weights(2), epoch=2)
    with pytest.warns(SpectralWarning, match=f"left out {len(copies)} of {3 + len(copies)} checkpoints"):
        assert [step for _, step in order(tmp_path)] == [0, 1, 2]


def test_a_single_checkpoint_needs_no_step(tmp_path):
    saved(tmp_path, "best.pt", **weights(1))
    assert order(tmp_path / "best.pt") == order(tmp_path) == [("best.pt", 0)]


def test_folders_of_accelerate_are_checkpoints_of_a_run(tmp_path):
    for number in (0, 1, 10):
        saved(tmp_path / f"checkpoint_{number}", "pytorch_model.bin", **weights(number))
        saved(tmp_path / f"checkpoint_{number}", "optimizer.bin", state={})
    assert order(tmp_path) == [("checkpoint_0", 0), ("checkpoint_1", 1), ("checkpoint_10", 10)]


def test_an_order_that_cannot_be_told_is_refused_with_the_names(tmp_path):
    for name in ("best.pt", "final.pt"):
        saved(tmp_path, name, **weights(1))
    with pytest.raises(InvalidArgument, match=r"order of 2 checkpoints \(best\.pt, final\.pt\)"):
        order(tmp_path)


@pytest.mark.parametrize("given", ["gone/*.ckpt", "gone.ckpt", "x" * 5000, "a\0b", "*.md"])
def test_what_is_not_there_is_named(tmp_path, given):
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(NoSuchFile, match="replay: no "):
        checkpoints_in_order(f"{tmp_path}/{given}")


@pytest.fixture
def run(tmp_path):
    """A run of six checkpoints, of which the later ones have a trap."""
    for step in range(6):
        saved(tmp_path / "run", f"s{step}.ckpt", state_dict=weights(0, trap=9.0 * (step > 3)), global_step=10 * step)
    return tmp_path / "run"


def lines(path) -> list[object]:
    return [replace(one, seconds=0.0) for one in map(parsed, path.read_text().splitlines())]


def parsed(line: str) -> ww_monitor.Snapshot:
    found = ww_monitor.Snapshot.from_dict(json.loads(line))
    known = [replace(row, metrics={k: v for k, v in row.metrics.items() if v == v}) for row in found.layers]
    return replace(found, layers=tuple(known), summary={k: v for k, v in found.summary.items() if v == v})


def test_checkpoints_become_the_history_that_a_monitor_would_have_written(run, tmp_path):
    told: list[float] = []
    given = list(replay_checkpoints(f"{run}/*.ckpt", path=tmp_path / "h.jsonl", progress=told.append))
    history = History.read(tmp_path / "h.jsonl")
    assert [one.step for one in given] == [one.step for one in history] == [0, 10, 20, 30, 40, 50]
    assert [(one.rule, one.step) for one in history.findings if one.rule == "trap"] == [("trap", 40)]
    assert told == pytest.approx([n / 6 for n in range(1, 7)])


@pytest.mark.parametrize("cut", [0, 1, 25, -2], ids=["whole", "without its end", "torn early", "torn late"])
def test_a_replay_that_was_killed_goes_on_with_no_snapshot_lost_or_doubled(run, tmp_path, cut):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    list(replay_checkpoints(run, path=whole))
    list(itertools.islice(replay_checkpoints(run, path=killed), 4))
    data = killed.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    killed.write_bytes(data if not cut else data[:-1] if cut == 1 else data[: last + cut] if cut > 0 else data[:cut])
    again = [one.step for one in replay_checkpoints(run, path=killed)]
    assert again == [0, 10, 20, 30, 40, 50]
    assert lines(killed) == lines(whole)
    before = killed.read_bytes()
    assert len(list(replay_checkpoints(run, path=killed))) == 6
    assert killed.read_bytes() == before


@pytest.mark.parametrize("wrong", [{"metrics": ["alfa"]}, {"split": {"fc": 0}}, {"lora": []}])
def test_a_wrong_option_is_refused_before_anything_is_read(tmp_path, wrong):
    with pytest.raises(InvalidArgument, match=f"^replay: {next(iter(wrong))}.* must be "):
        replay_checkpoints(tmp_path / "missing", path=tmp_path / "h.jsonl", **wrong)


def test_a_checkpoint_before_the_last_snapshot_is_refused_and_the_file_stays(run, tmp_path):
    first = run / "s1.ckpt"
    content = first.read_bytes()
    first.unlink()
    list(replay_checkpoints(run, path=tmp_path / "h.jsonl"))
    before = (tmp_path / "h.jsonl").read_bytes()
    first.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"s1\.ckpt is of step 10, before the last one in .*h\.jsonl, 50"):
        replay_checkpoints(run, path=tmp_path / "h.jsonl")
    with pytest.raises(InvalidArgument, match="is of preset 'default'; got 'weightwatcher'"):
        replay_checkpoints(run, path=tmp_path / "h.jsonl", preset="weightwatcher")
    assert (tmp_path / "h.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["hello", "hello\n", "[1]\n[2]\n"])
def test_a_file_that_is_no_history_is_left_alone(run, tmp_path, text):
    (tmp_path / "notes").write_text(text)
    with pytest.raises(WWMonitorError, match="notes"):
        replay_checkpoints(run, path=tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == text


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    (run / "s3.ckpt").write_bytes((run / "s3.ckpt").read_bytes()[:300])
    with pytest.raises(WWMonitorError, match=r"s3\.ckpt"):
        list(replay_checkpoints(run, path=tmp_path / "h.jsonl"))

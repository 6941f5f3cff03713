"""The checkpoints that a run has saved → its history, one snapshot each, in the order of their steps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ww_monitor.analysis import Progress, SourceOptions
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.errors import InvalidArgument, NoSuchFile, WWMonitorError
from ww_monitor.monitor.drift import LastSpectra
from ww_monitor.record import History, Snapshot, begins_as_ours
from ww_monitor.rules import LOOKBACK, TRAINING_RULES, Holding
from ww_monitor.settings import AnalysisOptions, warn
from ww_monitor.signatures import taking
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.walk.archives import content_of, is_script
from ww_monitor.walk.folders import KERAS, TORCH, weight_files
from ww_monitor.walk.lora import check_lora
from ww_monitor.walk.parts import check_split

SUFFIXES = tuple(sorted((*TORCH, *KERAS, ".weights.h5", ".safetensors"), key=len, reverse=True))
"""How the names of checkpoints end, the longest first."""

_STEP_KEYS = ("global_step", "step", "iteration", "iter")
# Not at the end of another word, such as a timestep.
_STEP_NAME, _EPOCH_NAME = (
    re.compile(rf"(?<![a-z])(?:{words})s?[=_.-]?(\d+)", re.IGNORECASE) for words in ("step|iter|iteration", "epoch")
)
_FOLDER = re.compile(r"(?:checkpoint|step|epoch|iter)[-_=]\d+")  # of the Trainer, and of accelerate's examples
_WHOLE = re.compile(r"(?<!\d)(?<!\d\.)\d+(?!\d|\.\d)")  # no digits of a fraction, such as a loss
_MOST_STATE = 1 << 28  # bytes of a trainer_state.json, which grows with the log of the run


@dataclass(frozen=True)
class Checkpoint:
    """A saved model: where it is, its optimizer step (or what orders it), and its epoch where that is known."""

    path: Path
    step: int
    epoch: int | None = None


def checkpoints_in_order(paths: str | Path | Sequence[str | Path]) -> list[Checkpoint]:
    """The checkpoints that paths and patterns stand for, in the order of their steps.

    The step is what the checkpoint says (`global_step` of Lightning and of Trainer's `trainer_state.json`; `step`,
    `iteration` or `iter` of a file of your own); else the step in its name (`step=400`); else the epoch that it or its
    name says; else the last whole number in the names (`model_010.pt`). The first of these that tells all checkpoints
    apart counts; if there is none, the first that leaves only copies at one step (`last.ckpt`), of which the first by
    name counts, which is said. A single checkpoint without any of these is of step 0.

    Args:
        paths: Files, folders of one checkpoint (Trainer's `checkpoint-500`), folders of many, or patterns
            (`"checkpoints/*.ckpt"`, `**` for any depth), of which files that are no checkpoints are left out.

    Raises:
        NoSuchFile: if nothing is there, naming the path or pattern.
        InvalidArgument: if the steps cannot be told, naming some of the checkpoints.
        WWMonitorError: if a checkpoint cannot be read.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for epoch in (2, 10, 1):
    ...         torch.save({"fc.weight": torch.zeros(9, 9)}, f"{folder}/net_{epoch}.pt")
    ...     [(found.path.name, found.step) for found in checkpoints_in_order(f"{folder}/*.pt")]
    [('net_1.pt', 1), ('net_2.pt', 2), ('net_10.pt', 10)]
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    # Each once: patterns may overlap.
    found = list(dict.fromkeys(inner for one in given for path in _existing(one) for inner in _inside(path)))
    if not found:
        raise NoSuchFile(f"replay: expected checkpoints ({', '.join(SUFFIXES)}) at {', '.join(map(str, given))}")
    heads = [_head(path) for path in found]
    epochs = [_first(head, ("epoch",)) for head in heads]
    known: dict[int, Checkpoint] = {}
    copies = []
    for path, step, epoch in sorted(zip(found, _steps(found, heads), epochs, strict=True), key=lambda one: one[0]):
        if step in known:
            copies.append(f"{path} (step {step}, as {known[step].path})")
        else:
            known[step] = Checkpoint(path, step, epoch)
    if copies:
        shown = ", ".join(copies[:4]) + f" and {len(copies) - 4} more" * (len(copies) > 4)
        warn(f"replay: left out {len(copies)} of {len(found)} checkpoints, of a step that another one has: {shown}")
    return [known[step] for step in sorted(known)]


def _existing(given: str | Path) -> list[Path]:
    path = Path(given)
    try:
        if path.exists():
            return [path]
        found = [one for one in map(Path, glob(str(given), recursive=True)) if one.is_dir() or _stem(one) != one.name]
    except (OSError, ValueError) as error:  # a name that is too long, or has a null byte
        raise NoSuchFile(f"replay: no file, folder or pattern {str(given)!r}: {error}") from error
    if not found:
        raise NoSuchFile(f"replay: no checkpoint ({', '.join(SUFFIXES)}) matches {str(given)!r}")
    return sorted(found)


def _inside(path: Path) -> list[Path]:
    """The path itself, or the checkpoints in a folder that has many."""
    if not path.is_dir():
        return [path]
    many = [inner for inner in path.iterdir() if _FOLDER.fullmatch(inner.name) and inner.is_dir()]
    if many:
        return sorted(many)
    files = sorted(inner for inner in path.iterdir() if _stem(inner) != inner.name and inner.is_file())
    try:
        own = weight_files(path).paths
    except WWMonitorError:
        own = ()
    # Several .weights.h5 are taken for checkpoints of a run, not for parts of one model.
    return [path] if own and not all(one.name.endswith(".weights.h5") for one in own) else files


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)]


def _head(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its weights; nothing is read but what is small, or mapped."""
    if path.is_dir():
        state = path / "trainer_state.json"
        try:
            if state.is_file() and state.stat().st_size < _MOST_STATE:
                content = json.loads(state.read_text(encoding="utf-8"))
                return dict(content)
        except (ValueError, TypeError, RecursionError) as error:
            raise WWMonitorError(f"replay: {state} is damaged: {str(error)[:200]}") from error
        return {}
    if not path.name.lower().endswith(TORCH) or not path.is_file() or is_script(path):
        return {}
    content = content_of(path)
    return content if isinstance(content, dict) else {}


def _first(head: dict[str, Any], keys: Sequence[str]) -> int | None:
    for key in keys:
        value = head.get(key)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**63:
            return int(value)
    return None


def _steps(paths: Sequence[Path], heads: Sequence[dict[str, Any]]) -> list[int]:
    names = [f"{path.parent.name}/{_stem(path)}" for path in paths]
    said, epochs = ([_first(head, keys) for head in heads] for keys in (_STEP_KEYS, ("epoch",)))
    by_step, by_epoch = (_named(pattern, names) for pattern in (_STEP_NAME, _EPOCH_NAME))
    numbers = [[int(number) for number in _WHOLE.findall(name)] for name in names]
    columns = list(zip(*numbers, strict=True)) if len(set(map(len, numbers))) == 1 else []
    for steps in (said, by_step, epochs, by_epoch, *reversed(columns)):
        found = [step for step in steps if step is not None]
        if len(found) == len(set(found)) == len(paths):
            return found
    # some are copies of others, as of the last or the best one: where nothing tells them apart
    known = [epoch if epoch is not None else named for epoch, named in zip(epochs, by_epoch, strict=True)]
    apart = [_WHOLE.findall(_stem(path)) or None for path in paths]
    for steps, marks in ((said, known), (by_step, known), (epochs, apart)):
        found = [step for step in steps if step is not None]
        if len(found) == len(paths) and not _contradicted(found, marks):
            return found
    if len(paths) == 1:
        return [0]
    shown = ", ".join(path.name for path in paths[:4])
    raise InvalidArgument(
        f"replay: cannot tell the order of {len(paths)} checkpoints ({shown}{', …' if len(paths) > 4 else ''});"
        " expected a `global_step` in each, or names with step=N, epoch=N or a number that differs in all"
    )


def _contradicted(steps: Sequence[int], marks: Sequence[object]) -> bool:
    """Whether checkpoints of one step have different marks; one without a mark may be a copy of any."""
    marked = {(step, str(mark)) for step, mark in zip(steps, marks, strict=True) if mark is not None}
    return len(marked) > len({step for step, _ in marked})


def _named(pattern: re.Pattern[str], names: Sequence[str]) -> list[int | None]:
    hits = [pattern.findall(name) for name in names]
    return [int(hit[-1]) if hit else None for hit in hits]  # the folder's come before the file's own


@dataclass(frozen=True, eq=False)
class ReplayOptions(SourceOptions):
    """What `replay_checkpoints` takes."""

    where: ClassVar[str] = "replay"
    paths: Annotated[
        str | Path | Sequence[str | Path],
        "Checkpoints of one run: files, folders and patterns, as `checkpoints_in_order` takes them.",
    ]
    _: KW_ONLY
    path: Annotated[str | Path, "The history file; what it has already is not made again."]
    progress: Annotated[
        Progress | None, "Called after each checkpoint with the share of them that is done, from 0 to 1."
    ] = None


@taking(ReplayOptions)
def replay_checkpoints(given: ReplayOptions) -> Iterator[Snapshot]:
    """The history of a run from its saved checkpoints, as a monitor would have written it, in the order of their steps.

    Each snapshot is in the file before it is given. A replay that was killed goes on when it is called again: the file
    is then what it would have been, the times in it apart. The same rules apply as in training.

    Returns:
        The snapshots one by one, those that the file had first.

    Raises:
        NoSuchFile: if there is no checkpoint.
        InvalidArgument: if the steps cannot be told, there is no matrix to analyse, or the file is of another replay:
            of another preset, or with a later step than a checkpoint that it lacks.
        WWMonitorError: if a checkpoint or the file cannot be read, naming it; what came before it is in the file.
    """
    options = Options(**AnalysisOptions.of(given).keywords())
    check_split(given.where, given.split)
    check_lora(given.where, given.lora)
    todo = checkpoints_in_order(given.paths)
    target = Path(given.path)
    saved = _saved(target)
    missing = _missing(todo, saved, target, given.preset)
    return _replayed(given, options, todo, saved, missing, JsonLines(target))


def _saved(path: Path) -> History:
    """What a file has, which then ends with a whole line."""
    if not path.exists() or not path.stat().st_size:
        return History()
    with path.open("r+b") as file:
        data = file.read()
        whole, _, last = data.rpartition(b"\n")
        if last and _is_json(last):  # killed before the end of the line alone was written
            file.write(b"\n")
        elif last and begins_as_ours(last):
            file.truncate(len(data) - len(last))
            last = b""
    saved = History.read(path) if whole or last else History()
    if (whole or last) and not len(saved):
        raise InvalidArgument(f"replay: expected a history file or none, got {path}; give another file")
    return saved


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _missing(todo: Sequence[Checkpoint], saved: History, path: Path, preset: str) -> list[Checkpoint]:
    done = {snapshot.step for snapshot in saved}
    missing = [one for one in todo if one.step not in done]
    if len(saved) and saved.last.preset != preset:
        raise InvalidArgument(f"replay: {path} is of preset {saved.last.preset!r}; got {preset!r}; give another file")
    latest = max((step for step in done if step is not None), default=-1)
    if missing and missing[0].step < latest:
        raise InvalidArgument(
            f"replay: {missing[0].path} is of step {missing[0].step}, before the last one in {path}, {latest};"
            " give another file"
        )
    return missing


def _replayed(
    given: ReplayOptions,
    options: Options,
    todo: Sequence[Checkpoint],
    saved: History,
    missing: Sequence[Checkpoint],
    sink: JsonLines,
) -> Iterator[Snapshot]:
    spectra, seen = LastSpectra(), History()
    holding = Holding(TRAINING_RULES, stop_on=None, patience=1)
    count = 0

    def judged(snapshot: Snapshot) -> Snapshot:
        nonlocal count
        count += 1
        found = holding.judge(History([*seen, snapshot]), failed=_failed)
        seen.append(snapshot.with_findings(found))
        seen.forget(latest=LOOKBACK)
        return seen.last

    def told(snapshot: Snapshot) -> Snapshot:
        if given.progress is not None:
            given.progress(count / (len(saved) + len(missing)))
        return snapshot

    try:
        for snapshot in saved:
            yield told(judged(snapshot))
        last = next((one for one in todo if len(saved) and one.step == saved.last.step), None)
        if last is not None and missing:  # the next one's drift is from its spectra, which no file holds
            spectra.measure(_snapshot(given, last, options))
        for checkpoint in missing:
            snapshot = judged(spectra.measure(_snapshot(given, checkpoint, options)))
            sink.write(snapshot)
            yield told(snapshot)
    finally:
        sink.close()


def _snapshot(given: ReplayOptions, checkpoint: Checkpoint, options: Options) -> Snapshot:
    snapshot = analyze_matrices(given.items(checkpoint.path), options, step=checkpoint.step, epoch=checkpoint.epoch)
    if not snapshot.layers:
        raise InvalidArgument(f"replay: {checkpoint.path}: expected a matrix to analyse, got {none_of(snapshot)}")
    return snapshot


def none_of(snapshot: Snapshot) -> str:
    """Why a snapshot has no layer."""
    skipped = snapshot.skipped
    return f"none of {len(skipped)}, such as {skipped[0].name}: {skipped[0].reason}" if skipped else "none"


def _failed(rule: str, error: Exception) -> None:
    raise WWMonitorError(f"replay: rule {rule} failed: {type(error).__name__}: {error}") from error

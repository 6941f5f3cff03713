"""Commands about runs: replay, report, watch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ww_monitor.checkpoints import SUFFIXES, Checkpoint, checkpoints_in_order, replay_checkpoints
from ww_monitor.cli.models import Device, Part, Preset
from ww_monitor.cli.terminal import Exclude, Include, app, progress
from ww_monitor.cli.watching import watch_run
from ww_monitor.errors import InvalidArgument, NoSuchFile, WWMonitorError
from ww_monitor.record import History, Snapshot
from ww_monitor.report import write_report
from ww_monitor.report.recording import history_file
from ww_monitor.rules import LOOKBACK, TRAINING_RULES, Holding
from ww_monitor.sinks.console import table

REPLAYED = "ww_replay.jsonl"
"""Where the history of checkpoints goes, in the folder that they are in; a run's own is left as it is."""


@app.command()
def replay(
    run: Annotated[
        list[str],
        typer.Argument(help="A history file or a folder that has one; or checkpoints: files, folders, 'ckpts/*.ckpt'."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"Of checkpoints: the history file; else {REPLAYED} by them.")
    ] = None,
    preset: Preset = "default",
    include: Include = None,
    exclude: Exclude = None,
    device: Device = None,
    part: Part = "",
) -> None:
    """Apply today's rules to a history file, or make the history of saved checkpoints, in the order of their steps.

    Prints every finding that begins or ends, then the table of layers. A replay of checkpoints that was stopped goes on
    when it is started again.
    """
    path = _history(run)
    if path is not None:
        if output or preset != "default" or include or exclude or device or part:
            raise typer.BadParameter(f"{path} is a history, whose rows stand; the options are for checkpoints")
        return _tell(_judged(path))
    found = _checkpoints(run)
    target = output or found[0].path.parent / REPLAYED
    with progress("replaying") as told:
        snapshots = replay_checkpoints(
            [one.path for one in found],
            path=target,
            preset=preset,  # type: ignore[arg-type]
            include=include or (),
            exclude=exclude or (),
            device=device,
            part=part,
            progress=told,
        )
        _tell(snapshots)
    typer.echo(target)
    return None


def _history(run: Sequence[str]) -> Path | None:
    """The history file that is meant, if one is."""
    if len(run) > 1 or not Path(run[0]).exists() or run[0].lower().endswith(SUFFIXES):
        return None
    path = Path(run[0])
    if path.is_dir():
        try:
            found = history_file(path, where="replay")
        except InvalidArgument:
            return None
        return None if found.name == REPLAYED else found  # its folder has checkpoints: the replay goes on
    return path


def _checkpoints(run: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints that are meant; of a folder without any it is said what it has of histories."""
    try:
        return checkpoints_in_order(run)
    except NoSuchFile as error:
        if len(run) == 1 and Path(run[0]).is_dir():
            try:
                history_file(Path(run[0]), where="replay")
            except InvalidArgument as histories:
                raise InvalidArgument(f"{histories}; and no checkpoint ({', '.join(SUFFIXES)})") from error
        raise


def _judged(path: Path) -> Iterator[Snapshot]:
    """The snapshots of a history file with the findings that today's rules see begin and end."""
    holding, seen = Holding(TRAINING_RULES, stop_on=None, patience=1), History()

    def failed(rule: str, error: Exception) -> None:
        raise WWMonitorError(f"{path}: rule {rule} failed: {type(error).__name__}: {error}") from error

    history = History.read(path)
    if not len(history):
        raise InvalidArgument(f"replay: {path}: expected a snapshot, got none")
    for snapshot in history:
        seen.append(snapshot)
        seen.forget(latest=LOOKBACK + 1)  # with the one that is judged
        yield snapshot.with_findings(holding.judge(seen, failed=failed))


def _tell(snapshots: Iterator[Snapshot]) -> None:
    seen = History()
    for snapshot in snapshots:
        seen.append(snapshot)
        seen.forget(latest=1)  # the table is of the first and the last
        for finding in snapshot.findings:
            typer.echo(str(finding))
    typer.echo(table(seen))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A history file, or a folder that has one.")],
    other: Annotated[Path | None, typer.Argument(help="A second run, shown beside the first.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Write what a run has shown, or two side by side, as one page that opens from disk."""
    typer.echo(write_report(run, other, path=output))


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A history file, or a folder that has one or will have.")],
    interval: Annotated[float, typer.Option(help="Seconds between two looks at the file.")] = 2.0,
    layers: Annotated[int, typer.Option(help="How many of the worst layers to show.")] = 12,
    once: Annotated[bool, typer.Option("--once", help="Show it once; so it is where there is no terminal.")] = False,
) -> None:
    """Show a run while it is still writing: its worst layers, findings, and when the next analysis is due."""
    if not interval > 0 or layers < 1:
        raise typer.BadParameter(f"expected --interval > 0 and --layers >= 1; got {interval:g} and {layers}")
    watch_run(run, interval=interval, layers=layers, once=once)

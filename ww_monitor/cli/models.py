"""Commands about models: analyze, compare, describe, plan, metrics."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ww_monitor.analysis import analyze as analyze_model
from ww_monitor.checkpoints import none_of
from ww_monitor.cli.terminal import (
    AsCsv,
    AsJson,
    Exclude,
    Include,
    app,
    choices,
    number,
    one_of,
    print_table,
    progress,
    write_csv,
    write_json,
)
from ww_monitor.compare import distances
from ww_monitor.description import Rates, measured_rates
from ww_monitor.description import describe as describe_model
from ww_monitor.errors import InvalidArgument
from ww_monitor.metric import metrics as all_metrics
from ww_monitor.plan import BUILT_IN, OVERALL, PER_RANK, configured, plan_ranks
from ww_monitor.record import Snapshot
from ww_monitor.report import write_report
from ww_monitor.sinks.console import MARK

FAIL_ON = {"traps": "trap", "over-trained": "over_trained", "broken-layers": "broken_layer"}
"""Choices of `--fail-on`, and the rule whose finding counts."""

_NEEDS = {"traps": "num_traps", "over-trained": "alpha", "broken-layers": ""}

_OF_LAYERS = {"num_spikes": "spikes", "trap_headroom": "headroom", "num_traps": "traps"}
_SHOWN = {"alpha": "alpha", "alpha_hat": "alpha-hat", "alpha_weighted": "alpha-hat", **_OF_LAYERS}
"""Metric → head of its column, as far as a preset measures it."""

Preset = Annotated[str, typer.Option(help="Definitions to follow: default or weightwatcher.")]
Device = Annotated[str | None, typer.Option(help="Where weights are analysed, such as cuda; else on the host.")]
Part = Annotated[str, typer.Option(help="Which of several state dicts in a checkpoint, such as ema.")]


@app.command()
def analyze(
    path: Annotated[str, typer.Argument(help="A checkpoint: a file, an index of shards, or a folder.")],
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    html: Annotated[Path | None, typer.Option(help="Write a page that opens from disk, too.")] = None,
    preset: Preset = "default",
    include: Include = None,
    exclude: Exclude = None,
    device: Device = None,
    part: Part = "",
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help=f"Exit with status 3 on {', '.join(FAIL_ON)}, and on what cannot be judged."),
    ] = None,
) -> None:
    """Analyse a checkpoint: spectra, metrics and findings of every weight matrix."""
    one_of(json=as_json, csv=as_csv)
    asked = choices("fail-on", fail_on, list(FAIL_ON))
    if html is not None and html.is_dir():
        raise typer.BadParameter(f"--html must be a file; got the folder {html}")
    with progress("analysing") as told:
        snapshot = analyze_model(
            path,
            preset=preset,  # type: ignore[arg-type]
            include=include or (),
            exclude=exclude or (),
            device=device,
            part=part,
            progress=told,
        )
    if not snapshot.layers:  # a gate that looks at nothing would always be passed
        raise InvalidArgument(f"analyze: {path}: expected a matrix to analyse, got {none_of(snapshot)}")
    if as_json:
        typer.echo(snapshot.to_json())
    elif as_csv:
        frame = snapshot.to_pandas()
        rows = [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]
        write_csv(rows, list(frame.columns))
    else:
        _print_snapshot(path, snapshot)
    if html is not None:
        typer.echo(write_report(snapshot, path=html, names=[path]), err=as_json or as_csv)
    _fail_on(asked, snapshot)


def _print_snapshot(path: str, snapshot: Snapshot) -> None:
    measured = {name for layer in snapshot.layers for name in layer.metrics}
    shown = {name: title for name, title in _SHOWN.items() if name in measured}
    rows = [
        [
            layer.name,
            layer.verdict or layer.status,
            "×".join(str(size) for size in layer.shape if size > 1),
            *(number(layer.value(name)) for name in shown),
        ]
        for layer in snapshot.layers
    ]
    head = ["layer", "verdict", "shape", *shown.values()]
    title = f"{path}: {len(rows)} matrices, {len(snapshot.skipped)} skipped, {snapshot.seconds:.1f} s"
    print_table(head, rows, title=title, text=2)
    known = [name for name in (*_SHOWN, "stable_rank") if name in snapshot.summary and name not in _OF_LAYERS]
    typer.echo("model: " + ", ".join(f"{name} {number(snapshot.summary[name])}" for name in known))
    for finding in snapshot.findings:
        typer.echo(f"{MARK[finding.severity]} {finding}")


def _fail_on(asked: list[str], snapshot: Snapshot) -> None:
    measured = {name for layer in snapshot.layers for name in layer.metrics}
    for choice in asked:
        if _NEEDS[choice] and snapshot.layers and _NEEDS[choice] not in measured:
            raise typer.BadParameter(f"--fail-on {choice} needs {_NEEDS[choice]}, which this preset leaves out")
        rules = {FAIL_ON[choice], "broken_layer"}  # what has no spectrum has not passed
        hit = [finding.layer for finding in snapshot.findings if finding.rule in rules]
        if hit:
            more = f" and {len(hit) - 3} more" * (len(hit) > 3)
            typer.echo(f"ww-monitor: --fail-on {choice}: {', '.join(hit[:3])}{more}", err=True)
            raise typer.Exit(3)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A checkpoint, as for analyze.")],
    b: Annotated[str, typer.Argument(help="The one to compare it with.")],
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    include: Include = None,
    exclude: Exclude = None,
    part: Part = "",
    part_b: Annotated[str | None, typer.Option(help="The same for the second; without it as the first.")] = None,
    unpaired: Annotated[str, typer.Option(help="error, or skip what has no partner of its name and shape.")] = "error",
) -> None:
    """Compare two models layer by layer: distance, similarity, and the overlap of their leading directions."""
    one_of(json=as_json, csv=as_csv)
    found = distances(
        a,
        b,
        include=include or (),
        exclude=exclude or (),
        part=part,
        part_b=part_b,
        unpaired=unpaired,  # type: ignore[arg-type]
    )
    if not found.rows and not found.unpaired:
        raise InvalidArgument(f"compare: {a} and {b}: expected a matrix to compare, got none")
    columns = ["name", "shape", *found.summary]
    if as_json:
        data = {"rows": [asdict(row) for row in found.rows], "summary": found.summary, "unpaired": found.unpaired}
        return write_json(data)
    if as_csv:
        sizes = [{**asdict(row), "shape": "x".join(map(str, row.shape))} for row in found.rows]
        return write_csv(sizes, columns)
    rows = [
        [
            row.name,
            "×".join(str(size) for size in row.shape if size > 1),
            *(_small(getattr(row, n)) for n in columns[2:]),
        ]
        for row in found.rows
    ]
    print_table(columns, [*rows, ["mean", "", *map(_small, found.summary.values())]], title=f"{a} and {b}")
    for name, reason in found.unpaired.items():
        typer.echo(f"left out {name}: {reason}")
    return None


def _small(value: float) -> str:
    return "–" if value != value else f"{value:.3g}"


@app.command()
def describe(
    path: Annotated[str, typer.Argument(help="A checkpoint, as for analyze.")],
    as_json: AsJson = False,
    include: Include = None,
    exclude: Exclude = None,
    part: Part = "",
) -> None:
    """Say what analyze would do, what it would cost on this machine, and what it would skip and why."""
    found = describe_model(path, include=include or (), exclude=exclude or (), part=part)
    if as_json:
        write_json(asdict(found))
    else:
        typer.echo(found)


@app.command()
def metrics(preset: Preset = "default") -> None:
    """Print the table of metrics as Markdown: key, unit, definition, how to read it, source."""
    typer.echo(metrics_markdown(preset))


def metrics_markdown(preset: str = "default") -> str:
    """The table of metrics of a preset, one line a metric."""
    lines = ["| key | unit | definition | how to read it | model value | source |", "|---|---|---|---|---|---|"]
    for entry in all_metrics(preset):
        key = f"`{entry.name}`" + ("" if entry.standard else " (on request)")
        cells = (key, entry.unit, entry.definition, entry.read, entry.reduce.__name__, entry.source)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


@app.command()
def plan(
    model_config: Annotated[
        list[str], typer.Argument(help=f"A Hugging Face config.json or its folder, or one of {', '.join(BUILT_IN)}.")
    ],
    world_size: Annotated[list[int] | None, typer.Option(help="Ranks; may be given more than once.")] = None,
    sharding: Annotated[str, typer.Option(help="How weights lie on the ranks: fsdp (FSDP2) or ddp.")] = "fsdp",
    dtype: Annotated[str, typer.Option(help="Of the stored weights: float32, bfloat16 or float16.")] = "float32",
    rate: Annotated[
        str | None, typer.Option(help="GFLOP/s of a rank in float64: GRAM,EIGENVALUES, such as 20,8; else measured.")
    ] = None,
    per_rank: Annotated[bool, typer.Option("--per-rank", help="One line a rank.")] = False,
) -> None:
    """Compute, from shapes alone, what an analysis would cost on many ranks: cost, balance, bytes, memory."""
    rows: list[list[str]] = []
    rates = measured_rates() if rate is None else _rates(rate)
    for model in model_config:
        items, path = configured(model), Path(model).absolute()
        name = (path.parent if path.name == "config.json" else path).name
        for ranks in world_size or (1, 8, 64, 1024):
            found = plan_ranks(items, ranks, sharding=sharding, dtype=dtype, rates=rates)
            rows += [[name, str(ranks), *cells] for cells in (found.per_rank() if per_rank else [found.overall()])]
    typer.echo(
        f"Computed from shapes, not measured: {sharding}, {dtype}; {rates.gram / 1e9:.3g} GFLOP/s for Gram matrices "
        f"and {rates.solve / 1e9:.3g} for eigenvalues in float64 on each rank "
        f"({'measured here' if rate is None else 'as given'}); no time for what is moved.\n"
    )
    head = ["model", "ranks", *(PER_RANK if per_rank else OVERALL)]
    typer.echo("\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)))


def _rates(given: str) -> Rates:
    try:
        gram, solve = (1e9 * float(part) for part in given.split(","))
    except ValueError:
        gram = solve = 0.0
    if not (0 < gram < float("inf") and 0 < solve < float("inf")):
        raise InvalidArgument(f"plan: rate must be two numbers of GFLOP/s, GRAM,EIGENVALUES; got {given!r}")
    return Rates(gram, solve)

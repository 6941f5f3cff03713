"""ww-monitor: the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError as error:
    from ww_monitor.errors import MissingDependency

    raise MissingDependency("ww-monitor: the command line needs typer; pip install 'ww-monitor[cli]'") from error

from ww_monitor.description import Rates, measured_rates
from ww_monitor.errors import InvalidArgument, MissingDependency, WWMonitorError
from ww_monitor.metric import metrics as all_metrics
from ww_monitor.plan import BUILT_IN, OVERALL, PER_RANK, configured, plan_ranks
from ww_monitor.record import Finding, History
from ww_monitor.report import write_report
from ww_monitor.rules import TRAINING_RULES, apply_rules, transitions
from ww_monitor.sinks.console import table

app = typer.Typer(help="Spectra of the layers of a network, and what they say.", no_args_is_help=True)


@app.command()
def metrics(preset: str = "default") -> None:
    """Print the table of metrics as Markdown: key, unit, definition, how to read it, source."""
    typer.echo(metrics_markdown(preset))


@app.command()
def replay(history_file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)]) -> None:
    """Apply today's rules to a history file: every finding that begins or ends, then the table of layers."""
    seen = History()
    active: list[Finding] = []
    for snapshot in History.read(history_file):
        seen.append(snapshot)
        holding = apply_rules(TRAINING_RULES, seen)
        for finding in transitions(active, holding, step=snapshot.step):
            typer.echo(str(finding))
        active = holding
    typer.echo(table(seen))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A history file, or a folder that has one.")],
    other: Annotated[Path | None, typer.Argument(help="A second run, shown beside the first.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Write what a run has shown, or two side by side, as one page that opens from disk."""
    try:
        typer.echo(write_report(run, other, path=output))
    except (WWMonitorError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


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
    try:
        rates = measured_rates() if rate is None else _rates(rate)
        for model in model_config:
            items, path = configured(model), Path(model).absolute()
            name = (path.parent if path.name == "config.json" else path).name
            for ranks in world_size or (1, 8, 64, 1024):
                found = plan_ranks(items, ranks, sharding=sharding, dtype=dtype, rates=rates)
                rows += [[name, str(ranks), *cells] for cells in (found.per_rank() if per_rank else [found.overall()])]
    except (InvalidArgument, MissingDependency) as error:
        raise typer.BadParameter(str(error)) from error
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


def metrics_markdown(preset: str = "default") -> str:
    """The table of metrics of a preset, one line a metric."""
    lines = ["| key | unit | definition | how to read it | model value | source |", "|---|---|---|---|---|---|"]
    for entry in all_metrics(preset):
        key = f"`{entry.name}`" + ("" if entry.standard else " (on request)")
        cells = (key, entry.unit, entry.definition, entry.read, entry.reduce.__name__, entry.source)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    app()

"""ww-monitor: the command line."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError as error:
    from ww_monitor.errors import MissingDependency

    raise MissingDependency("ww-monitor: the command line needs typer; pip install 'ww-monitor[cli]'") from error

from ww_monitor.errors import InvalidArgument
from ww_monitor.metric import metrics as all_metrics
from ww_monitor.plan import BUILT_IN, RankPlan, Rates, measured_rates, plan_ranks, tables
from ww_monitor.record import Finding, History
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
def plan(
    model_config: Annotated[
        list[str], typer.Argument(help=f"A Hugging Face config.json or its folder, or one of {', '.join(BUILT_IN)}.")
    ],
    world_size: Annotated[list[int] | None, typer.Option(help="Ranks; may be given more than once.")] = None,
    sharding: Annotated[str, typer.Option(help="How weights lie on the ranks: fsdp (FSDP2) or ddp.")] = "fsdp",
    dtype: Annotated[str, typer.Option(help="Of the stored weights: float32, bfloat16 or float16.")] = "float32",
    rate: Annotated[
        str | None,
        typer.Option(help="GFLOP/s of a rank in float64: GRAM,EIGENVALUES, such as 20,8. Measured here if left out."),
    ] = None,
    per_rank: Annotated[bool, typer.Option("--per-rank", help="One line a rank.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Compute, from shapes alone, what an analysis would cost on many ranks: cost, balance, bytes, memory."""
    try:
        rates = measured_rates() if rate is None else _rates(rate)
        plans = [
            (_model_name(model), plan_ranks(model, ranks, sharding=sharding, dtype=dtype, rates=rates))
            for model in model_config
            for ranks in world_size or WORLD_SIZES
        ]
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{_assumptions(rates, sharding, dtype, measured=rate is None)}\n")
    typer.echo(_plan_table(plans, per_rank=per_rank, markdown=markdown))


WORLD_SIZES = (1, 8, 64, 1024)
"""What `plan` looks at if it is not told."""


def _model_name(model: str) -> str:
    """The folder of a `config.json`, else what was given without its folders."""
    path = Path(model).absolute()
    return path.parent.name if path.name == "config.json" else path.name


def _rates(given: str) -> Rates:
    try:
        gram, solve = (1e9 * float(part) for part in given.split(","))
    except ValueError:
        gram = solve = 0.0
    if not (0 < gram < float("inf") and 0 < solve < float("inf")):
        raise InvalidArgument(f"plan: rate must be two numbers of GFLOP/s, GRAM,EIGENVALUES; got {given!r}")
    return Rates(gram, solve)


def _assumptions(rates: Rates, sharding: str, dtype: str, *, measured: bool) -> str:
    source = "measured here" if measured else "as given"
    return (
        f"Computed from shapes, not measured: {sharding}, {dtype}; {rates.gram / 1e9:.3g} GFLOP/s for Gram matrices "
        f"and {rates.solve / 1e9:.3g} for eigenvalues in float64 on each rank ({source}); no time for what is moved."
    )


def _plan_table(plans: Sequence[tuple[str, RankPlan]], *, per_rank: bool, markdown: bool) -> str:
    head = tables.HEAD_PER_RANK if per_rank else tables.HEAD
    rows = [
        line
        for name, one in plans
        for line in (tables.rows_per_rank(name, one) if per_rank else [tables.row(name, one)])
    ]
    return tables.markdown(head, rows) if markdown else _rich_table(head, rows)


def _rich_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    view = Table()
    for number, column in enumerate(head):
        view.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for line in rows:
        view.add_row(*map(escape, line))
    out = StringIO()
    Console(file=out, width=120).print(view)
    return out.getvalue().rstrip("\n")


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

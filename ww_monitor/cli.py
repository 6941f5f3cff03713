"""ww-monitor: the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError as error:
    from ww_monitor.errors import MissingDependency

    raise MissingDependency("ww-monitor: the command line needs typer; pip install 'ww-monitor[cli]'") from error

from ww_monitor.metric import metrics as all_metrics
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

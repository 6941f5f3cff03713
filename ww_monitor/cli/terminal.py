"""What all commands share: the application, errors in one line, progress and tables."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from ww_monitor.errors import SpectralWarning, WWMonitorError

Include = Annotated[list[str] | None, typer.Option(help="Glob on layer names to analyse; may be given more than once.")]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Glob on layer names to leave out; may be given more than once.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, and nothing else.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Write CSV to standard output, and nothing else.")]

UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that this typer brings or uses
_ClickException: Any = UsageError.__mro__[1]


class OneLine(TyperGroup):
    """Whatever is wrong with what was given is one line on standard error and exit status 2."""

    def main(self, args: Sequence[str] | None = None, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """Run a command; see `typer.core.TyperGroup.main`."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        with warnings.catch_warnings(), _said_once(), _keras_on_torch():
            try:
                status = super().main(args, standalone_mode=False, **extra)
            except typer.Abort:
                status = _refused("interrupted", status=130)
            except _ClickException as error:
                status = _refused(_where(error) + error.format_message())
            except BrokenPipeError:  # whoever read standard output has seen enough
                sys.stdout = None  # Python would flush it as it ends, and fail once more
                status = 1
            except (WWMonitorError, OSError, UnicodeError) as error:
                status = _refused(str(error))
        sys.exit(status if isinstance(status, int) else 0)  # what a command returns comes back here, too


def _where(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.info_name}: " if context is not None and context.parent is not None else ""


def _refused(message: str, *, status: int = 2) -> int:
    typer.echo(f"ww-monitor: {_one_line(message)}", err=True)
    return status


def _one_line(message: str) -> str:
    return "".join(char if char.isprintable() else " " for char in " ".join(message.split()))


@contextmanager
def _said_once() -> Iterator[None]:
    """Our warnings as lines on standard error; one of a kind that differs in numbers only, once."""
    said: set[str] = set()
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        kind = re.sub(r"\d+", "", str(message))
        if not issubclass(category, SpectralWarning):
            others(message, category, *where, **more)
        elif kind not in said:
            said.add(kind)
            typer.echo(f"ww-monitor: note: {_one_line(str(message).removeprefix('ww_monitor: '))}", err=True)

    # `catch_warnings` around this puts both back.
    warnings.simplefilter("always", SpectralWarning)
    warnings.showwarning = show
    yield


@contextmanager
def _keras_on_torch() -> Iterator[None]:
    """Let Keras read files on torch, unless another backend is set: TensorFlow takes seconds, and prints its own lines.

    Keras' reader of legacy files imports it whatever the backend is.
    """
    chosen = "KERAS_BACKEND" in os.environ
    unasked = os.environ.setdefault("KERAS_BACKEND", "torch") != "tensorflow" and "tensorflow" not in sys.modules
    if unasked:
        sys.modules["tensorflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if unasked:
            del sys.modules["tensorflow"]
        if not chosen:
            del os.environ["KERAS_BACKEND"]


app = typer.Typer(
    cls=OneLine,
    help="Spectra of the layers of a network, and what they say. Exit status: 2 for bad input, 3 for --fail-on.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(version("ww-monitor"))
        except PackageNotFoundError:  # a source tree that is not installed
            typer.echo("unknown")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Options of no command."""


@contextmanager
def progress(what: str, *, shown: bool | None = None) -> Iterator[Callable[[float], None]]:
    """A bar with the time left on standard error, where that is a terminal; told of shares from 0 to 1."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TextColumn("left")
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal if shown is None else shown),
        redirect_stdout=False,  # what a command writes passes through no bar
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def one_of(**given: bool) -> None:
    """Refuse options of which at most one makes sense."""
    names = [f"--{name}" for name, value in given.items() if value]
    if len(names) > 1:
        raise typer.BadParameter(f"expected one of {' and '.join(names)}, got both")


def choices(name: str, given: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The values of an option that may be given more than once."""
    for value in given or ():
        if value not in known:
            raise typer.BadParameter(f"--{name} must be one of {', '.join(known)}; got {value!r}")
    return list(given or ())


def write_json(data: Any) -> None:
    """One line of strict JSON; what is not known is null."""
    typer.echo(json.dumps(_known(data), allow_nan=False, separators=(",", ":")))


def _known(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _known(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_known(value) for value in data]
    return None if isinstance(data, float) and not abs(data) < float("inf") else data


def write_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A header and a line a row; what is not known is empty."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if (value := row.get(name)) != value else value for name in columns] for row in rows])


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", text: int = 1) -> None:
    """A table on standard output; the first `text` columns are words, the others numbers."""
    typer.echo(drawn(table_of(head, rows, title=title, text=text)))


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", text: int = 1) -> Table:
    """A rich table of cells taken as they are: names are no markup."""
    table = Table(title=Text(title), title_justify="left")
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place < text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def drawn(view: Any, *, width: int | None = None) -> str:
    """What rich makes of it: as wide as the terminal, 100 columns where there is none, in plain text there."""
    console = Console(width=width or (None if sys.stdout.isatty() else 100))
    with console.capture() as captured:
        console.print(view)
    return captured.get().rstrip("\n")


def number(value: float) -> str:
    """Two decimals, or a dash where it is not known."""
    if value != value:
        return "–"
    return f"{value:.2f}".rstrip("0").rstrip(".") if abs(value) < 1e6 else f"{value:.3g}"

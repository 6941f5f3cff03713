"""ww-monitor: the command line."""

try:
    import rich  # noqa: F401 - what typer leaves out in its slim form
    import typer  # noqa: F401
except ImportError as error:
    from ww_monitor.errors import MissingDependency

    raise MissingDependency(
        "ww-monitor: the command line needs typer and rich; pip install 'ww-monitor[cli]'"
    ) from error

from ww_monitor.cli import models, runs
from ww_monitor.cli.models import metrics_markdown
from ww_monitor.cli.terminal import app

__all__ = ["app", "metrics_markdown", "models", "runs"]

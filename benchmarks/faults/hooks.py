"""Hooks under fire: whatever a hook calls raises, once in each trainer, and the run ends with the same weights.

    python -m benchmarks.faults.hooks [--quick]

The last line is a JSON object with how many runs were tried and how many survived.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.test_contracts_callbacks import FRAMEWORKS, Run

ADAPTER, SESSION = "ww_monitor.callbacks._adapter", "ww_monitor.callbacks._session"
MONITOR, SCHEDULE = "ww_monitor.monitor.monitor", "ww_monitor.schedule"

COLLABORATORS = (
    f"{ADAPTER}.walk_source",
    f"{SESSION}.table",
    f"{SESSION}.Session.__init__",
    f"{SESSION}.Session.announce",
    f"{SESSION}.Session.say",
    f"{SESSION}.Session.show_table",
    f"{SESSION}.Session.close",
    f"{SESSION}.JsonLines.__init__",
    f"{SESSION}.JsonLines.write",
    f"{SESSION}.JsonLines.close",
    f"{SESSION}.Console.write",
    f"{ADAPTER}.Dashboards.update",
    f"{ADAPTER}.Dashboards.finish",
    f"{ADAPTER}.Adapter._open",
    f"{ADAPTER}.Adapter._snapshot",
    f"{ADAPTER}.Adapter._close",
    f"{ADAPTER}.Adapter._announce",
    f"{ADAPTER}.Adapter._show_table",
    f"{MONITOR}.warm_up",
    f"{MONITOR}.wait_for_queued",
    f"{MONITOR}.Analyzer.analyze",
    f"{MONITOR}.Analyzer.join",
    f"{MONITOR}.Analyzer.next_done",
    f"{MONITOR}.Analyzer.close",
    f"{MONITOR}.Holding.judge",
    f"{SCHEDULE}.Budget.start",
    f"{SCHEDULE}.Budget.stop",
    f"{SCHEDULE}.Budget.tick",
    f"{SCHEDULE}.Budget.spent",
    f"{MONITOR}.Monitor.begin",
    f"{MONITOR}.Monitor.restart",
    f"{MONITOR}.Monitor.due",
    f"{MONITOR}.Monitor.due_at_epoch_end",
    f"{MONITOR}.Monitor.is_seen",
    f"{MONITOR}.Monitor.timed",
    f"{MONITOR}.Monitor.observe",
    f"{MONITOR}.Monitor.collect",
    f"{MONITOR}.Monitor.finish",
    f"{MONITOR}.Monitor.close",
    f"{MONITOR}.Monitor.state_dict",
    "ww_monitor.record.History.append",
    "ww_monitor.record.Snapshot.scalars",
    "ww_monitor.record.Snapshot.to_json",
    "ww_monitor.record.Snapshot.with_findings",
    "ww_monitor.settings.Select.apply",
)
"""What every hook calls, in the monitor and around it."""

OWN = {
    "lightning": ("ww_monitor.callbacks.lightning._printer", "ww_monitor.callbacks.lightning._folder"),
    "huggingface": (
        "ww_monitor.callbacks.huggingface.calling_object",
        "ww_monitor.callbacks.huggingface._epoch",
        "ww_monitor.callbacks.huggingface._tracker",
        "ww_monitor.callbacks.huggingface._print_line",
        "ww_monitor.callbacks.huggingface._WhenSaved.__init__",
    ),
    "keras": (
        "ww_monitor.callbacks.keras.calling_object",
        "ww_monitor.callbacks.keras._processes",
        "ww_monitor.callbacks.keras._log_key",
    ),
}
"""What the hooks of one trainer call besides, and methods of its callback by name."""

QUICK = 6
"""Of the shared collaborators a quick run takes every sixth."""


@contextmanager
def raising(name: str) -> Iterator[None]:
    """What is called `name` raises, whoever calls it."""
    where, _, attribute = name.rpartition(".")
    try:
        owner = import_module(where)
    except ImportError:
        module, _, kind = where.rpartition(".")
        owner = getattr(import_module(module), kind)

    def raises(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError(f"{attribute} fails")

    is_property = isinstance(vars(owner).get(attribute), property)
    with mock.patch.object(owner, attribute, property(raises) if is_property else raises):
        yield


def collaborators(framework: Any) -> Iterator[str]:
    """All that is replaced in the hooks of one trainer: functions, then the private methods of its callback."""
    yield from COLLABORATORS
    name = framework.SpectralMonitor.__module__
    yield from OWN[name.rpartition(".")[2]]
    for method, value in vars(framework.SpectralMonitor).items():
        if method.startswith("_") and not method.startswith("__") and (callable(value) or isinstance(value, property)):
            yield f"{name}.SpectralMonitor.{method}"


def survives(framework: Any, name: str, plain: Run, folder: Path) -> bool:
    """Whether a run in which `name` raises ends at the same step with the same weights."""
    folder.mkdir()
    monitor = framework.spectral_monitor(folder, every_n_steps=2, stop_on="traps")
    try:
        with raising(name):
            run = framework.train(folder, monitor, save=True)
    except Exception as error:  # noqa: BLE001 - that is what is counted
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return run.steps == plain.steps and all(map(torch.equal, run.matrices, plain.matrices))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every sixth of the shared collaborators")
    quick = parser.parse_args().quick
    tried, lost = 0, []
    warnings.simplefilter("ignore")
    for kind, make in FRAMEWORKS.items():
        framework = make()
        with tempfile.TemporaryDirectory() as folder:
            plain = framework.train(Path(folder) / "plain")
            names = list(collaborators(framework))
            for number, name in enumerate(names[::QUICK] if quick else names):
                tried += 1
                if not survives(framework, name, plain, Path(folder) / str(number)):
                    lost.append(f"{kind}: {name}")
    print(json.dumps({"tried": tried, "survived": tried - len(lost), "lost": lost}))


if __name__ == "__main__":
    main()

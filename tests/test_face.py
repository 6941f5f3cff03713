"""The public face: what the package offers, and how quietly it is imported."""

from types import ModuleType

import pytest

import ww_monitor
from tests.processes import run_python

FRAMEWORKS = (
    "pytorch_lightning",
    "lightning",
    "transformers",
    "accelerate",
    "keras",
    "tensorflow",
    "jax",
    "wandb",
    "tensorboard",
    "matplotlib",
    "plotly",
    "pandas",
    "rich",
    "typer",
    "tqdm",
    "weightwatcher",
    "safetensors",
)


def test_all_is_the_public_namespace():
    public = {
        name
        for name, value in vars(ww_monitor).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(ww_monitor.__all__) == public
    assert ww_monitor.__all__ == sorted(ww_monitor.__all__)


@pytest.mark.parametrize("name", ww_monitor.__all__)
def test_everything_public_is_documented(name):
    assert (getattr(ww_monitor, name).__doc__ or "").strip()


def test_the_import_is_silent_also_where_warnings_are_errors():
    done = run_python("-W", "error", "-c", "import ww_monitor")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_torch_that_was_built_without_distributed_will_do():
    """There `torch.distributed` has little more than `is_available`."""
    script = """
import sys, types
import torch
for name in [name for name in sys.modules if name.startswith("torch.distributed.")]:
    del sys.modules[name]
torch.distributed = sys.modules["torch.distributed"] = types.ModuleType("torch.distributed")
torch.distributed.is_available = lambda: False
import ww_monitor
for across_ranks in False, True:
    snapshot = ww_monitor.analyze(torch.nn.Linear(30, 20), across_ranks=across_ranks)
    assert [layer.status for layer in snapshot.layers] == ["ok"], snapshot
ww_monitor.Monitor(across_ranks=True)
assert issubclass(ww_monitor.RankFailed, ww_monitor.WWMonitorError)
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def test_the_import_leaves_the_process_as_it_was():
    script = f"""
import logging, random, sys, warnings
import numpy, scipy.fft, scipy.optimize, torch  # scipy adds filters of its own
def state():
    return dict(
        filters=list(warnings.filters),
        show=warnings.showwarning,
        root=(logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        threads=(torch.get_num_threads(), torch.get_num_interop_threads()),
        precision=torch.get_float32_matmul_precision(),
        dtype=torch.get_default_dtype(),
        grad=torch.is_grad_enabled(),
        torch=torch.get_rng_state().tolist(),
        numpy=numpy.random.get_state()[1].tolist(),
        python=random.getstate(),
        errors=numpy.geterr(),
        hook=(sys.excepthook, sys.displayhook),
    )
before, loaded = state(), set(sys.modules)
import ww_monitor
after = state()
print([name for name in before if before[name] != after[name]])
print([name for name in {FRAMEWORKS!r} if name in sys.modules and name not in loaded])
ours = [log for name, log in logging.root.manager.loggerDict.items() if name.startswith("ww_monitor")]
print([log.name for log in ours if isinstance(log, logging.Logger) and (log.handlers or log.level)])
"""
    done = run_python("-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["[]", "[]", "[]"]


def test_an_analysis_imports_no_framework_either():
    script = f"""
import sys, torch
loaded = set(sys.modules)
import ww_monitor
ww_monitor.analyze(torch.nn.Linear(64, 32))
print([name for name in {FRAMEWORKS!r} if name in sys.modules and name not in loaded])
"""
    done = run_python("-c", script)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[]\n")


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert ww_monitor.__version__ == version("ww-monitor")

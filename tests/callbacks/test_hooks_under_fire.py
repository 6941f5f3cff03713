"""Whatever a hook calls raises, in every trainer; `python -m benchmarks.faults.hooks` tries all of it."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.faults.hooks import collaborators, survives
from tests.test_contracts_callbacks import FRAMEWORKS, make, pytestmark  # noqa: F401 - warnings of the frameworks
from ww_monitor import SpectralWarning
from ww_monitor.callbacks import _adapter


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return FRAMEWORKS[request.param]()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that nothing could close
def test_a_run_ends_with_the_same_weights_whatever_its_hooks_meet(framework, tmp_path):
    plain = framework.train(tmp_path / "plain")
    for number, name in enumerate(list(collaborators(framework))[::8]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpectralWarning)
            assert survives(framework, name, plain, tmp_path / str(number)), name


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_passes(framework, tmp_path, monkeypatch, error):
    monitor = make(framework, tmp_path)

    def interrupted(*arguments, **named):
        raise error

    monkeypatch.setattr(monitor.monitor, "due", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        framework.train(tmp_path, monitor)


def test_a_model_that_cannot_be_walked_is_said_once(framework, tmp_path, monkeypatch):
    def fails(*arguments, **named):
        raise AttributeError("a property of the model's")

    monkeypatch.setattr(_adapter, "walk_source", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = framework.train(tmp_path, make(framework, tmp_path))
    ours = [str(warning.message) for warning in caught if issubclass(warning.category, SpectralWarning)]
    assert ours == ["ww_monitor: analysis failed: AttributeError: a property of the model's"]
    assert run.steps == 8


def test_a_warning_that_cannot_be_shown_ends_nothing(framework, tmp_path, monkeypatch):
    def show(message, category, *place, **named):
        if issubclass(category, SpectralWarning):
            raise OSError("stderr is closed")

    def broken(step, matrices):
        with torch.no_grad():
            matrices[1].zero_()

    monitor = make(framework, tmp_path)
    monkeypatch.setattr(_adapter, "walk_source", None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        assert framework.train(tmp_path, monitor, each_step=broken).steps == 8

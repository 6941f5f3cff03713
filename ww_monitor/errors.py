"""What can go wrong, by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np


class WWMonitorError(Exception):
    """Base of every exception this package raises on purpose."""


class InvalidArgument(WWMonitorError, ValueError):
    """An argument has a value that makes no sense; the message names it, its value and the choices."""


class UnknownArgument(InvalidArgument, TypeError):
    """There is no argument of that name; the message names the nearest, or all."""


class LayerError(WWMonitorError):
    """A layer could not be analysed and `strict=True` was asked for; the message names layer and step."""


class RankFailed(WWMonitorError):
    """A rank of a distributed analysis is missing; the message names it, what it last did, and what waited for it."""


class MissingDependency(WWMonitorError, ImportError):
    """An optional package is needed for what was asked; the message says which extra brings it."""


class NoSuchFile(WWMonitorError, FileNotFoundError):
    """There is no file or folder of that name; the message names it, and what was looked for."""


class SpectralWarning(UserWarning):
    """The category of every warning this package issues."""


def check_choice(where: str, argument: str, value: object, choices: Collection[Any]) -> None:
    """Raise `InvalidArgument` unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise InvalidArgument(f"{where}: {argument} must be one of {listed}; got {value!r}")


def as_python(value: Any) -> Any:
    """A number of numpy, such as one of a sweep, as Python's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_positive_int(where: str, argument: str, value: object) -> None:
    """Raise `InvalidArgument` unless `value` is an integer of at least 1."""
    value = as_python(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # to Python True is an int
        raise InvalidArgument(f"{where}: {argument} must be an integer >= 1; got {value!r}")


def check_names(where: str, argument: str, value: object) -> None:
    """Raise `InvalidArgument` unless `value` is a name or a sequence of names, at least one of them."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidArgument(f"{where}: {argument} must be a name or a sequence of names; got {value!r}")


def check_share(where: str, argument: str, value: object) -> None:
    """Raise `InvalidArgument` unless `value` is a number between 0 and 1."""
    value = as_python(value)
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InvalidArgument(f"{where}: {argument} must be between 0 and 1; got {value!r}")

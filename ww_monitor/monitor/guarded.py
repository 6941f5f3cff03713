"""What a failure inside the package costs: one warning a cause, never the run."""

from __future__ import annotations

import logging
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ww_monitor.errors import SpectralWarning

logger = logging.getLogger(__name__)


_OURS = str(Path(__file__).parents[1])
_LIBRARIES = (sysconfig.get_paths()["stdlib"], "<frozen")  # such as contextlib, and what importlib and runpy run


class Guarded:
    """Turns exceptions into one `SpectralWarning` a cause.

    Args:
        strict: Let exceptions pass where a guard does not say `always`.
    """

    def __init__(self, *, strict: bool) -> None:
        self.quiet = False
        self._strict = strict
        self._said: set[str] = set()

    @contextmanager
    def guard(self, what: str, *, key: str = "", always: bool = False) -> Iterator[None]:
        """Turn an exception into one `SpectralWarning` a cause; with `strict` let it pass unless `always`."""
        try:
            yield
        except Exception as error:
            if self._strict and not always:
                raise
            self.say_once(key or f"{what} {type(error).__name__}", f"{what} failed: {told(error)}")
            with suppress(Exception):  # of a filter or a handler of the user's logging
                logger.debug("%s failed", what, exc_info=True)

    def say_once(self, key: str, message: str) -> None:
        """Issue a `SpectralWarning`, once a key; a filter that turns warnings into errors cannot end the run."""
        if key in self._said or self.quiet:
            return
        self._said.add(key)
        with suppress(Exception):  # as above
            try:
                warnings.warn(f"ww_monitor: {message}", SpectralWarning, stacklevel=_users_level())
            except Exception:  # noqa: BLE001 - a filter that makes errors of warnings, or the user's `showwarning`
                logger.warning("%s", message)


def told(error: BaseException) -> str:
    """An exception in words, also one that fails at that itself.

    >>> told(OSError(28, "No space left on device"))
    'OSError: [Errno 28] No space left on device'
    """
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - its own `__str__`
        return type(error).__name__


def _users_level() -> int:
    """The `stacklevel`, for a warning of the caller's, of the user's line: the first that is in no library nor here."""
    # inspect.stack would read the source of every frame
    frame: FrameType | None = sys._getframe(1)
    level, first = 1, 0
    while frame is not None:
        path = frame.f_code.co_filename
        if not (path.startswith(_OURS) or path.startswith(_LIBRARIES)):
            first = first or level  # a library's, where the program itself is one
            if "site-packages" not in path and "dist-packages" not in path:
                return level
        frame, level = frame.f_back, level + 1
    return first or 3

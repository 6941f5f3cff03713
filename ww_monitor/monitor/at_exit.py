"""Monitors that nobody has closed when Python ends, and whether an interrupt is what ends it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from typing import Protocol


class Closable(Protocol):
    """Something that is closed when Python ends."""

    def close(self) -> None:
        """Wait for what is under way, and release."""


_open: dict[Closable, int] = {}
"""Those with work in the background, and the process it was begun in: a forked child has none of it."""


def close(monitor: Closable) -> None:
    """Close it when Python ends, unless it is forgotten before; it lives as long."""
    _register()
    _open[monitor] = os.getpid()


def forget(monitor: Closable) -> None:
    """It is closed."""
    _open.pop(monitor, None)


def interrupted() -> bool:
    """Whether an interrupt is being handled, or has ended the program."""
    error = sys.exc_info()[1]
    if error is None and not threading.main_thread().is_alive():  # Python ends
        error = getattr(sys, "last_value", None)  # what ended it: nothing is being handled any more
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and bool(error.code))


@lru_cache(maxsize=1)
def _register() -> None:
    atexit.register(_close_all)


def _close_all() -> None:
    for monitor, process in list(_open.items()):
        if process == os.getpid():
            with suppress(Exception):  # of an analysis, with `strict`: the others are closed too
                monitor.close()

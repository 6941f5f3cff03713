"""Doctest leaves out the callbacks whose framework is not installed; any other import error is an error."""

from importlib.util import find_spec
from pathlib import Path

NEEDED = {
    "lightning.py": ("pytorch_lightning", "lightning"),
    "huggingface.py": ("transformers",),
    "keras.py": ("keras",),
}

CALLBACKS = Path(__file__).parent / "ww_monitor" / "callbacks"


def pytest_ignore_collect(collection_path):
    """Only what cannot be imported without its framework."""
    needed = NEEDED.get(collection_path.name) if collection_path.parent == CALLBACKS else None
    return True if needed and all(find_spec(name) is None for name in needed) else None

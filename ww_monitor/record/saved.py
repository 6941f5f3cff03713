"""Frozen records as plain data for JSON, and back: what anyone has written is checked field by field.

A record is a dataclass of numbers, texts, tuples, mappings and further records; its annotations say which.
"""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, overload

Record = TypeVar("Record")
Value = TypeVar("Value")

NAN = float("nan")


class computed_once(Generic[Value]):  # noqa: N801 - a decorator, as `property` is
    """A property of a record whose value is computed when it is first read; two threads may both compute it.

    `functools.cached_property` has a lock before Python 3.12, which a forked child waits for in vain where another
    thread of its parent had it.
    """

    def __init__(self, make: Callable[[Any], Value]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, record: None, owner: type) -> computed_once[Value]: ...

    @overload
    def __get__(self, record: object, owner: type) -> Value: ...

    def __get__(self, record: object | None, owner: type) -> computed_once[Value] | Value:
        if record is None:
            return self
        found = vars(record)[self._name] = self._make(record)  # where it is looked for first from now on
        return found


def plain(value: Any) -> Any:
    """What JSON can hold of a value: NaN and infinity become `None`, what is nothing of JSON's a text.

    >>> plain({"alpha": float("inf"), "layers": (1, "fc")})
    {'alpha': None, 'layers': [1, 'fc']}
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    return number(value) if hasattr(value, "__float__") else _text_of(value)


def number(value: Any) -> int | float | None:
    """The number that a value is, also as a scalar of a library's; `None` where it is none, NaN or infinite.

    >>> number(3), number(float("nan")), number("three")
    (3, None, None)
    """
    if isinstance(value, (str, bytes)):
        return None
    for convert in (operator.index, float):  # first as an integer: a float would round one above 2⁵³
        try:
            found = convert(value)
        except Exception:  # noqa: BLE001 - whatever a stranger's object raises, its snapshot is to be kept
            continue
        return found if isinstance(found, int) or math.isfinite(found) else None
    return None


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - as in `number`
        return f"<{type(value).__name__}>"


def restored(kind: type[Record], data: object) -> Record:
    """The record that `plain` has made data of; keys that this version does not know are left out.

    Args:
        kind: The class of the record.
        data: What JSON gave of it, a mapping.

    Raises:
        TypeError: if a value is of another type than its field, naming both.
        ValueError: if a value is none of the choices of its field, or a field without default is missing.
    """
    return cast("Record", _reader(cast("Hashable", kind))(data))


@lru_cache(maxsize=256)
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What turns data into a value of this type."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _record_reader(kind)
    if kind is float:
        return _float
    if origin in (Union, types.UnionType):  # X | None
        (some,) = (_reader(one) for one in inner if one is not type(None))
        return lambda value: None if value is None else some(value)
    if origin is Literal:
        return lambda value: value if value in inner else _refuse(value, f"one of {inner}", ValueError)
    if origin is tuple:
        return _tuple_reader(_reader(inner[0]), None if inner[-1] is Ellipsis else len(inner))
    if origin is not None:  # Mapping[str, X]
        read = _reader(inner[1])
        return lambda value: {str(key): read(one) for key, one in _a(dict, value).items()}
    return lambda value: _a(kind, value)


def _record_reader(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = {one.name: _reader(hints[one.name]) for one in fields(kind)}
    needed = {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}

    def read(data: Any) -> Any:
        given = _a(dict, data)
        if missing := needed - given.keys():
            raise ValueError(f"expected {kind.__name__} to have {sorted(missing)}")
        return kind(**{name: readers[name](value) for name, value in given.items() if name in readers})

    return read


def _tuple_reader(read: Callable[[Any], Any], length: int | None) -> Callable[[Any], Any]:
    def read_all(value: Any) -> Any:
        found = tuple([read(one) for one in (value if isinstance(value, tuple) else _a(list, value))])
        return found if length in (None, len(found)) else _refuse(value, f"{length} values", ValueError)

    return read_all


def _float(value: Any) -> float:
    if value is None:
        return NAN
    if isinstance(value, (int, float)) and not isinstance(value, bool):  # to Python True is an int
        return value
    return _refuse(value, "a number or null", TypeError)  # type: ignore[no-any-return]


def _a(kind: type, value: Any) -> Any:
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    return _refuse(value, kind.__name__, TypeError)


def _refuse(value: object, expected: str, error: type[Exception]) -> Any:
    raise error(f"expected {expected}, got {_text_of(value)[:80]!r}")

"""A class of options → the signature, the help and the checks of whoever takes them."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache, update_wrapper
from numbers import Integral, Real
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Concatenate,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)  # fmt: skip

from ww_monitor.errors import InvalidArgument, SpectralWarning, UnknownArgument, as_python, check_choice

_Part = TypeVar("_Part", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options, checked where they are made.

    A field's annotation is `Annotated[type, text]`, or `Annotated[type, text, check]` with a function of
    `ww_monitor.errors` that refuses values out of bounds; the choices of a `Literal` are checked without one.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.
    """

    where: ClassVar[str] = "ww_monitor"
    """Whose arguments they are, for messages."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Names of the last release, which are taken for one release more → what they are now."""

    ignored: ClassVar[Mapping[str, str]] = {}
    """Options of the last release that do nothing, which are taken for one release more → why."""

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            value = as_python(getattr(self, option.name))  # records and states hold Python's numbers
            object.__setattr__(self, option.name, value)  # the class is frozen
            option.verify(self.where, value)

    @classmethod
    def of(cls: type[_Part], wider: Settings) -> _Part:
        """Those of these options that wider settings hold."""
        return cls(**{one.name: getattr(wider, one.name) for one in options_of(cls) if hasattr(wider, one.name)})

    def keywords(self) -> dict[str, Any]:
        """Option → value."""
        return {option.name: getattr(self, option.name) for option in options_of(type(self))}


@dataclass(frozen=True)
class Option:
    """One field of a class of settings.

    Attributes:
        name: The keyword by which it is given.
        type: What it takes.
        text: What it means.
        default: `dataclasses.MISSING` if it must be given.
        keyword_only: Whether it can be given by name only.
        check: Refuses a value out of bounds.
    """

    name: str
    type: Any
    text: str
    default: Any
    keyword_only: bool
    check: Callable[[str, str, object], None] | None = None

    def verify(self, where: str, value: object) -> None:
        """Raise `InvalidArgument` if the value is none of the choices, out of bounds, or of another type."""
        kinds = get_args(self.type) if get_origin(self.type) in (Union, types.UnionType) else (self.type,)
        if get_origin(self.type) is Literal or self.type is bool:
            check_choice(where, self.name, value, get_args(self.type) or (True, False))
        elif self.check is not None and not (value is None and type(None) in kinds):
            self.check(where, self.name, value)
        if not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(dict.fromkeys(_in_words(kind) for kind in kinds))
            raise InvalidArgument(f"{where}: {self.name} must be {wanted}; got {value!r}")


_WORDS: Mapping[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "None",
    Sequence[str]: "a sequence of strings",
    Mapping: "a mapping",
    Callable: "a function",
}


def _is(value: object, kind: Any) -> bool:
    """Whether a value is of a type of options, as far as that can be seen without using it up."""
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin is Sequence:  # an iterator serves where a sequence does
        of_one = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
        (item,) = get_args(kind)
        kinds = get_args(item) if get_origin(item) in (Union, types.UnionType) else (item,)
        return of_one and (
            not isinstance(value, Collection) or all(any(_is(one, kind) for kind in kinds) for one in value)
        )
    if origin is Mapping:
        return isinstance(value, Mapping)
    if origin is Callable:
        return callable(value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    told = kind in (str, Path, type(None)) or (isinstance(kind, type) and issubclass(kind, Settings))
    return not told or isinstance(value, kind)


def _in_words(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Sequence:
        (item,) = get_args(kind)
        choices = ", ".join(map(repr, get_args(item)))
        return f"a sequence of some of {choices}" if get_origin(item) is Literal else _WORDS.get(kind, "a sequence")
    return _WORDS.get(kind, "") or _WORDS.get(origin, "") or str(getattr(kind, "__name__", kind))


def options_of(kind: Any) -> tuple[Option, ...]:
    """The options of a class of settings, as its signature has them."""
    return _options_of(kind)


@cache
def _options_of(kind: type) -> tuple[Option, ...]:
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in fields(kind):
        type_, text, *check = get_args(hints[field.name])
        found.append(Option(field.name, type_, text, field.default, bool(field.kw_only), *check))
    # `inspect.Signature` refuses another order.
    return tuple(sorted(found, key=lambda option: (option.keyword_only, option.default is not MISSING)))


_P = ParamSpec("_P")
_Given = TypeVar("_Given", bound=Settings)
_Self = TypeVar("_Self")
_Result = TypeVar("_Result")


def taking(kind: Callable[_P, _Given]) -> Callable[[Callable[[_Given], _Result]], Callable[_P, _Result]]:
    """Give a function of settings the signature of their class, and the `Args` of its docstring.

    Args:
        kind: A class of settings.
    """

    def decorate(function: Callable[[_Given], _Result]) -> Callable[_P, _Result]:
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _Result:
            given = _made(kind, args, kwargs)
            with _refusing_as(kind):
                return function(given)

        return cast("Callable[_P, _Result]", _dressed(wrapper, function, kind))

    return decorate


def method_taking(
    kind: Callable[_P, _Given],
) -> Callable[[Callable[[_Self, _Given], _Result]], Callable[Concatenate[_Self, _P], _Result]]:
    """Give a method of settings the signature of their class, and the `Args` of its docstring.

    Args:
        kind: A class of settings.
    """

    def decorate(method: Callable[[_Self, _Given], _Result]) -> Callable[Concatenate[_Self, _P], _Result]:
        def wrapper(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
            given = _made(kind, args, kwargs)
            with _refusing_as(kind):
                return method(self, given)

        dressed = _dressed(wrapper, method, kind, inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY))
        return cast("Callable[Concatenate[_Self, _P], _Result]", dressed)

    return decorate


def _made(kind: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """The settings of a call; names of the last release are taken with a warning, unknown ones refused."""
    names = [option.name for option in options_of(kind)]
    for name in list(given):
        if name in kind.renamed:
            now = kind.renamed[name]
            if now in given and given[now] != kind.__dataclass_fields__[now].default:  # which a reader of YAML fills in
                raise InvalidArgument(f"{kind.where}: {name} is called {now} now; expected one of them, got both")
            _warn(f"{kind.where}: {name} is called {now} now; the old name goes with the next release")
            given[now] = given.pop(name)
        elif name in kind.ignored:
            _warn(f"{kind.where}: {name} is ignored: {kind.ignored[name]}; the name goes with the next release")
            del given[name]
        elif name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}"
            raise UnknownArgument(f"{kind.where}: there is no argument {name!r}; {hint}")
    return kind(*args, **given)


@contextmanager
def _refusing_as(kind: Any) -> Iterator[None]:
    """Let who refuses an option later, and knows not whose it is, say that: `analyze: metrics …`."""
    try:
        yield
    except InvalidArgument as error:
        found = re.match(r"\w+: (?=(\w+))", str(error))
        if found and found[1] in {option.name for option in options_of(kind)}:
            error.args = (f"{kind.where}: {str(error)[found.end() :]}",)
        raise


def _warn(message: str) -> None:
    warnings.warn(message, SpectralWarning, stacklevel=4)  # the caller of the function that takes the options


def _dressed(wrapper: Any, function: Any, kind: Any, *first: inspect.Parameter) -> Any:
    """The wrapper with the name of the function, and the signature and `Args` of the options.

    The types are the evaluated ones, without our texts: what jsonargparse reads to parse YAML.
    """
    update_wrapper(wrapper, function)
    del wrapper.__wrapped__  # who unwraps it would find a function of one argument
    returns, options = get_type_hints(function)["return"], options_of(kind)
    parameters = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY if option.keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if option.default is MISSING else option.default,
            annotation=option.type,
        )
        for option in options
    ]
    wrapper.__signature__ = signature = _Signature([*first, *parameters], return_annotation=returns)
    signature.old = (*kind.renamed, *kind.ignored)
    wrapper.__annotations__ = {option.name: option.type for option in options} | {"return": returns}
    wrapper.__doc__ = _with_arguments(inspect.getdoc(function) or "", options)
    return wrapper


class _Signature(inspect.Signature):
    """A signature whose names of the last release jsonargparse sees, and nobody else.

    It refuses a key of a configuration that is no parameter. What has the default `SUPPRESS` it neither fills in nor
    saves.
    """

    old: Sequence[str] = ()

    @property
    def parameters(self) -> types.MappingProxyType[str, inspect.Parameter]:
        """Name → parameter."""
        known = super().parameters
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("jsonargparse."):
            return known
        kind, default = inspect.Parameter.KEYWORD_ONLY, argparse.SUPPRESS
        old = {name: inspect.Parameter(name, kind, default=default, annotation=Any) for name in self.old}
        return types.MappingProxyType({**known, **old})


def _with_arguments(docstring: str, options: Iterable[Option]) -> str:
    """A docstring with the section `Args`, before what follows it in Google's order."""
    lines = [
        textwrap.fill(
            f"{one.name}: {one.text}" + ("" if one.default is MISSING else f" Default: {one.default!r}."),
            116,
            initial_indent="    ",
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
        for one in options
    ]
    places = [at for mark in ("\nReturns:", "\nRaises:", "\n>>> ") if (at := docstring.find(mark)) >= 0]
    at = min(places, default=len(docstring))
    before, after = docstring[:at].rstrip(), docstring[at:].strip()
    return "\n".join([before, "", "Args:", *lines, *(["", after] if after else [])])

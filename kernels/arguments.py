"""Errors for arguments of a wrong type, for all public ops at once.

Arguments are looked at only after a call has failed, by the annotations of its function, so that calls cost nothing
more. Whole numbers are looked at before, since a call with 2.5 for 3 may succeed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from operator import index
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from spt_fast.errors import invalid

_KINDS: dict[Any, tuple[type, str]] = {
    Tensor: (Tensor, "a tensor"),
    float: (Real, "a number"),
    int: (Integral, "a whole number"),
    bool: (Integral, "True or False"),
    str: (str, "text"),
    NoneType: (NoneType, "None"),
}


def explained(function: Callable) -> Callable:
    """The function, with a ValueError instead of what a call raises if one of its arguments is of a wrong type."""
    whole = _whole_numbers(function)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments, **named)
        try:
            for place, name, kinds in whole:
                given = arguments[place] if place < len(arguments) else named.get(name, 0)
                if not isinstance(given, kinds):
                    index(given)  # a TypeError for 2.5
            return function(*arguments, **named)
        except ValueError:
            raise
        except Exception as error:
            if refusal := _refusal(function, arguments, named):
                raise ValueError(refusal) from error
            raise

    call.__module__ = __package__  # where pickle finds it
    return call


def _whole_numbers(function: Callable) -> list[tuple[int, str, tuple[Any, ...]]]:
    """The place and name of each argument that takes a whole number, and all types that it takes."""
    kinds = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(function).items()}
    return [(place, name, kinds[name]) for place, name in enumerate(kinds) if int in kinds[name]]


def _refusal(function: Callable, arguments: Sequence[Any], named: Mapping[str, Any]) -> str | None:
    """The message for the first argument of a wrong type; None if there is none. Where arguments are missing or given
    twice, Python's TypeError."""
    try:
        given = inspect.signature(function).bind(*arguments, **named).arguments
    except TypeError:
        function(*arguments, **named)  # whose error has the function's name
        raise
    hints = get_type_hints(function)
    for name, value in given.items():
        if not _fits(value, hints[name]):
            return invalid(f"{function.__name__}({name})", value, f"it must be {_words(hints[name])}")
    return None


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, Sequence) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (Sequence, Iterable):
        return isinstance(value, origin) and (not isinstance(value, Sequence) or all(_fits(x, *parts) for x in value))
    return isinstance(value, _KINDS[hint][0])


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return " or ".join(map(_words, parts))
    if origin is tuple:
        return f"{len(parts)} numbers"
    if origin in (Sequence, Iterable):
        return f"a list of {_words(parts[0]).removeprefix('a ')}s"
    return _KINDS[hint][1]

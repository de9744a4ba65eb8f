"""Whether a value that was read from a file is of the type its field is annotated with. No torch here."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is what ``hint`` says: plain types, None, lists, mappings and unions of them.

    A whole number is a float; a bool is neither a number nor a text.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inside)
    if origin is list:
        # a list of a thousand numbers is looked at once
        return isinstance(value, list) and all(fits(one, inside[0]) for one in _one_of_each_type(value, inside[0]))
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(one, inside[1]) for one in value.values())
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _one_of_each_type(values: list[Any], hint: Any) -> list[Any]:
    """Enough of ``values`` to judge all of them: containers each by itself, plain values one of a type."""
    return values if typing.get_origin(hint) else list({type(one): one for one in values}.values())

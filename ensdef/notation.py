"""The little language of names, budgets and brackets: ``pgd[steps=50,restarts=5]``, ``8/255``, ``eps/5``.

Everything here is text in, values out; nothing imports torch, so the command line can refuse bad input at once.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeVar, get_args, get_origin

from ensdef.errors import UsageError

NORMS = ("linf", "l2")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")
T = TypeVar("T")


def split_list(text: str) -> list[str]:
    """Split on commas at bracket depth 0: ``a[x=1,y=2],b`` -> ``["a[x=1,y=2]", "b"]``.

    Raises:
        UsageError: a bracket is not closed, closed twice, or an item is empty.
    """
    items = _split(text, ",")
    if not all(items):
        raise UsageError(f"{text!r} has an empty item; expected names separated by single commas")
    return items


def _split(text: str, separator: str) -> list[str]:
    """What stands between separators at bracket depth 0, without surrounding spaces."""
    items, depth, start = [], 0, 0
    for position, char in enumerate(text + separator):
        depth += (char == "[") - (char == "]")
        if depth < 0:
            raise UsageError(f"{text!r} closes a bracket that was never opened")
        if char == separator and depth == 0:
            items.append(text[start:position].strip())
            start = position + 1
    if depth:
        raise UsageError(f"{text!r} opens a bracket that is never closed")
    return items


def parse_call(text: str) -> tuple[str, dict[str, str]]:
    """``"pgd[steps=50]"`` -> ``("pgd", {"steps": "50"})``; a bare parameter name is no value and is refused.

    Raises:
        UsageError: malformed name or brackets, or a parameter given twice.
    """
    head, bracket, tail = text.strip().partition("[")
    name = head.strip()
    if not _NAME.match(name):
        raise UsageError(f"expected a name, or name[parameter=value,...], got {text!r}")
    if not bracket:
        return name, {}
    if not tail.endswith("]"):
        raise UsageError(f"{text!r} opens a bracket that is never closed")
    params: dict[str, str] = {}
    for item in split_list(tail[:-1]) if tail[:-1].strip() else []:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier() or not value.strip():
            raise UsageError(f"{name}: expected parameter=value in the brackets, got {item!r}")
        if key in params:
            raise UsageError(f"{name}: parameter {key!r} is given twice")
        params[key] = value.strip()
    return name, params


def format_call(name: str, params: Mapping[str, Any]) -> str:
    """Inverse of :func:`parse_call`: only what is passed is printed."""
    inside = ",".join(f"{key}={_plain(value)}" for key, value in params.items())
    return f"{name}[{inside}]" if inside else name


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(_plain(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def fraction(text: str | int | float | Fraction, what: str) -> Fraction:
    """``"8/255"``, ``"0.031"``, ``0.1`` as an exact fraction.

    Raises:
        UsageError: not a number, a division by zero, infinite or NaN.
    """
    if isinstance(text, bool):
        raise UsageError(f"{what} is {text!r}; expected a number such as 0.1 or '8/255'")
    if re.search(r"\d{400}|e[+-]?\d{5}", str(text), re.IGNORECASE):  # an exponent of nine digits takes the whole memory
        raise UsageError(f"{what} is {str(text)[:40]!r}, which no floating-point number can hold")
    try:
        number = Fraction(str(text).strip())
        float(number)
        return number
    except ZeroDivisionError:
        raise UsageError(f"{what} is {text!r}, which divides by zero; write a fraction such as '8/255'") from None
    except OverflowError:
        raise UsageError(f"{what} is {text!r}, which no floating-point number can hold") from None
    except ValueError:
        raise UsageError(f"{what} is {text!r}; expected a number or a fraction such as 0.1 or '8/255'") from None


def parse_eps(text: str | int | float | Fraction, norm: str, dimensions: int | None = None) -> Fraction:
    """An attack radius for images in [0, 1].

    Args:
        text: as written by the user, ``"8/255"`` or ``0.1``.
        norm: ``"linf"`` (radius in [0, 1]) or ``"l2"`` (radius in [0, sqrt(dimensions)]).
        dimensions: pixels times channels, bounds an l2 radius; None: no upper bound for l2.
    Raises:
        UsageError: not a number, negative, or larger than the box.
    """
    if norm not in NORMS:
        raise UsageError(f"unknown norm {norm!r}; expected one of {', '.join(NORMS)}")
    eps = fraction(text, "eps")
    if eps < 0:
        raise UsageError(f"eps is {text}; expected a radius of at least 0")
    if norm == "linf" and eps > 1:
        meant = f"; did you mean '{eps}/255'?" if eps <= 255 and eps.denominator == 1 else ""
        raise UsageError(f"eps is {text}, but images are in [0, 1]{meant}")
    if norm == "l2" and dimensions is not None and eps * eps > dimensions:
        raise UsageError(
            f"eps is {text}, but no two images in [0, 1] with {dimensions} values are further apart "
            f"than {dimensions**0.5:.2f} in l2"
        )
    return eps


def relative(text: str | int | float, eps: float, what: str) -> float:
    """A size that may be written in units of the radius: ``"eps/5"``, ``"2*eps"``, ``"eps"``, ``"2/255"``, ``0.01``."""
    if not isinstance(text, str) or "eps" not in text:
        return float(fraction(text, what))
    match = re.fullmatch(r"\s*(?:([\d./]+)\s*\*\s*)?eps(?:\s*/\s*([\d.]+))?\s*", text)
    if not match:
        raise UsageError(f"{what} is {text!r}; expected a number, a fraction, 'eps/5' or '2.5*eps'")
    factor = fraction(match[1] or 1, what) / (fraction(match[2] or 1, what) or _zero_division(text, what))
    return float(factor) * eps


def _zero_division(text: str, what: str) -> Fraction:
    raise UsageError(f"{what} is {text!r}, which divides by zero")


def fill(cls: type[T], given: Mapping[str, Any], owner: str) -> T:
    """Build a frozen parameter dataclass from text or plain values; unknown names and wrong types are refused.

    Args:
        cls: a dataclass whose fields are annotated bool, int, float, str, or ``Literal[...]``, optionally ``| None``.
        given: values by field name; strings are converted to the field's type.
        owner: who has these parameters, for the messages (``"pgd"``).
    Raises:
        UsageError: a parameter the class does not have, a value of another type, or the class's own checks.
    """
    if not dataclasses.is_dataclass(cls):
        raise UsageError(f"the parameters of {owner} must be a dataclass; decorate them with @dataclass(frozen=True)")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in given.items():
        if key not in fields:
            have = ", ".join(fields) if fields else "none"
            raise UsageError(f"{owner} has no parameter {key!r}; it has: {have}")
        values[key] = convert(value, hints[key], f"{owner}[{key}]")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{owner}: {error}") from error


def convert(value: Any, hint: Any, what: str) -> Any:
    """``value`` as the type ``hint``; texts such as ``"50"``, ``"true"``, ``"none"``, ``"8/255"`` are read."""
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() == "none" and str not in options):
            if len(options) == len(get_args(hint)):
                raise UsageError(f"{what} must be given")
            return None
        for option in options[:-1]:
            try:
                return convert(value, option, what)
            except UsageError:
                continue
        return convert(value, options[-1], what)
    if origin is typing.Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        if str(value) not in choices:
            raise UsageError(f"{what} is {value!r}; expected one of {', '.join(map(str, get_args(hint)))}")
        return choices[str(value)]
    if hint is bool:
        lowered = str(value).lower()
        if lowered not in ("true", "false"):
            raise UsageError(f"{what} is {value!r}; expected true or false")
        return lowered == "true"
    if hint is int:
        number = fraction(value, what)
        if number.denominator != 1:
            raise UsageError(f"{what} is {value!r}; expected a whole number")
        return int(number)
    if hint is float:
        return float(fraction(value, what))
    if hint is str:
        if value is None:
            raise UsageError(f"{what} must be given")
        return _plain(value)
    if origin is tuple:
        item = get_args(hint)[0]
        parts = value if isinstance(value, list | tuple) else [part for part in _split(str(value), "+") if part]
        return tuple(convert(part, item, what) for part in parts)
    raise TypeError(f"{what}: fields annotated {hint!r} cannot be read from text")


def at_least(owner: str, **bounds: tuple[float, float]) -> None:
    """Refuse values below their bound: ``at_least("training", epochs=(self.epochs, 1))``.

    Checks of parameters that :func:`fill` builds pass an empty owner: ``fill`` knows and names it.
    """
    for name, (value, bound) in bounds.items():
        if not value >= bound:
            raise UsageError(f"{owner}{': ' if owner else ''}{name} is {value}; expected at least {bound}")

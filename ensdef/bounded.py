"""Files that others may have made: bounded in size and depth, plain in content, inside their folder. No torch."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import stat
import tomllib
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ensdef.errors import UsageError

MEGABYTE = 1 << 20
#: Largest files that are read, in bytes. A record of 10,000 images has 0.1 MB.
RECORD, MEASUREMENT, MANIFEST, DESCRIPTION, TOML = 64 * MEGABYTE, 64 * MEGABYTE, 16 * MEGABYTE, 16 * MEGABYTE, MEGABYTE
#: Deepest nesting of lists and tables; ours have less than ten levels.
DEEPEST = 64
#: Whole numbers are at most as large as seeds may be.
LARGEST = 2**63

#: Texts and brackets of a JSON file, numbers and separators passed over.
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\Z")


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file of at most ``limit`` bytes.

    Raises:
        UsageError: it is no file, cannot be read, is larger, or is not UTF-8.
    """
    try:
        # without O_NONBLOCK opening a named pipe would wait for someone to write into it
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{path} is no regular file")
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > limit:
        raise UsageError(f"{path} is larger than {limit / MEGABYTE:g} MB, the most that is read of such a file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text ({error})") from error


def parse_json(text: str) -> Any:
    """JSON as everybody reads it: no NaN, no infinities, no key twice, no number beyond 64 bits, bounded depth.

    Raises:
        UsageError: anything else.
    """
    depth = 0
    for token in _TOKENS.finditer(text):
        first = token[0][0]
        depth += (first in "[{") - (first in "]}")
        if depth > DEEPEST:
            raise UsageError(f"it is nested deeper than {DEEPEST} levels")
    try:
        content = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_finite,
            # asked for each number: only where there is one of so many digits
            parse_int=_whole if re.search(r"\d{19}", text) else None,
            object_pairs_hook=_once,
        )
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it is no JSON ({error})") from error
    if "\\u" in text:  # the only way for a character into a text that could not be written out again
        _check_values(content)
    return content


def read_json(path: Path, limit: int) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: see :func:`read_text` and :func:`parse_json`; names the file.
    """
    text = read_text(path, limit)
    try:
        return parse_json(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """TOML of tables, lists, texts, booleans and finite numbers of at most 64 bits; bounded in size and depth.

    Raises:
        UsageError: anything else.
    """
    if len(text) > TOML:
        raise UsageError(f"it is larger than {TOML / MEGABYTE:g} MB")
    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"it is nested deeper than {DEEPEST} levels") from None
    except ValueError as error:  # also of numbers with too many digits, which is no TOMLDecodeError
        raise UsageError(str(error)) from error
    if "\\u0000" in text or "\\U00000000" in text:  # no path, no option may hold it
        raise UsageError("it has a null character")
    _check_values(content)
    return content


def inside(folder: Path, relative: str) -> Path:
    """The path that a file names, if it leads nowhere but into ``folder``, links followed.

    Raises:
        UsageError: an absolute path, one with ``..`` or a link that leads out.
    """
    path = folder / relative
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
        within = False
    if not within:
        raise UsageError(f"{relative!r} leads out of {folder}")
    return path


def safe_name(name: str, what: str) -> str:
    """A name that becomes part of a path.

    Raises:
        UsageError: a separator, a leading dot, or another character that names of plug-ins do not have.
    """
    if not _NAME.match(name):
        raise UsageError(f"{what} is {name[:80]!r}; expected a name of letters, digits and _ . + -")
    return name


def check_fields(cls: type, body: Mapping[str, Any]) -> None:
    """Compare values from a file with the annotations of a dataclass; fields that are missing are not looked at.

    Raises:
        UsageError: a value of another type, with its field, or a number out of any range.
    """
    hints = _hints(cls)
    for name, value in body.items():
        if name in hints and not _fits(value, hints[name]):
            raise UsageError(f"{name} is {_short(value)}; expected {_told(hints[name])}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if hint in (None, type(None)):
        return value is None
    if hint in (int, float):
        return (type(value) is int and abs(value) < LARGEST) or (hint is float and type(value) is float)
    if origin is list and inner == (int,):  # outcomes: thousands of them
        return isinstance(value, list) and {*map(type, value)} <= {int} and all(abs(one) < LARGEST for one in {*value})
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, list) and inner[-1] is Ellipsis else inner
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(v, inner[1]) for k, v in value.items())
    return isinstance(value, hint)


def _told(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace("typing.", "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _no_constant(name: str) -> Any:
    raise UsageError(f"it has {name}, which is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise UsageError(f"it has {text[:40]}, which no floating-point number can hold")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > LARGEST:
        raise UsageError(f"it has a whole number of {len(text)} digits; expected at most 64 bits")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"it has the key {twice[:80]!r} twice")
    return content


def _check_values(content: Any) -> None:
    """Refuse what could not be written out again, or would stop whoever walks through it."""
    level = [content]
    for _ in range(DEEPEST):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                deeper += [*value, *value.values()]
            elif isinstance(value, list):
                deeper += value
            elif isinstance(value, str):
                if any("\ud800" <= char <= "\udfff" for char in value):
                    raise UsageError("it has a text with half a surrogate pair")
            elif isinstance(value, datetime.date | datetime.time):
                raise UsageError(f"it has the date or time {value}; write it as a text")
            elif (isinstance(value, float) and not math.isfinite(value)) or (
                isinstance(value, int) and abs(value) > LARGEST
            ):
                raise UsageError("it has a number that is infinite, NaN or beyond 64 bits")
        if not (level := deeper):
            return
    raise UsageError(f"it is nested deeper than {DEEPEST} levels")

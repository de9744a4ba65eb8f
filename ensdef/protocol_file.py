"""Protocol files: where they lie, and what is wrong with them, by file, line and key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ensdef.bounded import TOML, parse_toml, read_text
from ensdef.errors import UsageError, suggest


class Refusal(UsageError):
    """A value of a protocol that cannot be; ``key`` is the name it stands behind."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class ProtocolFile:
    """A protocol as text.

    Args:
        name: how users call it.
        shown: the file as messages name it.
    """

    name: str
    shown: str
    text: str
    content: dict[str, Any]

    def refuse(self, refusal: Refusal, scale: str | None = None) -> UsageError:
        """The error that tells a reader where to look; a key that the scale has is looked for there."""
        line = self.line_of(refusal.key, scale)
        return UsageError(f"{self.shown}{f', line {line}' if line else ''}: {refusal}")

    def line_of(self, key: str, scale: str | None = None) -> int | None:
        """The first line on which a key stands, as a key or in a table's name; in the scale's part if it is there."""
        pattern = re.compile(rf"""(^|[{{,\s.\["'])({re.escape(key)})["']?\s*(=|\.|\])""")
        scales = list(self.content["scales"]) if isinstance(self.content.get("scales"), dict) else []
        scale = scale or next(iter(scales), None)
        inside, first = False, None
        for number, line in enumerate(self.text.splitlines(), start=1):
            if line.startswith("["):
                inside = line.lstrip("[").startswith(f"scales.{scale}")
            if pattern.search(line.split("#")[0]):
                if inside:
                    return number
                first = first or number
        return first


def protocol_paths() -> dict[str, Any]:
    """The protocols that ship with the package, by name."""
    root = files("ensdef.benchmarks")
    paths = [*root.iterdir(), *root.joinpath("papers").iterdir()]
    return {path.name.removesuffix(".toml"): path for path in paths if path.name.endswith(".toml")}


def read_protocol_file(name: str) -> ProtocolFile:
    """A shipped protocol by name, or a TOML file by path.

    Raises:
        UsageError: no such protocol, or no TOML.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not os.path.isfile(path):  # unlike Path.is_file false, not an error, for names that are too long
            raise UsageError(f"no protocol file {name}")
        stem, shown = path.stem, name
    else:
        shipped = protocol_paths()
        if name not in shipped:
            raise UsageError(suggest("protocol", name, shipped))
        path, stem, shown = shipped[name], name, f"protocol {name}"
    text = read_text(path, TOML) if isinstance(path, Path) else path.read_text(encoding="utf-8")
    try:
        return ProtocolFile(stem, shown, text, parse_toml(text))
    except UsageError as error:
        raise UsageError(f"{shown}: {error}") from error


def only_keys(table: Mapping[str, Any], known: Iterable[str], owner: str) -> None:
    """Refuse keys that a table does not have."""
    known = sorted(known)
    if unknown := sorted(set(table) - set(known)):
        raise Refusal(unknown[0], f"{owner} has no key {unknown[0]!r}; it has: {', '.join(known)}")


def table_of_texts(value: Any, key: str) -> dict[str, str]:
    """A table from texts to texts."""
    if not isinstance(value, Mapping) or not all(isinstance(item, str) for item in value.values()):
        raise Refusal(key, f"{key} is {value!r}; expected a table of texts")
    return dict(value)

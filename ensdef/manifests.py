"""Which records make up which table: ``manifests/<name>.json``. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ensdef.bounded import MANIFEST, inside, read_json
from ensdef.errors import UsageError, suggest
from ensdef.measurement import Measurement, read_measurement
from ensdef.records import Record, read_record, write_text
from ensdef.set_aside import whole

#: What is made of a table's records: a row each, a row a defence with ranks, numbers beside
#: accuracy, or answers to a paper's cells.
Kind = Literal["grid", "leaderboard", "measures", "paper"]


class Manifests:
    """Which cells make up which table: ``manifests/<name>.json``, written by the run, read by ``ensdef table``."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.folder = results / "manifests"

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def of_protocol(self, name: str) -> list[str]:
        """The table of this name, or those of a protocol at all its scales.

        Raises:
            UsageError: there is none.
        """
        known = self.names()
        found = [table for table in known if table == name or table.rpartition("-")[0] == name]
        if not found:
            raise UsageError(suggest("table", name, known) + f" (in {self.results}; `ensdef run` makes them)")
        return found

    def write(
        self,
        name: str,
        title: str,
        records: Sequence[Record],
        *,
        extend: bool,
        kind: Kind = "grid",
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Remember the records of a table and what is made of them; ``extend`` keeps those that were there before.

        Args:
            tell: is told of what was there before and cannot be read.
        """
        paths = self._readable(name, tell) if extend and name in self.names() else []
        for record in records:
            path = Path(str(record.path)).relative_to(self.results).as_posix()
            if path not in paths:
                paths.append(path)
        content = {"title": title, "kind": kind, "records": paths}
        write_text(self.folder / f"{name}.json", json.dumps(content, indent=1) + "\n")

    def _readable(self, name: str, tell: Callable[[str], None]) -> list[str]:
        """The records that a table had so far, without those that are gone or damaged: these stay where they are,
        because only who has claimed a cell may set its record aside.
        """
        listed = whole(lambda: self._listed(name, "records"), self.folder / f"{name}.json", tell)
        paths = []
        for relative in listed[1] if listed else []:
            try:
                read_record(self._file(name, "record", relative))
            except UsageError as error:
                tell(f"left out of the table {name}: {error}")
            else:
                paths.append(relative)
        return paths

    def read(self, name: str) -> tuple[str, list[Record]]:
        """Title and records of a table.

        Raises:
            UsageError: no such table, one of no records, or a record is missing or damaged.
        """
        title, paths = self._listed(name, "records")
        if not paths:
            raise UsageError(f"table {name} has no records; run the protocol again")
        records = []
        for relative in paths:
            records.append(read_record(self._file(name, "record", relative)))
        return title, records

    def kind(self, name: str) -> Kind:
        """What is made of a table's records; manifests that do not say so are grids.

        Raises:
            UsageError: no such table, or of a kind that is not known.
        """
        kind: Kind = self._content(name).get("kind", "grid")
        if kind not in get_args(Kind):
            expected = ", ".join(get_args(Kind))
            raise UsageError(f"{self.folder / (name + '.json')} is of kind {kind!r}; expected one of {expected}")
        return kind

    def write_measurements(self, name: str, title: str, measurements: Sequence[Measurement]) -> None:
        """Remember the measurements of a table; those that failed have no file."""
        paths = [Path(str(one.path)).relative_to(self.results).as_posix() for one in measurements if one.path]
        content = {"title": title, "kind": "measures", "measurements": paths}
        write_text(self.folder / f"{name}.json", json.dumps(content, indent=1) + "\n")

    def measurements(self, name: str) -> tuple[str, list[Measurement]]:
        """Title and measurements of a table.

        Raises:
            UsageError: a measurement is missing or was edited.
        """
        title, paths = self._listed(name, "measurements")
        return title, [read_measurement(self._file(name, "measurement", path)) for path in paths]

    def _file(self, name: str, what: str, relative: str) -> Path:
        try:
            path = inside(self.results, relative)
        except UsageError as error:
            raise UsageError(f"table {name}: {what} {error}; run the protocol again") from error
        if not os.path.isfile(path):  # unlike Path.is_file false, not an error, for names that are too long
            raise UsageError(f"table {name}: {what} {relative} is missing; run the protocol again")
        return path

    def _content(self, name: str) -> dict[str, Any]:
        self.of_protocol(name)
        path = self.folder / f"{name}.json"
        content = read_json(path, MANIFEST)
        if not isinstance(content, dict):
            raise UsageError(f"{path} is no table manifest (it holds no object)")
        return content

    def _listed(self, name: str, key: str) -> tuple[str, list[str]]:
        """The title, and the paths that the manifest lists under ``key``, relative to the results folder."""
        content = self._content(name)
        title, paths = content.get("title"), content.get(key)
        if not isinstance(title, str) or not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
            raise UsageError(
                f"{self.folder / (name + '.json')} is no table manifest: expected a title and a list of {key}"
            )
        return title, paths

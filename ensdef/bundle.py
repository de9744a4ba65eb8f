"""The files that belong to a record: where they must be, opened inside the results folder alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from ensdef.bounded import inside
from ensdef.checkpoints import SPEC, WEIGHTS
from ensdef.errors import UsageError
from ensdef.records import Record

#: What a file of evidence may have beside its values.
_OVERHEAD = 1 << 16


class Unverifiable(Exception):
    """Something is missing without which nothing can be said."""


class Refuted(Exception):
    """Something is so wrong that there is no use in looking further; without a message where that was said."""


@dataclass(frozen=True)
class Bundle:
    """A record's results folder.

    Args:
        place: data set and method of the folder the record lies in, if that is one of ``records``.
    """

    results: Path
    place: tuple[str, str] | None = None

    @classmethod
    def of(cls, path: Path, results: Path | None) -> Bundle:
        """That of the record at ``path``, which may lie elsewhere if ``results`` is given."""
        above = path.resolve().parents
        among_records = len(above) > 3 and above[2].name == "records"
        results = results or (above[3] if among_records else Path("results"))
        if among_records and above[3] == results.resolve():
            return cls(results, (above[1].name, above[0].name))
        return cls(results)

    def checkpoint(self, record: Record) -> Path:
        """The folder of the weights, by the last part of the name that the record has for it.

        Raises:
            Unverifiable: it is not there, or there never was one.
            Refuted: the name leads elsewhere.
        """
        if record.checkpoint is None:
            raise Unverifiable("it is of a model in memory; only records with a checkpoint can be verified")
        relative = PurePath("checkpoints", PurePath(record.checkpoint).name)
        for name in (relative, relative / SPEC, relative / WEIGHTS):
            self._inside(name)
        if not (self.results / relative).is_dir():
            raise Unverifiable(
                f"the checkpoint {self.results / relative} is not there; name its folder with --checkpoint, or the "
                "results folder with --results"
            )
        return self.results / relative

    def evidence(self, relative: PurePath, limit: int) -> bytes:
        """The content of a file of the results folder.

        Args:
            limit: bytes that its values take at most.
        Raises:
            Unverifiable: it is not there.
            Refuted: it leads elsewhere, or is too large.
        """
        path = self._inside(relative)
        if not path.is_file():
            raise Unverifiable(f"the evidence {self.results / relative} is missing")
        if path.stat().st_size > limit + _OVERHEAD:
            raise Refuted(f"{relative} has {path.stat().st_size} bytes; expected {limit + _OVERHEAD} at most")
        return path.read_bytes()

    def _inside(self, relative: PurePath) -> Path:
        """A path of the results folder, which links do not lead out of."""
        try:
            return inside(self.results, str(relative))
        except UsageError as error:
            raise Refuted(f"{relative} leads out of the results folder") from error


def record_paths(places: list[Path]) -> Iterator[Path]:
    """Records by file, and all of a folder: those below it, or below its ``records``.

    Raises:
        UsageError: nothing there, or a folder without records.
    """
    for place in places:
        if place.is_file():
            yield place
            continue
        if not place.is_dir():
            raise UsageError(f"{place} is not there; expected a record's file, or a folder of them")
        below = place / "records"
        found = sorted((below if below.is_dir() else place).rglob("*.json"))
        if not found:
            raise UsageError(f"there are no records in {place}; expected *.json below it")
        yield from found

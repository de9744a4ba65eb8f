"""Published numbers beside ours. A pure function of files; no torch."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensdef.bounded import MANIFEST, inside, read_json
from ensdef.errors import UsageError
from ensdef.measurement import Measurement, read_measurement
from ensdef.papers.published import PublishedCell, published_table
from ensdef.protocol_file import protocol_paths, read_protocol_file
from ensdef.records import Record, read_record
from ensdef.statistics import estimate

#: What a fraction is multiplied with to have the paper's unit.
IN_UNIT = {"percent": 100.0}


@dataclass(frozen=True)
class Entry:
    """A published cell and our answer.

    Args:
        ours: in the paper's unit, mean over training seeds; None where there is none, for the reason in ``note``.
        stderr: of ``ours``, over images: one image under several training seeds is no new image. None where the number
            has none.
        n: images.
        records, measurements: where the number is from.
        derived: it follows from two models, as a gain does.
    """

    cell: PublishedCell
    ours: float | None
    stderr: float | None
    n: int | None
    note: str
    records: tuple[Record, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    derived: bool = False

    @property
    def outcomes(self) -> list[list[int]]:
        """Of every image, by training seed; empty for a number that is no accuracy of one model."""
        return [] if self.derived or self.ours is None else [record.outcomes["robust"] for record in self.records]

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        if self.ours is None or self.cell.number is None:
            return None
        return self.ours - self.cell.number


@dataclass(frozen=True)
class Comparison:
    """A paper's table beside our replication of it.

    Args:
        deviations: what differs from the paper, in sentences.
        notes: on the printed numbers.
    """

    name: str
    title: str
    published: str
    protocol: str
    version: int
    scale: str
    scale_title: str
    deviations: tuple[str, ...]
    notes: tuple[str, ...]
    entries: tuple[Entry, ...]


def compare(name: str, results: Path) -> Comparison:
    """The table ``name`` of a results folder.

    Raises:
        UsageError: it is no paper's table, a file is missing or damaged, or answers another table than published.
    """
    path = results / "manifests" / f"{name}.json"
    try:
        return _compare(name, read_json(path, MANIFEST), results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is no manifest of a paper's table ({error!r}); run the protocol again") from error


def _compare(name: str, content: Mapping[str, Any], results: Path) -> Comparison:
    _check_version(name, content)
    cells = published_table(content["published"])
    answers = content["answers"]
    if [answer["cell"] for answer in answers] != list(range(len(cells))):
        raise UsageError(
            f"table {name} answers other cells than {content['published']} has ({len(cells)}); run the protocol again"
        )
    read: dict[str, Record | Measurement] = {}
    return Comparison(
        name=name,
        title=str(content["title"]),
        published=str(content["published"]),
        protocol=str(content["protocol"]),
        version=int(content["version"]),
        scale=str(content["scale"]),
        scale_title=str(content["scale_title"]),
        deviations=tuple(map(str, content["deviations"])),
        notes=tuple(map(str, content["notes"])),
        entries=tuple(_entry(cell, answer, results, read) for cell, answer in zip(cells, answers, strict=True)),
    )


def _check_version(name: str, content: Mapping[str, Any]) -> None:
    """Refuse answers to a version of the protocol that is no more."""
    protocol = str(content["protocol"])
    if protocol in protocol_paths():
        version = read_protocol_file(protocol).content.get("version", 1)
        if version != content["version"]:
            raise UsageError(
                f"table {name} is of version {content['version']} of protocol {protocol}, which is at {version}; run "
                f"`ensdef run {protocol} --scale {content['scale']}` again"
            )


def _entry(
    cell: PublishedCell, answer: Mapping[str, Any], results: Path, read: dict[str, Record | Measurement]
) -> Entry:
    if "missing" in answer:
        return Entry(cell, None, None, None, str(answer["missing"]))
    sources = [_read(path, results, read) for path in answer["files"]]
    against = [_read(path, results, read) for path in answer.get("against", ())]
    records = tuple(source for source in (*sources, *against) if isinstance(source, Record))
    measurements = tuple(source for source in (*sources, *against) if isinstance(source, Measurement))
    if failure := next((record.error for record in records if record.error), None):
        return Entry(cell, None, None, None, failure, records, measurements)
    numbers = _numbers(sources, answer["value"])
    references = _numbers(against, answer["value"])
    if numbers is None or references is None:
        told = f"{answer['value']} is undefined here"
        return Entry(cell, None, None, None, told, records, measurements)
    factor = IN_UNIT.get(cell.unit, 1.0)
    n = next((source.n for source in sources if source.n is not None), None)
    mean = statistics.fmean(numbers)
    if references:
        reference = statistics.fmean(references)
        if answer["derive"] == "relative" and not reference:
            return Entry(cell, None, None, n, "a share of nothing: the other has 0", records, measurements)
        gain = mean - reference
        mean = gain / reference if answer["derive"] == "relative" else gain
        return Entry(cell, factor * mean, None, n, "", records, measurements, derived=True)
    stderr = _stderr(sources, answer["value"])
    return Entry(cell, factor * mean, None if stderr is None else factor * stderr, n, "", records, measurements)


def _read(path: str, results: Path, read: dict[str, Record | Measurement]) -> Record | Measurement:
    if path not in read:
        file = inside(results, path)
        if not os.path.isfile(file):
            raise UsageError(f"{path} is missing from {results}; run the protocol again")
        read[path] = read_measurement(file) if path.startswith("measurements/") else read_record(file)
    return read[path]


def _number(source: Record | Measurement, value: str) -> float | None:
    if isinstance(source, Measurement):
        if value not in source.values:
            raise UsageError(f"{source.path} has no {value!r}; it has: {', '.join(source.values)}")
        return source.values[value]
    number = getattr(source, value, None)
    return float(number) if isinstance(number, int | float) else None


def _numbers(sources: Sequence[Record | Measurement], value: str) -> list[float] | None:
    """None if any is undefined."""
    numbers = [_number(source, value) for source in sources]
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) else None


def _stderr(sources: Sequence[Record | Measurement], value: str) -> float | None:
    """Over images, of the mean over trainings; None where one has none."""
    if all(isinstance(source, Record) for source in sources):
        return estimate([source.outcomes["robust"] for source in sources if isinstance(source, Record)]).stderr
    errors = [None if isinstance(source, Record) else source.stderr.get(value) for source in sources]
    known = [error for error in errors if error is not None]
    # trainings share their images, so that their errors do not average out
    return statistics.fmean(known) if len(known) == len(errors) else None

"""What one measurement gave, beside accuracy: a JSON file named by its content key. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensdef.bounded import MEASUREMENT, parse_json, read_text
from ensdef.errors import UsageError
from ensdef.keys import checksum_of
from ensdef.record_check import check_content
from ensdef.records import write_text

FORMAT = 1
#: Where a measurement lies that is of no data set, or of no defence.
NONE = "none"
_AGAIN = "delete the file to have it measured again"


@dataclass(frozen=True)
class Measurement:
    """Numbers and curves of one measurement on one trained defence, or on none.

    ``values`` are fractions in [0, 1], seconds, megabytes or counts, as the measurement's own docstring says; None
    where a quantity is undefined. ``stderr`` has standard errors of those values that have one, in the same unit.
    ``series`` are nested lists of numbers. ``n`` counts what was averaged over, mostly images. What a measurement does
    not depend on is None (``norm``, ``eps``, ``n``), ``native`` or 0. One that failed has ``error`` and is not stored.
    """

    key: str
    name: str
    params: Mapping[str, Any]
    call: str
    method: str | None
    hyper: Mapping[str, Any]
    label: str | None
    dataset: str | None
    architecture: str | None
    members: int | None
    train_seed: int | None
    training: Mapping[str, Any]
    norm: str | None
    eps: str | None
    eps_value: float | None
    combiner: str
    seed: int
    n: int | None = None
    values: Mapping[str, float | None] = field(default_factory=dict)
    stderr: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    checkpoint: str | None = None
    path: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def summary(self) -> dict[str, Any]:
        """The measurement without its series, as ``--json`` prints it."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "series"  # asdict() would copy every number of them first
        }

    def to_json(self) -> str:
        """The whole measurement; every series on one line, and a checksum of all that is written."""
        body = {"format": FORMAT, **self.summary(), "path": None, "series": dict(self.series)}
        checksum = checksum_of(body, "checksum")
        series = body.pop("series")
        head = json.dumps({**body, "checksum": checksum}, indent=1, allow_nan=False)
        lines = [f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in series.items()]
        inside = "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"
        return head[:-2] + f',\n "series": {inside}\n}}\n'

    @classmethod
    def from_json(cls, text: str, path: Path | None = None) -> Measurement:
        """Inverse of :meth:`to_json`.

        Raises:
            UsageError: no JSON, no measurement, another format, or edited since it was measured.
        """
        where = f"{path}: " if path else ""
        try:
            body = parse_json(text)
        except UsageError as error:
            raise UsageError(f"{where}no measurement: {error}; {_AGAIN}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise UsageError(f"{where}no measurement of format {FORMAT}; {_AGAIN}")
        try:
            check_content(cls, body)
        except UsageError as error:
            raise UsageError(f"{where}{error}; {_AGAIN}") from error
        try:
            actual, told = checksum_of(body, "checksum"), body.pop("checksum", None)
            del body["format"]
            measurement = cls(**{**body, "path": None})
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where}incomplete measurement ({error}); {_AGAIN}") from error
        if told != actual:
            raise UsageError(f"{where}was edited since it was measured (its checksum does not fit); {_AGAIN}")
        return dataclasses.replace(measurement, path=str(path) if path else None)


def tidy(value: Any) -> Any:
    """Nested lists as they are stored: floats to the seven digits that float32 has, None for NaN and infinities."""
    if isinstance(value, list | tuple):
        return [tidy(part) for part in value]
    if isinstance(value, bool | int):
        return int(value)
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None


def read_measurement(path: str | Path) -> Measurement:
    """A measurement from its file.

    Raises:
        UsageError: there is no such file, or it is not as it was written.
    """
    path = Path(path)
    return Measurement.from_json(read_text(path, MEASUREMENT), path)


class Measurements:
    """The measurements of one results folder: ``measurements/<data set>/<method>/<name>-<key>.json``."""

    def __init__(self, results: Path) -> None:
        self.folder = results / "measurements"

    def path(self, dataset: str | None, method: str | None, name: str, key: str) -> Path:
        """Where the measurement with this key lives."""
        return self.folder / (dataset or NONE) / (method or NONE) / f"{name}-{key[:16]}.json"

    def read(self, path: Path, key: str) -> Measurement | None:
        """The measurement with this key at ``path``; None if there is none.

        Raises:
            UsageError: it was edited, or is another one.
        """
        if not path.is_file():
            return None
        found = read_measurement(path)
        if found.key != key:
            raise UsageError(f"{path}: holds the measurement {found.key[:16]}, not the one it is named after; {_AGAIN}")
        return found

    def write(self, measurement: Measurement) -> Measurement:
        """Store a measurement, whole or not at all; returns it with its path."""
        path = self.path(measurement.dataset, measurement.method, measurement.name, measurement.key)
        write_text(path, measurement.to_json())
        return dataclasses.replace(measurement, path=str(path))

    def all(self, name: str | None = None) -> Iterator[Measurement]:
        """Every measurement, or those of one kind, in the order of their paths."""
        for path in sorted(self.folder.glob(f"*/*/{name or '*'}-*.json")):
            yield read_measurement(path)

"""What one cell gave: a JSON file named by its content key, with the outcome of every image. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensdef.bounded import RECORD, parse_json, read_text
from ensdef.errors import StorageError, UsageError
from ensdef.keys import checksum_of
from ensdef.metrics import binomial_stderr, fraction_of
from ensdef.record_check import check_content

FORMAT = 1
#: Where a record's file keeps the checksum of all that it says.
CHECKSUM = "sha256"
_AGAIN = "delete the file to have it computed again"


@dataclass(frozen=True)
class Record:
    """The result of one attack on one defence.

    Accuracies are fractions in [0, 1]; ``stderr`` is the binomial standard error of ``robust_accuracy``; ``seconds``
    is the attack's wall time; ``forwards`` and ``backwards`` are the attack's member passes per example (one pass of
    three members is 3; the clean pass and the recount are not counted). ``outcomes`` holds 0/1 lists by image:
    ``ids`` (positions in the test set), ``clean`` (right on the clean image), ``robust`` (right on clean and on every
    point the attack offered). ``broken_by`` tells, for an attack made of parts, how many images each part fooled that
    no part before it had. A cell that failed has ``error`` and no accuracies. ``evidence`` says where the adversarial
    examples are and what belongs to them (see :mod:`ensdef.evidence`), or under ``none`` why there are none; it is
    empty in records older than evidence.
    """

    key: str
    method: str
    hyper: Mapping[str, Any]
    label: str
    dataset: str
    architecture: str
    members: int
    train_seed: int | None
    training: Mapping[str, Any]
    attack: str
    attack_params: Mapping[str, Any]
    attack_label: str
    success: str
    norm: str | None
    eps: str | None
    eps_value: float | None
    combiner: str
    n: int
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    stderr: float | None = None
    seconds: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0
    broken_by: Mapping[str, int] = field(default_factory=dict)
    flags: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: str | None = None
    path: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    outcomes: Mapping[str, list[int]] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def summary(self) -> dict[str, Any]:
        """The record without its per-example outcomes, as ``--json`` prints it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "outcomes"}

    def to_json(self) -> str:
        """The whole record and a checksum of it; keys sorted, lists of outcomes on one line."""
        lists = {name: list(values) for name, values in self.outcomes.items()}
        body = {"format": FORMAT, **self.summary(), "path": None}
        body[CHECKSUM] = checksum_of({**body, "outcomes": lists}, CHECKSUM)
        text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False)
        return text[:-2] + ',\n "outcomes": ' + json.dumps(lists, separators=(",", ":")) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, path: Path | None = None) -> Record:
        """Inverse of :meth:`to_json`.

        Raises:
            UsageError: no JSON, no record, another format, numbers that contradict the outcomes, or edited since it was
                written.
        """
        where = f"{path}: " if path else ""
        try:
            body = parse_json(text)
        except UsageError as error:
            raise UsageError(f"{where}no record: {error}; {_AGAIN}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise UsageError(f"{where}no record of format {FORMAT}; {_AGAIN}")
        names = {field.name for field in dataclasses.fields(cls)}
        fields = {**{name: value for name, value in body.items() if name in names}, "path": str(path) if path else None}
        try:
            check_content(cls, body)
        except UsageError as error:
            raise UsageError(f"{where}{error}; {_AGAIN}") from error
        try:
            record = cls(**fields)
        except TypeError as error:
            raise UsageError(f"{where}incomplete record ({error}); {_AGAIN}") from error
        record._check(where)
        try:
            intact = body.get(CHECKSUM) == checksum_of(body, CHECKSUM)
        except ValueError as error:
            raise UsageError(f"{where}holds a number that is none ({error}); {_AGAIN}") from error
        if not intact:
            told = "was edited since it was written (its checksum does not fit)"
            raise UsageError(f"{where}{told if CHECKSUM in body else f'has no {CHECKSUM}, as older records'}; {_AGAIN}")
        return record

    def _check(self, where: str) -> None:
        if self.error is not None:
            return
        for name, accuracy in (("clean", self.clean_accuracy), ("robust", self.robust_accuracy)):
            flags = self.outcomes.get(name, [])
            if len(flags) != self.n or not flags or not {*flags} <= {0, 1} or fraction_of(flags) != accuracy:
                raise UsageError(
                    f"{where}{name}_accuracy {accuracy} over n={self.n} contradicts the outcomes; {_AGAIN}"
                )
        told, ids = "", self.outcomes.get("ids", [])
        if len(ids) != self.n or len(set(ids)) != self.n:
            told = f"n={self.n} contradicts the outcomes, which have other ids, or one twice"
        elif any(robust > clean for clean, robust in zip(self.outcomes["clean"], self.outcomes["robust"], strict=True)):
            told = "an image that is robust but not right contradicts the outcomes"
        elif self.stderr != binomial_stderr(float(self.robust_accuracy or 0), self.n):
            told = f"stderr {self.stderr} contradicts the outcomes"
        if told:
            raise UsageError(f"{where}{told}; {_AGAIN}")


def with_outcomes(record: Record, ids: list[int], clean: list[int], robust: list[int]) -> Record:
    """A record whose accuracies and standard error are counted from the outcomes."""
    accuracy = fraction_of(robust)
    return dataclasses.replace(
        record,
        n=len(ids),
        clean_accuracy=fraction_of(clean),
        robust_accuracy=accuracy,
        stderr=binomial_stderr(accuracy, len(ids)),
        outcomes={"ids": ids, "clean": clean, "robust": robust},
    )


class Store:
    """The records of one results folder: ``records/<dataset>/<method>/<attack>-<key>.json``."""

    def __init__(self, results: Path) -> None:
        self.folder = results / "records"

    def path(self, dataset: str, method: str, attack: str, key: str) -> Path:
        """Where the record of this cell lives."""
        return self.folder / dataset / method / f"{attack}-{key[:16]}.json"

    def read(self, path: Path) -> Record | None:
        """The finished record at ``path``; None if there is none. A failed cell counts as not there.

        Raises:
            UsageError: it is damaged.
        """
        if not path.is_file():
            return None
        record = read_record(path)
        return None if record.error is not None else record

    def write(self, record: Record) -> Record:
        """Store a record, whole or not at all; returns it with its path."""
        path = self.path(record.dataset, record.method, record.attack, record.key)
        write_text(path, record.to_json())
        return dataclasses.replace(record, path=str(path))

    def all(self) -> Iterator[Record]:
        """Every record, failed ones included, in the order of their paths."""
        for path in sorted(self.folder.glob("*/*/*.json")):
            yield read_record(path)


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        UsageError: it cannot be read, is too large, or is no record whose numbers agree with its outcomes.
    """
    return Record.from_json(read_text(path, RECORD), path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a temporary neighbour, renamed over the target."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none of it: a temporary neighbour, flushed, then renamed over the target.

    The neighbour is ``.<name>.<eight characters>``. A killed writer leaves it behind; no reader asks for such names,
    and it may be deleted.

    Raises:
        StorageError: the folder is full, read-only or out of reach; what was there before still is.
    """
    try:
        _write(path, content)
    except OSError as error:
        raise StorageError(error.errno or 0, error.strerror or str(error), os.fspath(path)) from error


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a new name last through a power failure, where the system lets a folder be flushed."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some file systems flush none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

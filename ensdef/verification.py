"""``ensdef verify``: a record against its checkpoint, its images and its evidence, by forward passes alone.

Nothing that a record, a checkpoint or evidence says is taken on trust. Names of files are made from names that are
registered here, and files are opened inside the results folder alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ensdef.bundle import Bundle, Refuted, Unverifiable
from ensdef.checkpoints import load_checkpoint, training_spec
from ensdef.data import Data, Split
from ensdef.defense import EnsembleDefense
from ensdef.errors import CheckpointError, DataError, UsageError
from ensdef.evidence import code_hashes, evidence_path, images_hash, labels_hash
from ensdef.keys import canonical
from ensdef.loading import attacked_subset, find_data
from ensdef.points import DamagedPoints, StoredPoints
from ensdef.record_cell import cell_of, disagreements
from ensdef.records import read_record
from ensdef.recount import Counts, Failure, Recount
from ensdef.specs import Cell, DataSpec, TrainSpec
from ensdef.weights import weights_hash

Status = Literal["verified", "not verified", "not verifiable"]
#: Images a pass of the recount, and what is taken where the attack had as many.
BATCH, OTHER_BATCH = 100, 104


@dataclass(frozen=True)
class Verification:
    """What became of one record.

    Args:
        failures: why it is not verified, or cannot be.
        counts: what was counted, if it is verified.
    """

    path: Path
    status: Status
    failures: tuple[Failure, ...] = ()
    counts: Counts | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, as ``--json`` prints them."""
        counts = None if self.counts is None else dataclasses.asdict(self.counts)
        reasons = [{"reason": one.reason, "images": list(one.ids)} for one in self.failures]
        return {"record": str(self.path), "status": self.status, "reasons": reasons, "counts": counts}


@dataclass(frozen=True)
class Verifier:
    """Verifies records of one results folder.

    Args:
        results: the folder; None: the one whose ``records`` a record lies in.
        data_dir: folder of the data set; None: the data set's own place.
        checkpoint: folder of the weights; None: looked for in ``results``.
        device: where forward passes are made.
    """

    results: Path | None = None
    data_dir: str | None = None
    checkpoint: Path | None = None
    device: str = "cpu"

    def verify(self, path: Path) -> Verification:
        """Look at one record's file; nothing is written."""
        examination = _Examination(self, path)
        status: Status = "verified"
        try:
            examination.run()
        except Unverifiable as error:
            status = "not verifiable"
            examination.failures.append(Failure(str(error)))
        except Refuted as error:
            examination.failures += [Failure(str(error))] if str(error) else []
        except UsageError as error:  # whatever it is of that cannot be read, it was read on the record's word
            examination.failures.append(Failure(str(error).removeprefix(f"{path}: ")))
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            # a hostile description may break a plug-in or torch anywhere; that must not save it, nor stop the others
            examination.failures.append(Failure(f"it cannot be examined: {type(error).__name__}: {error}"))
        failures = tuple(examination.failures)
        if failures and (status == "verified" or len(failures) > 1):
            status = "not verified"
        return Verification(path, status, failures, examination.counts if status == "verified" else None)


class _Examination:
    """One record under examination."""

    def __init__(self, verifier: Verifier, path: Path) -> None:
        self.verifier = verifier
        self.path = path
        self.failures: list[Failure] = []
        self.counts: Counts | None = None

    def run(self) -> None:
        record = self.record = read_record(self.path)
        self._same(self.path.name, f"{record.attack}-{record.key[:16]}.json", "the file is named after another cell")
        if record.error is not None:
            raise Unverifiable(f"the cell failed: {record.error}")
        if not record.evidence:
            raise Unverifiable("no evidence: the record is older than that; delete it to have it computed again")
        if "none" in record.evidence:
            raise Unverifiable(f"no evidence: {record.evidence['none']}")
        bundle = self.bundle = Bundle.of(self.path, self.verifier.results)
        if bundle.place is not None:
            self._same(bundle.place, (record.dataset, record.method), "the file lies among others")
        folder = self.verifier.checkpoint or bundle.checkpoint(record)
        training = training_spec(folder)
        if record.method != training.method:
            raise Refuted(f"method is {record.method!r}, but {folder} holds {training.method!r}")
        defense = self._defense(folder, training)
        cell = self._cell(training)
        test = self._images(training.setting.data)
        points = self._points(tuple(test.images.shape[1:]))
        asked = OTHER_BATCH if record.provenance.get("batch_size") == BATCH else BATCH
        device = torch.device(self.verifier.device)
        recount = Recount(record, defense, cell.attack, test.x(), test.labels, points, asked, device)
        self.failures += recount.failures()
        self.counts = recount.counts()

    def _same(self, came: Any, expected: Any, reason: str) -> bool:
        if came != expected:
            self.failures.append(Failure(f"{reason}: {_short(came)}, expected {_short(expected)}"))
        return bool(came == expected)

    def _defense(self, folder: Path, training: TrainSpec) -> EnsembleDefense:
        try:
            defense = load_checkpoint(folder)
        except CheckpointError as error:
            raise Refuted(str(error)) from error
        told, now = self.record.evidence.get("code"), code_hashes(self.record)
        if told != now:
            changed = [one for one in now if not isinstance(told, dict) or told.get(one) != now[one]]
            raise Unverifiable(
                f"the source of its {' and '.join(changed)} is not the one here; install ensdef "
                f"{self.record.evidence.get('version')} and the plug-ins that made the record"
            )
        self._same(defense.training_key, training.key, f"the key in {folder} does not follow from what it describes")
        if canonical(dataclasses.asdict(training.model)) != canonical(dataclasses.asdict(defense.spec)):
            raise Refuted(f"{folder} describes one model and the training of another")
        if weights_hash(defense) != self.record.evidence.get("weights"):
            self.failures.append(Failure(f"the weights in {folder} are not those that were attacked"))
        return defense

    def _cell(self, training: TrainSpec) -> Cell:
        cell = cell_of(self.record, training)
        self.failures += map(Failure, disagreements(self.record, cell))
        if self.record.dataset != training.setting.data.name:
            raise Refuted
        return cell

    def _images(self, spec: DataSpec) -> Split:
        """The attacked images, from the data set loaded again."""
        record = self.record
        data = self._data(spec)
        try:
            test, ids = attacked_subset(data, record.n)
        except DataError as error:
            raise Refuted(f"n is {record.n}: {error}") from error
        strangers = tuple(sorted(set(record.outcomes["ids"]) - set(ids.tolist())))
        if strangers:
            self.failures.append(Failure(f"not among the first {record.n} of the permuted test set", strangers))
        elif record.outcomes["ids"] != ids.tolist():
            self.failures.append(Failure("its images are in another order than those of the permuted test set"))
        self._same(record.provenance.get("subset_checksum"), test.checksum(), "the checksum of its images is another")
        self._same(record.evidence.get("inputs"), images_hash(test.x()), "evidence is of other images")
        self._same(record.evidence.get("labels"), labels_hash(test.labels), "evidence is of other labels")
        if record.outcomes["ids"] != ids.tolist():
            raise Refuted
        return test

    def _data(self, spec: DataSpec) -> Data:
        # the folder that a checkpoint names is one of the machine it was made on: nothing is read or downloaded there
        try:
            data, found = find_data(spec.name, self.verifier.data_dir, spec.image_size)
        except DataError as error:
            raise Unverifiable(f"the data set cannot be read: {error}") from error
        told = (spec.test_checksum, spec.image_shape, spec.num_classes)
        if (found.test_checksum, found.image_shape, found.num_classes) != told:
            raise Refuted(
                f"the test set of {spec.name} here is not the one that was attacked (checksum {found.test_checksum}, "
                f"expected {spec.test_checksum}); name its folder with --data-dir"
            )
        return data

    def _points(self, shape: tuple[int, ...]) -> StoredPoints:
        record, told = self.record, self.record.evidence.get("sha256")
        if not isinstance(told, str) or not re.fullmatch("[0-9a-f]{64}", told):
            raise Refuted(f"the checksum of its evidence is {str(told)[:80]!r}")
        relative = evidence_path(record, told)
        self._same(record.evidence.get("file"), str(relative), "its evidence is said to be another file")
        content = self.bundle.evidence(relative, record.n * (4 * torch.Size(shape).numel() + 8))
        if told != (now := hashlib.sha256(content).hexdigest()):
            raise Refuted(f"{relative} was altered: its checksum is {now[:16]}, not {told[:16]}")
        try:
            points = StoredPoints.unpack(content, shape)
        except DamagedPoints as error:
            raise Refuted(f"{relative} {error}") from error
        self._same(points.key, record.key, f"{relative} is of another cell")
        right = {one for one, clean in zip(record.outcomes["ids"], record.outcomes["clean"], strict=True) if clean}
        if missing := tuple(sorted(right - set(points.ids))):
            self.failures.append(Failure("right on the clean image, but without a stored point", missing))
        if extra := tuple(sorted(set(points.ids) - right)):
            self.failures.append(Failure("a point is stored, but the image is not among those that were right", extra))
        if missing:
            raise Refuted
        return points


def _short(value: Any) -> str:
    """A value in a message; of a hash its beginning."""
    text = str(value)
    return text[:16] if len(text) == 64 and "/" not in text else text

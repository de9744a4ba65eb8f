"""Trains what is missing, attacks what is missing, writes records: the flow behind ``bench`` and ``run``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

from ensdef.checkpoints import checkpoint_folder, load_checkpoint
from ensdef.claims import Claims
from ensdef.errors import UsageError
from ensdef.executor import Executor, LocalExecutor
from ensdef.health.catalogue import TIERS, Tier
from ensdef.jobs import CellJob, Job, Result, Run, TrainJob, forget, is_trained
from ensdef.leaderboard import protocols
from ensdef.parallel import check_training
from ensdef.progress import Advance, Progress
from ensdef.records import Record, Store, write_bytes
from ensdef.specs import Cell, TrainSpec

__all__ = ["Run", "check_writable", "ensure_trained", "find_record", "preflight", "run_cells"]

#: Seconds between looks at what other drivers have done.
POLL = 1.0


def check_writable(results: Path) -> None:
    """Refuse a results folder that cannot be written, before any work.

    Raises:
        UsageError: it cannot be created, or files in it cannot be.
    """
    probe = results / ".write-test"
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"results folder {results} cannot be written ({error.strerror}); choose another with --results"
        ) from error


def find_record(cell: Cell, results: Path, health: Tier | None = None) -> Record | None:
    """The finished record of a cell, if there is one whose health report is of this tier or a higher one."""
    store = Store(results)
    data = cell.training.setting.data.name
    record = store.read(store.path(data, cell.training.method, cell.attack.name, cell.key))
    if record is not None and health is not None:
        had = record.provenance.get("health", "off")  # records older than the report have none
        if had not in TIERS or TIERS.index(had) < TIERS.index(health):
            return None
    # the same radius may have been written in another way when the record was made
    return None if record is None else dataclasses.replace(record, eps=cell.attack.written)


def preflight(cells: Iterable[Cell], results: Path, health: Tier | None = None, devices: int = 1) -> None:
    """Read every record and checkpoint that a run will rely on, before anything is trained.

    Raises:
        UsageError: a record is damaged, or a training that is missing cannot be shared by so many devices.
        CheckpointError: a checkpoint is truncated, a pickle, or belongs to another architecture.
    """
    seen: set[str] = set()
    for cell in cells:
        if find_record(cell, results, health) is None:
            for spec in (cell.training, *cell.prerequisites.values()):
                _check_checkpoint(spec, results, seen, devices)


def _check_checkpoint(spec: TrainSpec, results: Path, seen: set[str], devices: int) -> None:
    trained = is_trained(spec, results)
    if spec.key not in seen:
        if trained:
            load_checkpoint(checkpoint_folder(results, spec))
        else:
            check_training(spec, devices)
    seen.add(spec.key)
    for needed in spec.prerequisites.values():
        _check_checkpoint(needed, results, seen, 1 if trained else devices)


def run_cells(
    cells: Iterable[Cell], run: Run, progress: Progress | None = None, executor: Executor | None = None
) -> list[Record]:
    """Every cell's record, in order; a cell that fails gives a record with ``error`` and stops nobody else.

    Several processes may run cells in one results folder at a time: each does what no other is doing.

    Args:
        executor: where trainings and attacks run; None: one after the other in this process.
    Raises:
        CheckpointError, DataError: what is kept on disk is not as it should be.
    """
    progress = progress or Progress()
    return _Driver(list(cells), run, progress, executor or LocalExecutor(run.results, progress)).records()


def ensure_trained(spec: TrainSpec, run: Run, progress: Progress | None = None) -> Path:
    """Train a specification and its prerequisites unless their checkpoints exist; returns the folder.

    Raises:
        TrainingDiverged: a loss term became NaN or infinite; the last good epoch is in the folder.
    """
    if not is_trained(spec, run.results):
        for needed in spec.prerequisites.values():
            ensure_trained(needed, run, progress)
        TrainJob(spec, run).perform(run.results, progress or Progress())
    return checkpoint_folder(run.results, spec)


class _Blocked(Exception):
    """Something a job needs is being made."""


class _Driver:
    """Hands out jobs in the order of the cells, and files what comes back."""

    def __init__(self, cells: list[Cell], run: Run, progress: Progress, executor: Executor) -> None:
        self.cells = cells
        self.run = run
        self.progress = progress
        self.executor = executor
        self.store = Store(run.results)
        self.claims = Claims(run.results, progress.message)
        #: records by cell key
        self.done: dict[str, Record] = {}
        #: keys of finished trainings, and what went wrong with others
        self.trained: set[str] = set()
        self.failures: dict[str, str] = {}
        self.running: set[str] = set()

    def records(self) -> list[Record]:
        unique = {cell.key: cell for cell in self.cells}
        bar = self.progress if self.executor.silent else Progress()
        waited = False
        try:
            with bar.task("cells", len(unique)) as advance:
                while waiting := [cell for key, cell in unique.items() if key not in self.done]:
                    before = len(self.done)
                    self._start(waiting)
                    if self.running:
                        self._file(*self.executor.next())
                    elif len(self.done) == before:
                        if not waited:
                            self.progress.message(
                                f"waiting: other commands on {self.run.results} are at work on all that is left "
                                f"({len(waiting)} cells); their locks are in {self.claims.folder}"
                            )
                        waited = True
                        time.sleep(POLL)
                    _count(advance, len(self.done) - before)
        except KeyboardInterrupt as error:
            error.add_note(
                f"{len(self.done)} of {len(unique)} cells are done, and what was kept of the others lies in "
                f"{self.run.results}; the same command goes on from there"
            )
            raise
        finally:
            self.claims.release_all()
            self.executor.close()
        return [self.done[cell.key] for cell in self.cells]

    def _start(self, waiting: list[Cell]) -> None:
        for cell in waiting:
            if not self.executor.has_room:
                return
            if cell.key in self.running:
                continue
            record = find_record(cell, self.run.results, self.run.health)
            if record is not None and self._foreign(record):
                if not self.claims.take(cell.key):
                    continue  # somebody is at this record
                record = self._adopted(cell)
                self.claims.release(cell.key)
            if record is not None:
                self.done[cell.key] = record
                continue
            try:
                job = self._job(cell)
            except _Blocked:
                continue
            if job is not None:
                self.running.add(job.key)
                self.executor.submit(job)

    def _foreign(self, record: Record) -> bool:
        """Whether no run of this protocol has met the record yet."""
        return self.run.protocol is not None and self.run.protocol not in protocols(record)

    def _adopted(self, cell: Cell) -> Record | None:
        """The finished record of a claimed cell, which from now on is also one of the protocol that is run."""
        record = find_record(cell, self.run.results, self.run.health)
        if record is None or not self._foreign(record):
            return record
        also = {**record.provenance, "also_in": [*record.provenance.get("also_in", ()), self.run.protocol]}
        stored = self.store.read(Path(str(record.path))) or record  # its radius as it was written then
        self.store.write(dataclasses.replace(stored, provenance=also))
        return dataclasses.replace(record, provenance=also)

    def _job(self, cell: Cell) -> Job | None:
        """What has to be done next for a cell; None: it is done.

        Raises:
            _Blocked: that is being done already.
        """
        job = CellJob(cell, self.run)
        for spec in job.needs:
            if (missing := self._missing(spec)) is not None:
                return missing
        if not self.claims.take(cell.key):
            raise _Blocked
        record = self._adopted(cell)
        if record is None:
            failed = next((self.failures[spec.key] for spec in job.needs if spec.key in self.failures), None)
            if failed is None:
                return job
            record = self._failed(job, failed)
        self.claims.release(cell.key)
        self.done[cell.key] = record
        return None

    def _missing(self, spec: TrainSpec) -> TrainJob | None:
        """The next training on the way to ``spec``; None: it is trained, or cannot be."""
        if spec.key in self.trained:
            return None
        if spec.key in self.running:
            raise _Blocked
        if not is_trained(spec, self.run.results):  # what failed here may have succeeded for another driver
            if spec.key in self.failures:
                return None
            for needed in spec.prerequisites.values():
                if (missing := self._missing(needed)) is not None:
                    return missing
                if needed.key in self.failures:
                    self.failures[spec.key] = self.failures[needed.key]
                    return None
            if not self.claims.take(spec.key):
                raise _Blocked
            if not is_trained(spec, self.run.results):
                return TrainJob(spec, self.run)
            self.claims.release(spec.key)
        self.trained.add(spec.key)
        self.failures.pop(spec.key, None)
        return None

    def _file(self, job: Job, result: Result) -> None:
        """Keep what came of a job, and let others have what was claimed for it."""
        if result.refused is not None:
            raise result.refused
        # a checkpoint's description makes its weights valid, an adversarial set's manifest its images: both are JSON
        for path in sorted(result.files, key=lambda path: path.endswith(".json")):
            write_bytes(self.run.results / path, result.files[path])
        if isinstance(job, TrainJob):
            if result.error is None:
                self.trained.add(job.key)
            else:
                self.failures[job.key] = result.error
        elif result.record is not None:
            self.done[job.key] = self.store.write(result.record)
        else:
            self.done[job.key] = self._failed(job, result.error or "no record came back")
        if result.error is None:
            forget(self.run.results, job.key)
        self.running.discard(job.key)
        self.claims.release(job.key)

    def _failed(self, job: CellJob, error: str) -> Record:
        record = job.failed(error)
        self.progress.message(f"failed: {record.label} under {record.attack_label}: {error}")
        return self.store.write(record)


def _count(advance: Advance, finished: int) -> None:
    if finished:
        advance(finished)

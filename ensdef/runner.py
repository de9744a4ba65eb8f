"""Trains what is missing, attacks what is missing, writes records: the flow behind ``bench`` and ``run``."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ensdef.checkpoints import checkpoint_folder
from ensdef.claims import Claims
from ensdef.errors import CheckpointError, StorageError, UsageError
from ensdef.executor import Executor, LocalExecutor
from ensdef.finished import find_record, is_whole, whole_record
from ensdef.jobs import CellJob, Job, Result, Run, TrainJob, forget, is_trained
from ensdef.leaderboard import protocols
from ensdef.preflight import check_writable, preflight
from ensdef.progress import Advance, Progress
from ensdef.records import Record, Store, write_bytes
from ensdef.specs import Cell, TrainSpec

__all__ = ["Run", "check_writable", "ensure_trained", "find_record", "preflight", "run_cells"]

#: Seconds between looks at what other drivers have done.
POLL = 1.0
#: How often a cell is begun again whose checkpoints another command made anew meanwhile.
RETRIES = 2


def run_cells(
    cells: Iterable[Cell], run: Run, progress: Progress | None = None, executor: Executor | None = None
) -> list[Record]:
    """Every cell's record, in order; a cell that fails gives a record with ``error`` and stops nobody else.

    Several processes may run cells in one results folder at a time: each does what no other is doing.

    Args:
        executor: where trainings and attacks run; None: one after the other in this process.
    Raises:
        DataError: a data set is not what it was when the cells were planned.
        CheckpointError: a checkpoint cannot be loaded, though it is as it was written.
        StorageError: the results folder cannot be written; what is finished is kept.
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
        #: how often jobs found a checkpoint other than it had been
        self.upset: Counter[str] = Counter()

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
            self.executor.close()  # before others may begin what it was at
            self.claims.release_all()
        return [self.done[cell.key] for cell in self.cells]

    def _start(self, waiting: list[Cell]) -> None:
        for cell in waiting:
            if not self.executor.has_room:
                return
            if cell.key in self.running:
                continue
            record = whole_record(cell, self.run.results, self.run.health)
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
        record = whole_record(cell, self.run.results, self.run.health, self.progress.message)
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
        if not is_whole(spec, self.run.results):  # what failed here may have succeeded for another driver
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
            if not is_whole(spec, self.run.results, self.progress.message):
                return TrainJob(spec, self.run)
            self.claims.release(spec.key)
        self.trained.add(spec.key)
        self.failures.pop(spec.key, None)
        return None

    def _file(self, job: Job, result: Result) -> None:
        """Keep what came of a job, and let others have what was claimed for it."""
        if result.refused is not None:
            self._upset(job, result.refused)
        elif not self._overtaken(job):
            self._keep(job, result)
        self.running.discard(job.key)
        self.claims.release(job.key)

    def _upset(self, job: Job, error: UsageError | StorageError) -> None:
        """A job found a checkpoint gone or damaged: another command may have set it aside, or this one has to.

        Raises:
            UsageError, StorageError: it is something else, or happens again and again.
        """
        self.upset[job.key] += 1
        if not isinstance(error, CheckpointError) or self.upset[job.key] > RETRIES:
            raise error
        self.progress.message(f"begun again: {job.label}: {error}")
        self.trained.difference_update(spec.key for spec in job.needs)

    def _overtaken(self, job: Job) -> bool:
        """Whether others took the work for dead and have done it; then it is theirs that counts."""
        if self.claims.holds(job.key):
            return False
        if isinstance(job, TrainJob):
            done = is_whole(job.spec, self.run.results)
        else:
            done = whole_record(job.cell, self.run.results, self.run.health) is not None
        if done:
            self.progress.message(f"dropped: {job.label}: this process stood still, and another did it meanwhile")
        return done

    def _keep(self, job: Job, result: Result) -> None:
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

    def _failed(self, job: CellJob, error: str) -> Record:
        record = job.failed(error)
        self.progress.message(f"failed: {record.label} under {record.attack_label}: {error}")
        return self.store.write(record)


def _count(advance: Advance, finished: int) -> None:
    if finished:
        advance(finished)

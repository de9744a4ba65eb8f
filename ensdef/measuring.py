"""Makes the measurements that are missing, trains what they need, keeps them: the flow behind ``ensdef measure``."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch

from ensdef.checkpoints import checkpoint_folder, load_checkpoint, training_report
from ensdef.claims import Claims
from ensdef.defense import EnsembleDefense
from ensdef.errors import CheckpointError, DataError, ForeignCheckpoint, StorageError
from ensdef.finished import is_whole
from ensdef.harness import exact_arithmetic
from ensdef.jobs import Run, TrainJob, attempt, describe, is_trained
from ensdef.loading import attacked_subset, reload_data
from ensdef.measure import Subject
from ensdef.measure_spec import MeasureSpec, plan_measurements
from ensdef.measured import blank_measurement, filled, find_measurement, measurement_path, measurement_provenance
from ensdef.measurement import Measurement, Measurements
from ensdef.progress import Progress
from ensdef.recombined import recombined
from ensdef.registry import MEASUREMENTS
from ensdef.rehearsal import rehearse
from ensdef.set_aside import whole
from ensdef.specs import TrainSpec

__all__ = ["MeasureSpec", "check_measurable", "find_measurement", "measure_all", "plan_measurements"]

#: Seconds between looks at what other commands have done.
POLL = 1.0
#: How often a measurement is begun again whose checkpoint another command made anew meanwhile.
RETRIES = 2


def check_measurable(specs: Iterable[MeasureSpec]) -> None:
    """Build every defence once, untrained, and ask the measurements whether they fit it.

    Raises:
        UsageError: a defence cannot be built, or a measurement needs something that it does not have.
    """
    built: dict[str, EnsembleDefense] = {}
    for spec in specs:
        if spec.training is not None:
            if spec.training.key not in built:
                data = reload_data(spec.training.setting.data)
                built[spec.training.key], _ = rehearse(spec.training.model, data.test.x(slice(0, 4)))
            defense = built[spec.training.key]
            MEASUREMENTS.get(spec.name)(spec.params_object).fits(recombined(defense, spec.combiner))


def measure_all(specs: Iterable[MeasureSpec], run: Run, progress: Progress | None = None) -> list[Measurement]:
    """Every measurement, in order; one that fails has ``error``, is not stored and stops nobody else.

    Several processes may measure in one results folder at a time: each does what no other is doing.

    Raises:
        DataError: a data set is not what it was when the measurements were planned.
        CheckpointError: a checkpoint cannot be loaded, though it is as it was written.
        StorageError: the results folder cannot be written; what is finished is kept.
    """
    specs = list(specs)
    made = _Work(run, progress or Progress()).measurements({spec.key: spec for spec in specs})
    return [dataclasses.replace(made[spec.key], eps=spec.written) for spec in specs]


class _Failed(Exception):
    """A training did not succeed."""


class _Work:
    """What is missing, one after the other."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run = run
        self.progress = progress
        self.claims = Claims(run.results, progress.message)
        #: what went wrong with trainings, by key
        self.failures: dict[str, str] = {}
        #: how often measurements found a checkpoint other than it had been
        self.upset: Counter[str] = Counter()

    def measurements(self, specs: Mapping[str, MeasureSpec]) -> dict[str, Measurement]:
        done: dict[str, Measurement] = {}
        waited = False
        try:
            while waiting := [spec for key, spec in specs.items() if key not in done]:
                before = len(done)
                for spec in waiting:
                    found = self._find(spec) or self._make(spec)
                    if found is not None:
                        done[spec.key] = found
                if len(done) == before:
                    if not waited:
                        self.progress.message(
                            f"waiting: other commands on {self.run.results} are at work on all that is left "
                            f"({len(waiting)} measurements); their locks are in {self.claims.folder}"
                        )
                    waited = True
                    time.sleep(POLL)
        except KeyboardInterrupt as error:
            error.add_note(
                f"{len(done)} of {len(specs)} measurements are done, and what was kept of trainings lies in "
                f"{self.run.results}; the same command goes on from there"
            )
            raise
        finally:
            self.claims.release_all()
        return done

    def _find(self, spec: MeasureSpec, tell: Callable[[str], None] | None = None) -> Measurement | None:
        """The stored measurement; a damaged one is none, and is set aside if there is somebody to ``tell``."""
        return whole(lambda: find_measurement(spec, self.run), measurement_path(spec, self.run), tell)

    def _make(self, spec: MeasureSpec) -> Measurement | None:
        """A missing measurement, made and stored; None while another process is at it or at what it needs."""
        try:
            if spec.training is not None and not self._train(spec.training):
                return None
            if not self.claims.take(spec.key):
                return None
            try:
                return self._find(spec, self.progress.message) or self._measure(spec)
            finally:
                self.claims.release(spec.key)
        except ForeignCheckpoint:
            raise
        except CheckpointError as error:  # set aside by another command since it was looked at, or damaged
            self.upset[spec.key] += 1
            if self.upset[spec.key] > RETRIES:
                raise
            self.progress.message(f"begun again: {spec.label}: {error}")
            return None
        except _Failed as error:
            return self._failed(spec, str(error))

    def _train(self, spec: TrainSpec) -> bool:
        """See to it that the checkpoint is there; False while another process is at it.

        Raises:
            _Failed: it, or a training that it starts from, cannot be trained.
        """
        if is_whole(spec, self.run.results):
            return True
        if spec.key in self.failures:
            raise _Failed(self.failures[spec.key])
        if not all(self._train(needed) for needed in spec.prerequisites.values()):
            return False
        if not self.claims.take(spec.key):
            return False
        try:
            if not is_whole(spec, self.run.results, self.progress.message):
                result = attempt(TrainJob(spec, self.run), self.run.results, self.progress)
                if result.refused is not None:
                    raise result.refused
                if result.error is not None:
                    self.failures[spec.key] = result.error
                    raise _Failed(result.error)
        finally:
            self.claims.release(spec.key)
        return True

    def _measure(self, spec: MeasureSpec) -> Measurement:
        began = time.monotonic()
        try:
            with self.progress.task(spec.label, 1) as advance:
                subject = _subject(spec, self.run)
                with exact_arithmetic(torch.device(self.run.device)):
                    measured = MEASUREMENTS.get(spec.name)(spec.params_object).measure(subject)
                advance(1)
        except (CheckpointError, DataError, StorageError):
            raise
        except Exception as error:
            return self._failed(spec, describe(error))
        if not self.claims.holds(spec.key) and (theirs := self._find(spec)) is not None:
            return theirs  # this process stood still, and another did it meanwhile
        made = filled(blank_measurement(spec, self.run), measured, spec.samples)
        seconds = round(time.monotonic() - began, 3)
        return Measurements(self.run.results).write(
            dataclasses.replace(made, seconds=seconds, provenance=measurement_provenance(spec, self.run))
        )

    def _failed(self, spec: MeasureSpec, error: str) -> Measurement:
        self.progress.message(f"failed: {spec.label}: {error}")
        return dataclasses.replace(
            blank_measurement(spec, self.run), error=error, provenance=measurement_provenance(spec, self.run)
        )


def _subject(spec: MeasureSpec, run: Run) -> Subject:
    """What the measurement depends on, on the device of the run."""
    nothing = torch.empty(0)
    # a measurement is handed only what it says it depends on
    subject = Subject(cast(Any, None), nothing, nothing, nothing, spec.norm or "", spec.eps or "", spec.seed)
    if spec.training is None:
        return subject
    folder = checkpoint_folder(run.results, spec.training)
    defense = recombined(load_checkpoint(folder), spec.combiner).to(run.device)
    subject = dataclasses.replace(
        subject, defense=defense, report=training_report(folder), earlier=_earlier(spec.training, run)
    )
    if spec.subset_checksum is None:
        return subject
    test, ids = attacked_subset(reload_data(spec.training.setting.data), spec.samples)
    if test.checksum() != spec.subset_checksum:
        raise DataError(
            f"the test images of {spec.training.setting.data.name} have checksum {test.checksum()} where "
            f"{spec.subset_checksum} was expected"
        )
    test = test.to(torch.device(run.device))
    return dataclasses.replace(subject, x=test.x(), y=test.labels, ids=ids)


def _earlier(training: TrainSpec, run: Run) -> list[dict[str, Any]] | None:
    """Reports of all trainings that this one started from."""
    found: dict[str, TrainSpec] = {}
    pending = list(training.prerequisites.values())
    while pending:
        spec = pending.pop()
        found[spec.key] = spec
        pending.extend(spec.prerequisites.values())
    if not all(is_trained(spec, run.results) for spec in found.values()):
        return None
    return [training_report(checkpoint_folder(run.results, spec)) for spec in found.values()]

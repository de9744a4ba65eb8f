"""Makes the measurements that are missing, trains what they need, keeps them: the flow behind ``ensdef measure``."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from ensdef.checkpoints import checkpoint_folder, load_checkpoint, training_report
from ensdef.claims import Claims
from ensdef.defense import EnsembleDefense
from ensdef.errors import CheckpointError, DataError
from ensdef.harness import exact_arithmetic
from ensdef.jobs import Run, TrainJob, attempt, describe, is_trained
from ensdef.loading import attacked_subset, reload_data
from ensdef.measure import Measured, Subject
from ensdef.measure_spec import MeasureSpec, plan_measurements
from ensdef.measurement import Measurement, Measurements, tidy
from ensdef.progress import Progress
from ensdef.provenance import provenance
from ensdef.recombined import recombined
from ensdef.record_cell import training_fields
from ensdef.registry import MEASUREMENTS
from ensdef.rehearsal import rehearse
from ensdef.specs import TrainSpec

__all__ = ["MeasureSpec", "check_measurable", "find_measurement", "measure_all", "plan_measurements"]

#: Seconds between looks at what other commands have done.
POLL = 1.0


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


def find_measurement(spec: MeasureSpec, run: Run) -> Measurement | None:
    """The stored measurement, if there is one.

    Raises:
        UsageError: it was edited since.
    """
    blank, store = _blank(spec, run), Measurements(run.results)
    found = store.read(store.path(blank.dataset, blank.method, spec.name, spec.key), spec.key)
    # the same radius may have been written in another way when it was measured
    return None if found is None else dataclasses.replace(found, eps=spec.written)


def measure_all(specs: Iterable[MeasureSpec], run: Run, progress: Progress | None = None) -> list[Measurement]:
    """Every measurement, in order; one that fails has ``error``, is not stored and stops nobody else.

    Several processes may measure in one results folder at a time: each does what no other is doing.

    Raises:
        UsageError: a stored measurement was edited.
        CheckpointError, DataError: what else is kept on disk is not as it should be.
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

    def measurements(self, specs: Mapping[str, MeasureSpec]) -> dict[str, Measurement]:
        done: dict[str, Measurement] = {}
        waited = False
        try:
            while waiting := [spec for key, spec in specs.items() if key not in done]:
                before = len(done)
                for spec in waiting:
                    found = find_measurement(spec, self.run) or self._make(spec)
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
        finally:
            self.claims.release_all()
        return done

    def _make(self, spec: MeasureSpec) -> Measurement | None:
        """A missing measurement, made and stored; None while another process is at it or at what it needs."""
        try:
            if spec.training is not None and not self._train(spec.training):
                return None
            if not self.claims.take(spec.key):
                return None
            try:
                return find_measurement(spec, self.run) or self._measure(spec)
            finally:
                self.claims.release(spec.key)
        except _Failed as error:
            return self._failed(spec, str(error))

    def _train(self, spec: TrainSpec) -> bool:
        """See to it that the checkpoint is there; False while another process is at it.

        Raises:
            _Failed: it, or a training that it starts from, cannot be trained.
        """
        if is_trained(spec, self.run.results):
            return True
        if spec.key in self.failures:
            raise _Failed(self.failures[spec.key])
        if not all(self._train(needed) for needed in spec.prerequisites.values()):
            return False
        if not self.claims.take(spec.key):
            return False
        try:
            if not is_trained(spec, self.run.results):
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
        except (CheckpointError, DataError):
            raise
        except Exception as error:
            return self._failed(spec, describe(error))
        made = _filled(_blank(spec, self.run), measured, spec.samples)
        seconds = round(time.monotonic() - began, 3)
        return Measurements(self.run.results).write(
            dataclasses.replace(made, seconds=seconds, provenance=_provenance(spec, self.run))
        )

    def _failed(self, spec: MeasureSpec, error: str) -> Measurement:
        self.progress.message(f"failed: {spec.label}: {error}")
        return dataclasses.replace(_blank(spec, self.run), error=error, provenance=_provenance(spec, self.run))


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


def _blank(spec: MeasureSpec, run: Run) -> Measurement:
    """What is known of a measurement before it is made."""
    trained: dict[str, Any] = dict.fromkeys(
        ("method", "label", "dataset", "architecture", "members", "train_seed", "checkpoint")
    )
    hyper, training = {}, {}
    if spec.training is not None:
        model, setting = spec.training.model, spec.training.setting
        hyper, training = dict(model.hyper), training_fields(spec.training)
        trained = {
            "method": model.method,
            "label": model.method_call,
            "dataset": setting.data.name,
            "architecture": model.architecture_call,
            "members": model.members,
            "train_seed": setting.seed,
            "checkpoint": str(checkpoint_folder(run.results, spec.training)),
        }
    return Measurement(
        key=spec.key,
        name=spec.name,
        params=dict(spec.params),
        call=spec.call,
        hyper=hyper,
        training=training,
        norm=spec.norm,
        eps=spec.written,
        eps_value=spec.eps_value,
        combiner=spec.combiner,
        seed=spec.seed,
        **trained,
    )


def _filled(blank: Measurement, measured: Measured, images: int | None) -> Measurement:
    return dataclasses.replace(
        blank,
        n=images if measured.n is None else measured.n,
        values={name: float(value) if math.isfinite(value) else None for name, value in measured.values.items()},
        stderr={name: float(value) for name, value in measured.stderr.items() if math.isfinite(value)},
        series={name: tidy(value) for name, value in measured.series.items()},
    )


def _provenance(spec: MeasureSpec, run: Run) -> dict[str, Any]:
    told = provenance(run.device, protocol=run.protocol, subset_checksum=spec.subset_checksum)
    if spec.training is None:
        return told
    folder = checkpoint_folder(run.results, spec.training)
    report = training_report(folder) if is_trained(spec.training, run.results) else {}
    trained_on: dict[str, Any] = {name: report[name] for name in ("devices", "batch_norm") if name in report}
    return {**told, "train_seed": spec.training.setting.seed, **trained_on}

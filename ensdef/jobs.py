"""Pieces of work that can be done anywhere: a training, or an attack on what was trained. Values in, files out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ensdef.adversarial_sets import AdversarialSets
from ensdef.backend import is_out_of_memory
from ensdef.batch_size import choose_batch_size
from ensdef.checkpoints import (
    LAST_GOOD,
    checkpoint_folder,
    is_complete,
    load_checkpoint,
    save_checkpoint,
    save_last_good,
    training_report,
)
from ensdef.defense import EnsembleDefense
from ensdef.errors import CheckpointError, DataError, StorageError, TrainingDiverged, UsageError
from ensdef.evaluation import evaluate_cell
from ensdef.evidence import EvidenceFolder, Keep
from ensdef.health.catalogue import Tier
from ensdef.journal import Journal
from ensdef.loading import attacked_subset, reload_data
from ensdef.progress import Progress
from ensdef.provenance import provenance
from ensdef.record_cell import blank_record
from ensdef.records import Record
from ensdef.specs import Cell, TrainSpec
from ensdef.training import train
from ensdef.training_cost import costs_of, whole_cost
from ensdef.weights import weights_hash


@dataclass(frozen=True)
class Run:
    """Where and how cells are run; nothing here is part of a key.

    Args:
        results: folder for records and checkpoints.
        device: ``"cpu"`` or ``"cuda"``.
        batch_size: rows an attack pass; None: see :func:`ensdef.batch_size.choose_batch_size`.
        protocol: id written into new records.
        health: tier of the report that new records carry, and that a record must have to count as done; None: basic for
            new records, any for those that are there.
        devices: GPUs, or processes on the CPU, that share each training. Weights then differ by rounding, and where a
            network has batch norm or a loss draws of its own by more: records tell both in ``provenance``.
        evidence: whether new records keep their adversarial examples; those that are there are done either way.
    """

    results: Path
    device: str = "cpu"
    batch_size: int | None = None
    protocol: str | None = None
    health: Tier | None = None
    devices: int = 1
    evidence: Keep = "all"


@dataclass(frozen=True)
class TrainJob:
    """Train a specification whose prerequisites are trained."""

    spec: TrainSpec
    run: Run
    #: what to do when memory does not suffice
    smaller = (
        "to train in less memory take fewer --members, a smaller --arch, or [train] batch_size in a --config file "
        "(another batch size is another training)"
    )

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def label(self) -> str:
        return f"train {self.spec.model.method_call} seed {self.spec.setting.seed}"

    @property
    def needs(self) -> tuple[TrainSpec, ...]:
        """Trainings whose checkpoints must be in the folder."""
        return tuple(self.spec.prerequisites.values())

    def perform(self, where: Path, progress: Progress) -> None:
        """Write the checkpoint into the results folder ``where``.

        Raises:
            TrainingDiverged: a loss term became NaN or infinite; the last good epoch is in the folder.
        """
        spec, folder = self.spec, checkpoint_folder(where, self.spec)
        prerequisites = {
            role: load_checkpoint(checkpoint_folder(where, needed)) for role, needed in spec.prerequisites.items()
        }
        data, run = reload_data(spec.setting.data), self.run
        journal = _journal(self, where, progress, _hashes(prerequisites))
        try:
            trained = train(
                spec,
                data,
                prerequisites,
                device=run.device,
                devices=run.devices,
                journal=journal,
                progress=progress,
            )
        except TrainingDiverged as error:
            if is_complete(folder, spec):  # this process stood still, and another did it meanwhile
                return
            save_last_good(folder, error.last_good, spec, str(error))
            forget(where, spec.key)
            kept = checkpoint_folder(run.results, spec) / LAST_GOOD
            raise TrainingDiverged(f"{error} (weights of the last good epoch: {kept})") from error
        before = [(one.key, training_report(checkpoint_folder(where, one))) for one in self.needs]
        if is_complete(folder, spec):  # this process stood still, and another did it meanwhile
            return
        told = {"costs": costs_of(spec, trained, before), "provenance": provenance(run.device)}
        save_checkpoint(folder, trained.defense, spec, {**trained.report, **told})
        forget(where, spec.key)


@dataclass(frozen=True)
class CellJob:
    """Attack a trained defence."""

    cell: Cell
    run: Run
    #: what to do when memory does not suffice
    smaller = (
        "batches were halved as far as they can be; end other programs, or take a smaller --batch-size or --samples"
    )

    @property
    def key(self) -> str:
        return self.cell.key

    @property
    def label(self) -> str:
        training, attack = self.cell.training, self.cell.attack
        return f"{training.model.method_call} seed {training.setting.seed} under {attack.call} {attack.written or ''}"

    @property
    def needs(self) -> tuple[TrainSpec, ...]:
        """Trainings whose checkpoints must be in the folder."""
        return (self.cell.training, *self.cell.prerequisites.values())

    def perform(self, where: Path, progress: Progress) -> Record:
        """The record, not yet written, from the checkpoints in the results folder ``where``.

        Whoever writes it then calls :func:`forget`.
        """
        cell, run = self.cell, self.run
        folder = checkpoint_folder(where, cell.training)
        surrogates = {
            role: load_checkpoint(checkpoint_folder(where, needed)) for role, needed in cell.prerequisites.items()
        }
        test, ids = attacked_subset(reload_data(cell.training.setting.data), cell.samples)
        defense, trained = load_checkpoint(folder), training_report(folder)
        check_finite(defense, folder)
        health = run.health or "basic"
        weights = _hashes({"": defense, **surrogates})
        return evaluate_cell(
            defense,
            cell,
            test,
            ids,
            device=run.device,
            batch_size=run.batch_size or choose_batch_size(defense, test.x(), run.device),
            checkpoint=str(checkpoint_folder(run.results, cell.training)),
            protocol=run.protocol,
            prerequisites=surrogates,
            sets=AdversarialSets(where, progress.message),
            evidence=EvidenceFolder(where) if run.evidence == "all" else None,
            trained_with=trained.get("health", ()),
            trained_on={
                "devices": 1,
                **{name: trained[name] for name in ("devices", "batch_norm") if name in trained},
                "training": whole_cost(trained, cell.training.key),
            },
            health=health,
            journal=_journal(self, where, progress, weights, health=health),
            progress=progress,
        )

    def failed(self, error: str) -> Record:
        """The record of this cell when it could not be run."""
        record = blank_record(self.cell, self.run.protocol, error=error)
        return dataclasses.replace(record, provenance={**provenance(self.run.device), **record.provenance})


Job = TrainJob | CellJob


def _journal(job: Job, where: Path, progress: Progress, weights: dict[str, str], **more: str) -> Journal | None:
    """Where a job keeps its state; None: it works in a folder that ends with it.

    Args:
        weights: content keys of those that it starts from, by role.
        more: what else a state depends on.
    """
    if where.resolve() != job.run.results.resolve():
        return None
    work = {"key": job.key, "device": job.run.device, "weights": weights, **more}
    return Journal(Journal.path_of(where, job.key), work, progress.message)


def _hashes(models: Mapping[str, EnsembleDefense]) -> dict[str, str]:
    return {role: weights_hash(model) for role, model in models.items()}


def forget(results: Path, key: str) -> None:
    """Drop the state of a training or a cell whose result is in the folder."""
    Journal.path_of(results, key).unlink(missing_ok=True)


@dataclass(frozen=True)
class Result:
    """What came of a job.

    Args:
        record: of a cell that was attacked.
        error: why the job failed, in one line.
        refused: what is kept on disk is not as it should be, or cannot be written; others would fail alike.
        files: written into the folder of the job, by path inside it, where that is not the results folder itself.
    """

    record: Record | None = None
    error: str | None = None
    refused: UsageError | StorageError | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def attempt(job: Job, where: Path, progress: Progress) -> Result:
    """Perform a job; whatever goes wrong is part of the result."""
    try:
        return Result(job.perform(where, progress))
    except (CheckpointError, DataError, StorageError) as error:
        return Result(refused=error)
    except Exception as error:
        advice = f"{describe(error)}; {job.smaller}" if is_out_of_memory(error) else describe(error)
        return Result(error=advice)


def check_finite(defense: EnsembleDefense, folder: Path) -> None:
    """Refuse to judge a defence whose answers would be NaN.

    Raises:
        RuntimeError: a weight is NaN or infinite.
    """
    for name, tensor in defense.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RuntimeError(
                f"weights {name!r} in {folder} are not finite; delete the folder to have it trained again"
            )


def describe(error: Exception) -> str:
    """One line for a record: the kind of error and its message."""
    told = isinstance(error, UsageError | RuntimeError)
    return str(error) if told else f"{type(error).__name__}: {error}"


def is_trained(spec: TrainSpec, results: Path) -> bool:
    """Whether a training's finished checkpoint is in the results folder."""
    return is_complete(checkpoint_folder(results, spec), spec)

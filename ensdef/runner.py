"""Trains what is missing, attacks what is missing, writes records: the flow behind ``bench`` and ``run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensdef.adversarial_sets import AdversarialSets
from ensdef.checkpoints import (
    checkpoint_folder,
    is_complete,
    load_checkpoint,
    save_checkpoint,
    save_last_good,
    training_report,
)
from ensdef.errors import CheckpointError, DataError, TrainingDiverged, UsageError
from ensdef.evaluation import blank_record, evaluate_cell
from ensdef.health.catalogue import TIERS, Tier
from ensdef.loading import attacked_subset, reload_data
from ensdef.parallel import check_training
from ensdef.progress import Progress
from ensdef.provenance import provenance
from ensdef.records import Record, Store
from ensdef.specs import Cell, TrainSpec
from ensdef.training import train


@dataclass(frozen=True)
class Run:
    """Where and how cells are run; nothing here is part of a key.

    Args:
        results: folder for records and checkpoints.
        device: ``"cpu"`` or ``"cuda"``.
        batch_size: rows an attack pass.
        protocol: id written into new records.
        health: tier of the report that new records carry, and that a record must have to count as done; None: basic for
            new records, any for those that are there.
        devices: GPUs, or processes on the CPU, that share each training. Weights then differ by rounding, and where a
            network has batch norm or a loss draws of its own by more: records tell both in ``provenance``.
    """

    results: Path
    device: str = "cpu"
    batch_size: int = 128
    protocol: str | None = None
    health: Tier | None = None
    devices: int = 1


def check_writable(results: Path) -> None:
    """Refuse a results folder that cannot be written, before any work.

    Raises:
        UsageError: it cannot be created, or files in it cannot be.
    """
    probe = results / ".write-test"
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
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
    folder = checkpoint_folder(results, spec)
    trained = is_complete(folder, spec)
    if spec.key not in seen:
        if trained:
            load_checkpoint(folder)
        else:
            check_training(spec, devices)
    seen.add(spec.key)
    for needed in spec.prerequisites.values():
        _check_checkpoint(needed, results, seen, 1 if trained else devices)


def run_cells(cells: Iterable[Cell], run: Run, progress: Progress | None = None) -> list[Record]:
    """Every cell's record, in order; a cell that fails gives a record with ``error`` and stops nobody else."""
    progress = progress or Progress()
    failures: dict[str, str] = {}
    return [find_record(cell, run.results, run.health) or run_cell(cell, run, progress, failures) for cell in cells]


def run_cell(cell: Cell, run: Run, progress: Progress, failures: dict[str, str]) -> Record:
    """Train if need be, attack, write; ``failures`` remembers trainings that failed, by key."""
    store = Store(run.results)
    try:
        for spec in (cell.training, *cell.prerequisites.values()):
            if spec.key in failures:
                raise RuntimeError(failures[spec.key])
            try:
                ensure_trained(spec, run, progress)
            except Exception as error:
                failures[spec.key] = describe(error)
                raise
        surrogates = {
            role: load_checkpoint(checkpoint_folder(run.results, needed)) for role, needed in cell.prerequisites.items()
        }
        folder = checkpoint_folder(run.results, cell.training)
        trained = training_report(folder)
        test, ids = attacked_subset(reload_data(cell.training.setting.data), cell.samples)
        record = evaluate_cell(
            load_checkpoint(folder),
            cell,
            test,
            ids,
            device=run.device,
            batch_size=run.batch_size,
            checkpoint=str(folder),
            protocol=run.protocol,
            prerequisites=surrogates,
            sets=AdversarialSets(run.results),
            trained_with=trained.get("health", ()),
            trained_on=_trained_on(trained),
            health=run.health or "basic",
            progress=progress,
        )
    except (CheckpointError, DataError):
        raise  # what the user keeps on disk is not as it should be: every cell that needs it would fail alike
    except Exception as error:
        record = blank_record(cell, run.protocol, error=describe(error))
        record = dataclasses.replace(record, provenance={**provenance(run.device), **record.provenance})
        progress.message(f"failed: {record.label} under {record.attack_label}: {record.error}")
    return store.write(record)


def _trained_on(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a record's provenance tells of the devices of the training; reports of one device may leave them out."""
    return {"devices": 1, **{name: report[name] for name in ("devices", "batch_norm") if name in report}}


def describe(error: Exception) -> str:
    """One line for a record: the kind of error and its message."""
    told = isinstance(error, UsageError | RuntimeError)
    return str(error) if told else f"{type(error).__name__}: {error}"


def ensure_trained(spec: TrainSpec, run: Run, progress: Progress) -> Path:
    """Train a specification and its prerequisites unless their checkpoints exist; returns the folder.

    Raises:
        TrainingDiverged: a loss term became NaN or infinite; the last good epoch is in the folder.
    """
    folder = checkpoint_folder(run.results, spec)
    if is_complete(folder, spec):
        return folder
    prerequisites = {
        role: load_checkpoint(ensure_trained(needed, run, progress)) for role, needed in spec.prerequisites.items()
    }
    data = reload_data(spec.setting.data)
    try:
        trained = train(spec, data, prerequisites, device=run.device, devices=run.devices, progress=progress)
    except TrainingDiverged as error:
        kept = save_last_good(folder, error.last_good, spec, str(error))
        raise TrainingDiverged(f"{error} (weights of the last good epoch: {kept})") from error
    save_checkpoint(folder, trained.defense, spec, {**trained.report, "provenance": provenance(run.device)})
    return folder

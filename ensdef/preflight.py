"""What is looked at before any work begins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ensdef.errors import UsageError
from ensdef.finished import is_whole, whole_record
from ensdef.health.catalogue import Tier
from ensdef.parallel import check_training
from ensdef.specs import Cell, TrainSpec


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


def preflight(cells: Iterable[Cell], results: Path, health: Tier | None = None, devices: int = 1) -> None:
    """Look at every record and checkpoint that a run will rely on, before anything is trained.

    Raises:
        UsageError: a training that is missing, or damaged, cannot be shared by so many devices.
    """
    seen: set[str] = set()
    for cell in cells:
        if whole_record(cell, results, health) is None:
            for spec in (cell.training, *cell.prerequisites.values()):
                _check_checkpoint(spec, results, seen, devices)


def _check_checkpoint(spec: TrainSpec, results: Path, seen: set[str], devices: int) -> None:
    trained = is_whole(spec, results)
    if spec.key not in seen and not trained:
        check_training(spec, devices)
    seen.add(spec.key)
    for needed in spec.prerequisites.values():
        _check_checkpoint(needed, results, seen, 1 if trained else devices)

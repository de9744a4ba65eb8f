"""What a results folder holds finished. What is damaged there counts as not done; who has claimed it sets it aside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ensdef.checkpoints import (
    SPEC,
    WEIGHTS,
    checkpoint_folder,
    file_version,
    has_both_files,
    is_complete,
    load_checkpoint,
)
from ensdef.errors import CheckpointError, ForeignCheckpoint, UsageError
from ensdef.health.catalogue import TIERS, Tier
from ensdef.records import Record, Store
from ensdef.set_aside import set_aside, whole
from ensdef.specs import Cell, TrainSpec

#: Checkpoints that were found to be as they were written: folder, key, and versions of their files.
_SOUND: set[tuple[Any, ...]] = set()


def record_path(cell: Cell, results: Path) -> Path:
    """Where the record of a cell lives."""
    data = cell.training.setting.data.name
    return Store(results).path(data, cell.training.method, cell.attack.name, cell.key)


def find_record(cell: Cell, results: Path, health: Tier | None = None) -> Record | None:
    """The finished record of a cell, if there is one whose health report is of this tier or a higher one.

    Raises:
        UsageError: it is damaged, or that of another cell.
    """
    path = record_path(cell, results)
    record = Store(results).read(path)
    if record is not None and record.key != cell.key:
        raise UsageError(
            f"{path}: holds the record of another cell ({record.key[:16]}); delete the file to have it computed again"
        )
    if record is not None and health is not None:
        had = record.provenance.get("health", "off")  # records older than the report have none
        if had not in TIERS or TIERS.index(had) < TIERS.index(health):
            return None
    # the same radius may have been written in another way when the record was made
    return None if record is None else dataclasses.replace(record, eps=cell.attack.written)


def whole_record(
    cell: Cell, results: Path, health: Tier | None = None, tell: Callable[[str], None] | None = None
) -> Record | None:
    """Like :func:`find_record`, but a damaged record is none; ``tell`` as in :func:`ensdef.set_aside.whole`."""
    return whole(lambda: find_record(cell, results, health), record_path(cell, results), tell)


def is_whole(spec: TrainSpec, results: Path, tell: Callable[[str], None] | None = None) -> bool:
    """Whether a training's finished checkpoint is there and as it was written; ``tell`` as above.

    It is loaded to find out, once a process for as long as its files are the same.

    Raises:
        ForeignCheckpoint: weights of another network, or a pickle; nobody but who put them there can tell why.
    """
    folder = checkpoint_folder(results, spec)
    if not has_both_files(folder):
        return False
    try:
        seen = (folder.resolve(), spec.key, file_version(folder / SPEC), file_version(folder / WEIGHTS))
        if seen not in _SOUND:
            if not is_complete(folder, spec):
                raise CheckpointError(f"{folder / SPEC} describes another training, or one that broke")
            load_checkpoint(folder)
            _SOUND.add(seen)
    except ForeignCheckpoint:
        raise
    except (CheckpointError, OSError) as error:
        if tell is not None and has_both_files(folder):
            set_aside(folder, str(error), tell)
        return False
    return True

"""A record and its cell: what it says before the cell ran; the cell it says it is of; where the two disagree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ensdef.attack_spec import AttackSpec
from ensdef.errors import UsageError
from ensdef.keys import canonical
from ensdef.notation import convert
from ensdef.records import Record
from ensdef.registry import METHODS
from ensdef.specs import Cell, TrainSpec

#: What a record repeats of its cell.
_FIELDS = (
    *("method", "hyper", "label", "dataset", "architecture", "members", "train_seed", "attack", "attack_params"),
    *("attack_label", "success", "norm", "eps", "eps_value", "combiner"),
)
#: What it repeats of it in ``provenance``.
_PROVENANCE = ("attack_seed", "train_seed", "search", "subset_checksum")


def blank_record(cell: Cell, protocol: str | None, checkpoint: str | None = None, error: str | None = None) -> Record:
    """What is known of a cell before it ran, or when it failed."""
    spec = cell.training
    return Record(
        key=cell.key,
        method=spec.method,
        hyper=dict(spec.model.hyper),
        label=spec.model.method_call,
        dataset=spec.setting.data.name,
        architecture=spec.model.architecture_call,
        members=spec.model.members,
        train_seed=spec.setting.seed,
        training=training_fields(spec),
        n=cell.samples,
        checkpoint=checkpoint,
        error=error,
        provenance={
            "protocol": protocol,
            "attack_seed": cell.attack.seed,
            "train_seed": spec.setting.seed,
            "search": cell.attack.search,
            "subset_checksum": cell.subset_checksum,
        },
        **attack_fields(cell.attack),
    )


def training_fields(spec: TrainSpec) -> dict[str, Any]:
    """What a record tells of the training."""
    return {
        "key": spec.key,
        "norm": spec.setting.norm if spec.attacked else None,
        "eps": spec.setting.train_eps if spec.attacked else None,
        "precision": spec.setting.precision,
        "recipe": dataclasses.asdict(spec.recipe),
        "deviations": list(METHODS.get(spec.method).deviations),
        "limit": spec.setting.data.limit,
    }


def attack_fields(spec: AttackSpec) -> dict[str, Any]:
    """The fields of a record that describe the attack."""
    return {
        "attack": spec.name,
        "attack_params": dict(spec.params),
        "attack_label": spec.call,
        "success": spec.success,
        "norm": spec.norm,
        "eps": spec.written if spec.eps is not None else None,
        "eps_value": spec.eps_value,
        "combiner": spec.combiner,
    }


def cell_of(record: Record, training: TrainSpec) -> Cell:
    """The attack that a record describes, on a training.

    Raises:
        UsageError: a name, parameter or radius that cannot be.
    """
    told = record.provenance
    attack = AttackSpec.create(
        record.attack,
        {**record.attack_params, "success": record.success},
        record.norm or "linf",
        record.eps or "0",
        dimensions=training.setting.data.dimensions,
        search=str(told.get("search")),
        combiner=record.combiner,
        seed=convert(told.get("attack_seed"), int, "provenance.attack_seed"),
    )
    return Cell(training, attack, record.n, str(told.get("subset_checksum")))


def disagreements(record: Record, cell: Cell) -> Iterator[str]:
    """What a record says that its cell does not, in sentences; nothing where the record's key follows from the cell."""
    expected = blank_record(cell, None)
    yield from _differences("", {name: getattr(expected, name) for name in _FIELDS}, vars(record))
    # sentences on where a method departs from its paper may be put better without changing a number
    training = {name: value for name, value in expected.training.items() if name != "deviations"}
    yield from _differences("training.", training, record.training)
    yield from _differences("provenance.", {one: expected.provenance[one] for one in _PROVENANCE}, record.provenance)
    if record.key != cell.key:
        yield (
            f"its key {record.key[:16]} does not follow from the training, the attack and the images that it names, "
            f"which have {cell.key[:16]}"
        )


def _differences(prefix: str, expected: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[str]:
    for name, value in expected.items():
        came = told.get(name)
        if not _equal(came, value):
            yield f"{prefix}{name} is {came!r}, but the checkpoint and the attack give {value!r}"


def _equal(a: Any, b: Any) -> bool:
    try:
        return canonical(a) == canonical(b)
    except ValueError as error:
        raise UsageError(f"holds a number that is none ({error})") from error

"""What a training took, as checkpoints and records tell it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ensdef.cost import count_passes, multiplications
from ensdef.specs import TrainSpec
from ensdef.training import Trained

#: Costs by the key of the training; a report has those of all trainings that its own rests on, and its own.
Costs = Mapping[str, Mapping[str, Any]]

#: What adds up over trainings; the parameters are those of the last one, the memory is that of the largest.
ADDED = ("seconds", "passes", "multiplications")


def costs_of(spec: TrainSpec, trained: Trained, before: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Costs for the report of a training.

    Args:
        before: key and report of every training that this one started from.
    """
    costs: dict[str, Any] = {spec.key: _own(spec, trained)}
    for key, report in before:
        costs |= report.get("costs", {key: {}})  # checkpoints made before costs were counted tell none
    return costs


def _own(spec: TrainSpec, trained: Trained) -> dict[str, Any]:
    """Of one training, without what it started from; None: it cannot be told.

    ``passes`` are training passes of one member over one image, ``multiplications`` what those cost: each three
    forward passes of the first member.
    """
    passes = work = None
    try:
        batch = count_passes(spec.model.method_call, spec.model.members, spec.recipe.attack.steps)
        passes = batch.total * trained.report["images_seen"]
        work = 3 * passes * multiplications(trained.defense.members[0], spec.model.image_shape)
    except Exception:  # a defence made of other parts than networks; counting must not cost the training
        passes = work = None
    return {
        "parameters": sum(parameter.numel() for parameter in trained.defense.parameters()),
        "seconds": round(trained.report["seconds"], 3),
        "passes": passes,
        "multiplications": work,
        "peak_memory_mb": trained.report["peak_memory_mb"],
    }


def whole_cost(report: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What it took to have a defence, all that its training started from included; None: one of them does not tell.

    Args:
        report: of its training.
        key: of its training.
    """
    costs: Costs = report.get("costs", {key: {}})
    whole: dict[str, Any] = {"parameters": costs[key].get("parameters")}
    for name in (*ADDED, "peak_memory_mb"):
        values = [cost.get(name) for cost in costs.values()]
        known = [value for value in values if value is not None]
        join = sum if name in ADDED else max
        whole[name] = join(known) if len(known) == len(values) else None
    return whole

"""Models side by side: means over training seeds, worst cases, costs. No torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensdef.metrics import binomial_stderr, fraction_of
from ensdef.records import Record


@dataclass(frozen=True)
class Estimate:
    """A fraction in [0, 1]: mean over training seeds, with its standard error over the n images.

    ``seed_std`` is the standard deviation over training seeds, None for one seed.
    """

    mean: float
    stderr: float
    seed_std: float | None
    n: int
    seeds: int


@dataclass(frozen=True)
class Cost:
    """What training took, means over seeds; None where records do not tell. Seconds, passes, megabytes."""

    parameters: float | None = None
    training_seconds: float | None = None
    training_passes: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Standing:
    """One model of a table.

    Args:
        robust: by column (:func:`column_of`); None where it failed or is missing.
        worst: right under every attack of the table, image by image; None where an attack is missing.
        ranks: best and worst rank that a paired test leaves open; None: not computed.
        best: not told apart from the best by that test.
        cells: the records behind each column.
    """

    label: str
    method: str
    architecture: str
    members: int
    combiner: str
    seeds: tuple[int | None, ...]
    clean: Estimate | None
    robust: Mapping[str, Estimate | None]
    worst: Estimate | None
    ranks: tuple[int, int] | None
    best: bool
    costs: Cost
    records: tuple[Record, ...]
    cells: Mapping[str, tuple[Record, ...]]


def column_of(record: Record) -> str:
    """The attack as a column's heading: call, norm and radius."""
    parts = [record.attack_label, record.norm or "", f"eps {record.eps}" if record.eps is not None else ""]
    return " ".join(part for part in parts if part)


def details_of(ranked: Sequence[Standing]) -> list[str]:
    """What stands below each model's label: its members, and what else tells it from models of the same label."""
    datasets = {row.records[0].dataset for row in ranked}
    told = []
    for row in ranked:
        detail = f"{row.members} × {row.architecture}"
        detail += "" if row.combiner == "native" else f", combined by {row.combiner}"
        detail += f", {row.records[0].dataset}" if len(datasets) > 1 else ""
        told.append(detail)
    names = [(row.label, detail) for row, detail in zip(ranked, told, strict=True)]
    return [
        detail if names.count(name) == 1 else f"{detail}, {_trained(row.records[0])}"
        for row, detail, name in zip(ranked, told, names, strict=True)
    ]


def _trained(record: Record) -> str:
    eps, epochs = record.training.get("eps"), record.training.get("recipe", {}).get("epochs")
    return f"{epochs} epochs" + ("" if eps is None else f" at eps {eps}")


def model_names(ranked: Sequence[Standing]) -> list[str]:
    """A name for every model that no other has: its label, with what tells it from namesakes."""
    labels = [row.label for row in ranked]
    return [
        label if labels.count(label) == 1 else f"{label} ({detail})"
        for label, detail in zip(labels, details_of(ranked), strict=True)
    ]


def standings(records: Sequence[Record]) -> list[Standing]:
    """Every model of one table, best worst case first; models without one last."""
    columns = list(dict.fromkeys(column_of(record) for record in records))
    models: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        models.setdefault(_model(record), []).append(record)
    rows = [_standing(tuple(met), columns) for met in models.values()]
    return sorted(rows, key=lambda row: -row.worst.mean if row.worst else math.inf)


def _model(record: Record) -> tuple[Any, ...]:
    """What the training seeds of one model have in common."""
    training = {name: value for name, value in record.training.items() if name != "key"}
    told = json.dumps(training, sort_keys=True)
    return (record.label, record.architecture, record.members, record.combiner, record.dataset, told)


def _standing(records: tuple[Record, ...], columns: Sequence[str]) -> Standing:
    by_seed: dict[int | None, dict[str, Record]] = {}
    for record in records:
        by_seed.setdefault(record.train_seed, {})[column_of(record)] = record
    finished = [record for record in records if record.error is None]
    clean = {record.train_seed: record for record in finished}
    cells = {column: tuple(seed[column] for seed in by_seed.values() if column in seed) for column in columns}
    robust = {
        column: estimate([record.outcomes["robust"] for record in met])
        if met and all(record.error is None for record in met)
        else None
        for column, met in cells.items()
    }
    first = records[0]
    return Standing(
        first.label,
        first.method,
        first.architecture,
        first.members,
        first.combiner,
        tuple(by_seed),
        estimate([record.outcomes["clean"] for record in clean.values()]) if clean else None,
        robust,
        _worst(list(by_seed.values()), columns),
        None,
        False,
        _cost(finished),
        records,
        cells,
    )


def _worst(seeds: Sequence[dict[str, Record]], columns: Sequence[str]) -> Estimate | None:
    outcomes = []
    for met in seeds:
        if set(met) != set(columns) or any(record.error is not None for record in met.values()):
            return None
        if len({tuple(record.outcomes["ids"]) for record in met.values()}) > 1:
            return None
        rows = [record.outcomes["robust"] for record in met.values()]
        outcomes.append([min(images) for images in zip(*rows, strict=True)])
    return estimate(outcomes) if outcomes else None


def estimate(seeds: Sequence[Sequence[int]]) -> Estimate:
    """From 0/1 outcomes by image, one list a training seed.

    Outcomes of one image under several seeds are not independent, so that the image is the unit: the standard error
    is that of the mean of the images' means over seeds.
    """
    means = [fraction_of(outcomes) for outcomes in seeds]
    mean, n = sum(means) / len(means), min(len(outcomes) for outcomes in seeds)
    if len(seeds) == 1:
        return Estimate(mean, binomial_stderr(mean, n), None, n, 1)
    if len({len(outcomes) for outcomes in seeds}) == 1:
        images = [sum(outcomes) / len(seeds) for outcomes in zip(*seeds, strict=True)]
        stderr = statistics.pstdev(images) / math.sqrt(n)
    else:
        errors = [binomial_stderr(fraction_of(outcomes), len(outcomes)) for outcomes in seeds]
        stderr = math.hypot(*errors) / len(seeds)
    return Estimate(mean, stderr, statistics.stdev(means), n, len(seeds))


def _cost(records: Sequence[Record]) -> Cost:
    trainings = {record.train_seed: record.provenance.get("training") or {} for record in records}

    def mean(name: str) -> float | None:
        values = [told[name] for told in trainings.values() if isinstance(told.get(name), int | float)]
        return sum(values) / len(values) if values else None

    return Cost(mean("parameters"), mean("seconds"), mean("passes"), mean("peak_memory_mb"))

"""Models of a grid side by side: means over training seeds, worst cases, costs. No torch.

Unlike a leaderboard, a grid may mix data sets, trainings and images, so nothing here is ranked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ensdef.leaderboard import Standing, training_costs
from ensdef.records import Record
from ensdef.statistics import Estimate, estimate


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
        label=first.label,
        method=first.method,
        architecture=first.architecture,
        members=first.members,
        combiner=first.combiner,
        seeds=tuple(by_seed),
        clean=estimate([record.outcomes["clean"] for record in clean.values()]) if clean else None,
        robust=robust,
        worst=_worst(list(by_seed.values()), columns),
        ranks=None,
        best=False,
        best_under=frozenset(),
        costs=training_costs(finished),
        flags=tuple(dict.fromkeys(flag["flag"] for record in records for flag in record.flags)),
        errors=tuple(dict.fromkeys(str(record.error) for record in records if record.error)),
        records=records,
        cells=cells,
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

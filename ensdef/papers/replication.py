"""From a paper's table to what has to be trained, attacked and measured, and to the file of what answers which cell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensdef.cells import expand, rehearse_all
from ensdef.data import Data
from ensdef.errors import UsageError
from ensdef.measure_spec import MeasureSpec
from ensdef.measurement import Measurement
from ensdef.notation import parse_call
from ensdef.papers.paper_table import Asked, PaperTable, Question
from ensdef.protocol import AttackColumn, Protocol, layered
from ensdef.records import Record, write_text
from ensdef.specs import Cell

#: What one question needs, one a training seed.
Work = Cell | MeasureSpec


@dataclass(frozen=True)
class Replication:
    """Everything that a table asks for.

    Args:
        work: for every question what answers it, one a seed; and the same for what gains are counted from.
    """

    table: PaperTable
    work: Mapping[Asked, tuple[Work, ...]]
    questions: tuple[Question, ...]

    @property
    def cells(self) -> list[Cell]:
        """Without repetitions, in the order of the questions."""
        found = [item for items in self.work.values() for item in items if isinstance(item, Cell)]
        return list({cell.key: cell for cell in found}.values())

    @property
    def measurements(self) -> list[MeasureSpec]:
        """Without repetitions, in the order of the questions."""
        found = [item for items in self.work.values() for item in items if isinstance(item, MeasureSpec)]
        return list({spec.key: spec for spec in found}.values())


def plan_table(table: PaperTable) -> Replication:
    """Check all names, parameters, radii and data of a table, and that each defence can be built.

    Raises:
        UsageError: before anything is trained.
    """
    questions = table.questions()
    asked = [item for question in questions for item in (question.asked, question.against) if item is not None]
    work: dict[Asked, tuple[Work, ...]] = {}
    by_data: dict[str, tuple[Data, dict[str, Cell]]] = {}
    for item in dict.fromkeys(asked):
        cells, data = expand(_protocol(table.base, item, table.name))
        by_data.setdefault(item.dataset, (data, {}))[1].update({cell.key: cell for cell in cells})
        work[item] = tuple(cells if item.measure is None else [_measure(item, cell) for cell in cells])
    for data, found in by_data.values():
        rehearse_all(list(found.values()), data)
    return Replication(table, work, tuple(questions))


def _protocol(base: Protocol, asked: Asked, name: str) -> Protocol:
    """The grid of one defence and one attack."""
    eps = None if asked.eps is None else (asked.eps,)
    return dataclasses.replace(
        base,
        name=name,
        methods=(asked.method,),
        attacks=(AttackColumn(asked.attack, eps, asked.norm),),
        dataset=asked.dataset,
        arch=asked.arch,
        members=asked.members or base.members,
        combiner=asked.combiner,
        norm=asked.train_norm,
        train_eps=asked.train_eps,
        recipe=layered(base.recipe, json.loads(asked.recipe)),
    )


def _measure(asked: Asked, cell: Cell) -> MeasureSpec:
    """The measurement of the defence that a cell would attack."""
    name, params = parse_call(str(asked.measure))
    return MeasureSpec.create(
        name,
        params,
        training=cell.training,
        norm=asked.norm,
        eps=asked.eps,
        samples=cell.samples,
        subset_checksum=cell.subset_checksum,
        combiner=asked.combiner,
    )


def write_manifest(
    replication: Replication, results: Path, records: Iterable[Record], measurements: Sequence[Measurement]
) -> Path:
    """Say which files answer which published cell: ``manifests/<table>.json``."""
    paths: dict[str, str] = {}
    for record in records:
        paths[record.key] = _inside(str(record.path), results)
    for measurement in measurements:
        paths[measurement.key] = _inside(str(measurement.path), results) if measurement.path else ""
    failed = {one.key: str(one.error) for one in measurements if one.error}
    table = replication.table
    answers = [_answer(question, replication.work, paths, failed) for question in replication.questions]
    content: dict[str, Any] = {
        "kind": "paper",
        "title": table.title,
        "protocol": table.name,
        "version": table.version,
        "scale": table.scale.name,
        "scale_title": table.scale.title,
        "published": table.published,
        "changes": list(table.changes),
        "deviations": [*table.changes, *table.scale.deviations, *substitutions(replication), *table.deviations],
        "notes": list(table.notes),
        "answers": answers,
        "records": sorted({paths[cell.key] for cell in replication.cells}),
    }
    path = results / "manifests" / f"{table.table}.json"
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def _answer(
    question: Question, work: Mapping[Asked, tuple[Work, ...]], paths: Mapping[str, str], failed: Mapping[str, str]
) -> dict[str, Any]:
    items = work[question.asked]
    answer: dict[str, Any] = {"cell": question.index, "value": question.value}
    bases = work[question.against] if question.against is not None else ()
    if told := next((failed[item.key] for item in (*items, *bases) if item.key in failed), None):
        return {**answer, "missing": told}
    answer["files"] = [paths[item.key] for item in items]
    if question.against is not None:
        answer |= {"derive": question.derive, "against": [paths[item.key] for item in bases]}
    return answer


def _inside(path: str, results: Path) -> str:
    inside = Path(path)
    if not inside.is_relative_to(results):
        raise UsageError(f"{path} is outside the results folder {results}")
    return inside.relative_to(results).as_posix()


def substitutions(replication: Replication) -> list[str]:
    """What stands for the paper's data, radii, networks and members, in sentences."""
    table, told = replication.table, []
    cells = [question.cell for question in replication.questions]
    for printed in dict.fromkeys(cell.dataset for cell in cells):
        stand_in = table.scale.dataset(printed)
        if stand_in.name != printed:
            factors = [
                f"{norm} radii times {factor}"
                for norm, factor in (("linf", stand_in.linf), ("l2", stand_in.l2))
                if factor != 1 and any(cell.eps and cell.norm == norm and cell.dataset == printed for cell in cells)
            ]
            told.append(f"{stand_in.name} stands for {printed}{', ' if factors else ''}{', '.join(factors)}.")
    for printed in dict.fromkeys(cell.architecture for cell in cells):
        architecture = table.scale.architecture(printed)
        if architecture != (printed or None):
            told.append(f"Networks are {architecture}, for {printed or 'what the paper does not tell'}.")
    return [*told, *_members(replication)]


def _members(replication: Replication) -> list[str]:
    """Where ensembles have another number of members than the paper's, or the paper does not tell."""
    counts: dict[str, dict[int, dict[str, None]]] = {}
    for question in replication.questions:
        for item in replication.work[question.asked]:
            if item.training is not None:
                found = counts.setdefault(question.cell.members, {}).setdefault(item.training.model.members, {})
                found[item.training.model.method_call] = None
    told = []
    for printed, by_count in counts.items():
        for count, calls in by_count.items():
            if str(count) != printed:
                where = f" ({', '.join(calls)})" if len(by_count) > 1 else ""
                told.append(
                    f"Models have {count} members{where}, for {printed or 'a number that the paper does not tell'}."
                )
    return told

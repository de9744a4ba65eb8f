"""Records of one protocol to standings: a row a defence, averaged over training seeds, ranked as far as tests allow.

A pure function of records; no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensdef.errors import UsageError
from ensdef.records import Record
from ensdef.statistics import Estimate, Outcomes, PairedTests, estimate


@dataclass(frozen=True)
class Cost:
    """What a defence took, mean over training seeds; None: the records do not tell.

    Args:
        parameters: of the defence.
        training_seconds: wall time, prerequisites included.
        training_passes: passes of one member over one image, counted in training passes (``ensdef.cost``).
        peak_memory_mb: of the training process (CPU) or on the device (CUDA), the largest of all its trainings.
        training_multiplications: of the passes, so that networks of different sizes can be compared.
    """

    parameters: float | None = None
    training_seconds: float | None = None
    training_passes: float | None = None
    peak_memory_mb: float | None = None
    training_multiplications: float | None = None


@dataclass(frozen=True)
class Standing:
    """One row: a defence with its architecture, number of members and inference rule.

    Args:
        label: method with its hyper-parameters, as a user writes it.
        seeds: training seeds, those that failed included.
        clean: accuracy on unchanged images; None: no seed was evaluated.
        robust: by column of the leaderboard; None where nothing was measured.
        worst: right under every attack, image by image, over the seeds that met all of them.
        ranks: best and worst rank by ``worst``; None: not ranked, for want of ``worst``.
        best: not told apart from the best by ``worst``.
        best_under: columns under which it is not told apart from the best.
        costs: of training it.
        flags: names of the health findings of its records.
        errors: why numbers are missing, or rest on fewer seeds.
        records: of this row, in the order of the protocol.
        cells: those of them behind each column.
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
    best_under: frozenset[str]
    costs: Cost
    flags: tuple[str, ...]
    errors: tuple[str, ...]
    records: tuple[Record, ...]
    cells: Mapping[str, tuple[Record, ...]]


def standings(records: Sequence[Record]) -> list[Standing]:
    """The rows, best worst case first, those without one last.

    Raises:
        UsageError: records of several protocols or versions, of several data sets, on different images, or two of the
            same cell.
    """
    _check_together(records)
    names = columns(records)
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record.label, record.architecture, record.members, record.combiner), []).append(record)
    rows = [_Row(group, names) for group in groups.values()]
    rows.sort(key=lambda row: -_mean(row.outcomes()))
    ranked = [row for row in rows if row.outcomes()]
    comparison = PairedTests([row.outcomes() for row in ranked])
    ranks, best = comparison.rank_ranges(), comparison.best()
    for row, its_ranks, is_best in zip(ranked, ranks, best, strict=True):
        row.ranks, row.best = its_ranks, is_best
    for column in dict.fromkeys(names.values()):
        measured = [row for row in rows if row.outcomes(column)]
        for row, is_best in zip(measured, PairedTests([row.outcomes(column) for row in measured]).best(), strict=True):
            row.best_under |= {column} if is_best else set()
    return [row.standing() for row in rows]


def columns(records: Iterable[Record]) -> dict[str, str]:
    """The leaderboard's column by record key: the attack, with norm and radius where it comes in several."""
    records = list(records)
    threats: dict[str, set[tuple[str | None, float | None]]] = {}
    for record in records:
        threats.setdefault(record.attack_label, set()).add((record.norm, record.eps_value))

    def name(record: Record) -> str:
        if len(threats[record.attack_label]) == 1 or record.eps_value is None:
            return record.attack_label
        # the value: one radius may be written in several ways
        return f"{record.attack_label} {record.norm} {record.eps_value:g}"

    return {record.key: name(record) for record in records}


def protocols(record: Record) -> frozenset[str]:
    """Ids of the protocols that this record is a cell of."""
    ids = [record.provenance.get("protocol"), *record.provenance.get("also_in", ())]
    return frozenset(str(one) for one in ids if one)


def _check_together(records: Sequence[Record]) -> None:
    if not records:
        raise UsageError("a leaderboard of no records; `ensdef run` of a protocol makes them")
    shared = frozenset.intersection(*map(protocols, records))
    if not shared and any(map(protocols, records)):
        counts = Counter(" and ".join(sorted(protocols(record))) or "no protocol" for record in records)
        told = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise UsageError(
            f"these records belong to different protocols: {told}; a leaderboard takes those of one version of one "
            "protocol: run it again into this results folder"
        )
    finished = [record for record in records if record.error is None]
    for other in finished[1:]:
        first = finished[0]
        if other.dataset != first.dataset:
            what = "of several data sets"
        elif _images(other) != _images(first):
            what = "on different test images"
        else:
            continue
        raise UsageError(f"records {what} cannot be compared image by image: {_where(first)} and {_where(other)}")


def _images(record: Record) -> tuple[Any, ...]:
    """Which images a finished record is about, and what they look like."""
    return record.provenance.get("subset_checksum"), record.outcomes["ids"]


def _where(record: Record) -> str:
    return f"{record.path or record.label} ({record.dataset}, {record.n} images)"


def _mean(outcomes: Outcomes) -> float:
    """For sorting; rows without outcomes come last."""
    return sum(map(sum, outcomes)) / (len(outcomes) * len(outcomes[0])) if outcomes else -1.0


class _Row:
    """The records of one row, on their way to a standing."""

    def __init__(self, records: Sequence[Record], names: Mapping[str, str]) -> None:
        self.records = tuple(records)
        self.columns = tuple(dict.fromkeys(names.values()))
        self.names = {record.key: names[record.key] for record in records}
        self.seeds = tuple(dict.fromkeys(record.train_seed for record in records))
        self.cells: dict[tuple[int | None, str], Record] = {}
        self.ranks: tuple[int, int] | None = None
        self.best = False
        self.best_under: set[str] = set()
        for record in records:
            place = (record.train_seed, self.names[record.key])
            if place in self.cells:
                told = " and ".join(_where(one) for one in (self.cells[place], record))
                raise UsageError(f"{record.label} seed {place[0]} under {place[1]} is there twice: {told}")
            self.cells[place] = record

    def outcomes(self, column: str | None = None) -> Outcomes:
        """Robust outcomes by seed under one attack, or under all (None); seeds that did not meet them are left out."""
        found = []
        for seed in self.seeds:
            met = [self.finished(seed, name) for name in ([column] if column else self.columns)]
            if all(met):
                outcomes = [record.outcomes["robust"] for record in met if record is not None]
                found.append([min(images) for images in zip(*outcomes, strict=True)])
        return found

    def finished(self, seed: int | None, column: str) -> Record | None:
        record = self.cells.get((seed, column))
        return record if record is not None and record.error is None else None

    def standing(self) -> Standing:
        first = self.records[0]
        clean = [
            next(record.outcomes["clean"] for record in self.records if record.train_seed == seed and not record.error)
            for seed in self.seeds
            if any(self.finished(seed, column) for column in self.columns)
        ]
        return Standing(
            label=first.label,
            method=first.method,
            architecture=first.architecture,
            members=first.members,
            combiner=first.combiner,
            seeds=self.seeds,
            clean=_estimate(clean),
            robust={column: _estimate(self.outcomes(column)) for column in self.columns},
            worst=_estimate(self.outcomes()),
            ranks=self.ranks,
            best=self.best,
            best_under=frozenset(self.best_under),
            costs=training_costs(self.records),
            flags=tuple(dict.fromkeys(flag["flag"] for record in self.records for flag in record.flags)),
            errors=tuple(dict.fromkeys(self.errors())),
            records=self.records,
            cells={
                column: tuple(record for record in self.records if self.names[record.key] == column)
                for column in self.columns
            },
        )

    def errors(self) -> Iterable[str]:
        for seed in self.seeds:
            for column in self.columns:
                record = self.cells.get((seed, column))
                if record is None:
                    yield f"seed {seed} under {column}: no record; run the protocol again"
                elif record.error:
                    yield f"seed {seed} under {column}: {record.error}"


def _estimate(outcomes: Outcomes) -> Estimate | None:
    return estimate(outcomes) if outcomes else None


def training_costs(records: Iterable[Record]) -> Cost:
    """Means over trainings; a cost that one training does not tell is not told."""
    trainings = {record.train_seed: record.provenance.get("training") or {} for record in records if not record.error}

    def mean(name: str) -> float | None:
        values = [training.get(name) for training in trainings.values()]
        known = [float(value) for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    return Cost(*(mean(name) for name in ("parameters", "seconds", "passes", "peak_memory_mb", "multiplications")))

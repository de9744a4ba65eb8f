"""A leaderboard as the page shows it: rows and cells with their texts, the values they sort by, and their records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensdef.leaderboard import Cost, Standing
from ensdef.records import Record
from ensdef.report.drawers import percent
from ensdef.report.standings import details_of
from ensdef.statistics import Estimate


@dataclass(frozen=True)
class Heading:
    """A column: ``kind`` is ``"text"``, ``"accuracy"`` or ``"number"``; ``note`` says how to read it."""

    text: str
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """What stands in a row below a heading.

    Args:
        value: what the column sorts by; None comes last.
        detail: printed smaller, behind the text.
        records: positions of the records behind it; with any, the cell opens the drawer.
        mark: said beside the number: ``"failed"``, or ``"best"`` where no test tells it apart from the best.
        below: a second line.
    """

    text: str
    value: float | str | None
    detail: str = ""
    records: tuple[int, ...] = ()
    mark: str = ""
    below: str = ""


@dataclass(frozen=True)
class Badge:
    """A flag of a row: in how many of its cells."""

    name: str
    severity: str
    cells: int


@dataclass(frozen=True)
class Row:
    """One model; ``name`` is the first cell, a row's heading."""

    name: Cell
    model: str
    method: str
    adversarial: bool
    cells: tuple[Cell, ...]
    badges: tuple[Badge, ...]

    @property
    def severity(self) -> str:
        """The gravest of the flags: ``"masking"``, ``"info"`` or ``"none"``."""
        found = {badge.severity for badge in self.badges}
        return "masking" if "masking" in found else "info" if found else "none"


@dataclass(frozen=True)
class Board:
    """A leaderboard: ``headings`` has one entry for each cell of a row, without its name."""

    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    methods: tuple[str, ...]
    sorted_by: int | None


def build_board(ranked: Sequence[Standing], positions: Mapping[str, int]) -> Board:
    """The leaderboard of a table.

    Args:
        ranked: its models, in the order in which they are shown.
        positions: where each record stands among the page's, by its key.
    """
    columns = list(ranked[0].cells) if ranked else []
    headings = []
    if any(row.ranks for row in ranked):
        headings.append(Heading("rank", "number", "ranks that a paired test between rows leaves open"))
    if len(columns) > 1 and any(row.worst for row in ranked):
        headings.append(Heading("worst case", "accuracy", "right under every attack of this table, image by image, %"))
    headings.append(Heading("clean", "accuracy", "right on unchanged images, %"))
    headings += [Heading(column, "accuracy", "right on every point that the attack tried, %") for column in columns]
    costs = [name for name in _COSTS if any(_cost(row.costs, name) is not None for row in ranked)]
    headings += [Heading(_COSTS[name][0], "number", _COSTS[name][1]) for name in costs]
    rows = tuple(
        _row(standing, detail, headings, costs, positions)
        for standing, detail in zip(ranked, details_of(ranked), strict=True)
    )
    main = "worst case" if len(columns) > 1 else columns[0] if columns else ""
    sorted_by = next((place for place, heading in enumerate(headings) if heading.text == main), None)
    return Board(tuple(headings), rows, tuple(sorted({row.method for row in rows})), sorted_by)


_COSTS = {
    "parameters": ("parameters", "weights of the whole defence"),
    "training_seconds": ("training s", "seconds of training, mean over seeds"),
    "training_passes": ("training passes", "member passes of training, mean over seeds"),
    "peak_memory_mb": ("memory MB", "peak memory of training"),
}


def _cost(costs: Cost, name: str) -> float | None:
    value = getattr(costs, name)
    return None if value is None else float(value)


def _row(
    standing: Standing,
    detail: str,
    headings: Sequence[Heading],
    costs: Sequence[str],
    positions: Mapping[str, int],
) -> Row:
    behind = tuple(positions[record.key] for record in standing.records)
    shown = [heading.text for heading in headings[:2]]
    cells = [_rank(standing.ranks)] if "rank" in shown else []
    if "worst case" in shown:
        worst = _accuracy(standing.worst, behind)
        cells.append(dataclasses.replace(worst, mark="best" if standing.best else ""))
    cells.append(_accuracy(standing.clean, ()))
    cells += [_attacked(standing.robust[column], met, positions) for column, met in standing.cells.items()]
    for name in costs:
        value = _cost(standing.costs, name)
        cells.append(Cell("–", None) if value is None else Cell(_amount(value), value))
    detail += f", {len(standing.seeds)} seeds" if len(standing.seeds) > 1 else ""
    return Row(
        Cell(standing.label, standing.label, detail, behind),
        f"{standing.label} {detail}",
        standing.method,
        any(record.training.get("eps") is not None for record in standing.records),
        tuple(cells),
        _badges(standing.records),
    )


def _accuracy(estimate: Estimate | None, records: tuple[int, ...]) -> Cell:
    if estimate is None:
        return Cell("–", None)
    below = "" if estimate.seed_std is None else f"seeds ± {percent(estimate.seed_std)}"
    return Cell(percent(estimate.mean), estimate.mean, f"± {percent(estimate.stderr)}", records, below=below)


def _attacked(estimate: Estimate | None, met: Sequence[Record], positions: Mapping[str, int]) -> Cell:
    behind = tuple(positions[record.key] for record in met)
    if estimate is not None:
        return _accuracy(estimate, behind)
    failed = any(record.error is not None for record in met)
    return Cell("–", None, "", behind, "failed" if failed else "")


def _rank(ranks: tuple[int, int] | None) -> Cell:
    if ranks is None:
        return Cell("–", None)
    first, last = ranks
    return Cell(f"{first}" if first == last else f"{first}–{last}", first)


def _badges(records: Sequence[Record]) -> tuple[Badge, ...]:
    cells: dict[tuple[str, str], set[str]] = {}
    for record in records:
        for flag in record.flags:
            cells.setdefault((str(flag.get("flag")), str(flag.get("severity"))), set()).add(record.key)
    badges = [Badge(name, severity, len(keys)) for (name, severity), keys in cells.items()]
    return tuple(sorted(badges, key=lambda badge: (badge.severity != "masking", badge.name)))


def _amount(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

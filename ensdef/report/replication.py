"""A paper's printed numbers beside ours: tables, and a scatter for each paper. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensdef.papers.orderings import orderings
from ensdef.papers.published import paper_titles
from ensdef.report.board import Cell
from ensdef.report.figure import Figure, chart, quantity, tooltip

if TYPE_CHECKING:
    from ensdef.papers.comparison import Comparison, Entry
    from ensdef.papers.published import PublishedCell

#: Fields of a published cell that tell rows apart, and their headings; one that is the same in all rows is told once.
_FIELDS = {
    "dataset": "data",
    "architecture": "architecture",
    "members": "members",
    "combiner": "combined by",
    "attack": "attack",
    "attack_params": "settings",
    "norm": "norm",
    "eps": "eps",
    "metric": "measured",
}
_UNITS = {"percent": " %", "seconds": " s", "megabytes": " MB", "fraction": "", "count": ""}


@dataclass(frozen=True)
class ReplicatedTable:
    """One table of a paper; the first cell of a row names the defence."""

    title: str
    told: str
    deviations: tuple[str, ...]
    notes: tuple[str, ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Paper:
    """All replicated tables of one paper."""

    name: str
    figures: tuple[Figure, ...]
    tables: tuple[ReplicatedTable, ...]


def papers(comparisons: Sequence[Comparison], positions: Mapping[str, int]) -> list[Paper]:
    """The comparisons by paper.

    Args:
        positions: where each record or measurement stands among the page's, by its key.
    """
    by_paper: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.entries:
            by_paper.setdefault(comparison.entries[0].cell.paper, []).append(comparison)
    told = []
    for number, (name, found) in enumerate(by_paper.items(), start=1):
        tables = tuple(_table(item, positions) for item in found)
        told.append(Paper(paper_titles().get(name, name), _scatter(f"paper-{number}", name, found), tables))
    return told


def rank_correlation(entries: Sequence[Entry]) -> float | None:
    """Spearman's, of our numbers with the paper's; None for fewer than three, or where one side is constant."""
    pairs = [(entry.cell.number, entry.ours) for entry in entries if entry.difference is not None]
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _shares(comparison: Comparison) -> list[Entry]:
    """Numbers in percent that both sides have: those that one scatter can show."""
    return [entry for entry in comparison.entries if entry.cell.unit == "percent" and entry.difference is not None]


def _table(comparison: Comparison, positions: Mapping[str, int]) -> ReplicatedTable:
    entries = comparison.entries
    values = {field: {str(getattr(entry.cell, field) or "") for entry in entries} for field in _FIELDS}
    varying = [field for field in _FIELDS if len(values[field]) > 1]
    constant = [
        f"{_FIELDS[field]} {value}" for field, found in values.items() if len(found) == 1 for value in found if value
    ]
    done = sum(entry.ours is not None for entry in entries)
    told = [f"{done} of {len(entries)} numbers replicated"]
    told += [f"scale {comparison.scale}: {comparison.scale_title}"]
    found = orderings(entries)
    if found.pairs:
        told.append(
            f"{found.pairs} pairs of rows are ordered by the paper: ours the same way {found.same}, the other way "
            f"{found.opposite}, not told apart {found.undecided}"
        )
    return ReplicatedTable(
        comparison.title,
        "; ".join([*told, *constant]),
        comparison.deviations,
        comparison.notes,
        ("defence", *(_FIELDS[field] for field in varying), "published", "ours", "difference", "note"),
        tuple(_row(entry, varying, positions) for entry in entries),
    )


def _row(entry: Entry, varying: Sequence[str], positions: Mapping[str, int]) -> tuple[Cell, ...]:
    cell = entry.cell
    unit = _UNITS.get(cell.unit, f" {cell.unit}" if cell.unit else "")
    behind = tuple(
        positions[key] for key in (*(one.key for one in entry.records), *(one.key for one in entry.measurements))
    )
    if entry.ours is None:
        ours = Cell("–", None, "", behind)
    else:
        error = "" if entry.stderr is None else f"± {_amount(entry.stderr, cell)}"
        ours = Cell(_amount(entry.ours, cell) + unit, entry.ours, error, behind)
    return (
        Cell(_defence(cell), cell.method),
        *(Cell(str(getattr(cell, field) or "–"), None) for field in varying),
        Cell(f"{cell.value}{unit}" if cell.value else "–", cell.number, f"± {cell.std}" if cell.std else ""),
        ours,
        Cell("–" if entry.difference is None else _amount(entry.difference, cell, "+"), entry.difference),
        Cell(entry.note, None),
    )


def _defence(cell: PublishedCell) -> str:
    return " ".join(part for part in (cell.method, cell.variant) if part)


def _amount(value: float, cell: PublishedCell, sign: str = "") -> str:
    """With as many decimals as the unit deserves."""
    decimals = 1 if cell.unit in ("percent", "seconds", "megabytes") else 3
    return f"{value:{sign},.{decimals}f}".replace("-", "−")


def _scatter(identifier: str, name: str, comparisons: Sequence[Comparison]) -> tuple[Figure, ...]:
    pairs = [(comparison, entry) for comparison in comparisons for entry in _shares(comparison)]
    points = [
        {
            "method": _defence(entry.cell),
            "published": entry.cell.number,
            "ours": round(entry.ours or 0.0, 2),
            "table": comparison.title,
            "what": " ".join(part for part in (entry.cell.attack, entry.cell.eps, entry.cell.metric) if part),
            "told_published": f"{entry.cell.value} %",
            "told_ours": f"{entry.ours:.1f} %",
        }
        for comparison, entry in pairs
    ]
    if len(points) < 2:
        return ()
    correlation = rank_correlation([entry for _, entry in pairs])
    note = "On the line, ours equals the published number."
    if correlation is not None:
        note = f"Spearman's rank correlation is {correlation:.2f} over {len(points)} numbers. {note}"
    summary = f"{len(points)} numbers of {name}: published along, ours up."
    spec = chart(
        summary,
        points,
        height=360,
        layer=[
            {
                "data": {"values": [{"from": 0, "to": 100}]},
                "mark": {"type": "rule", "stroke": "var(--muted)", "strokeDash": [4, 4], "aria": False},
                "encoding": {
                    "x": {"field": "from", "type": "quantitative"},
                    "y": {"field": "from", "type": "quantitative"},
                    "x2": {"field": "to"},
                    "y2": {"field": "to"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.75, "color": "var(--series-1)"},
                "encoding": {
                    "x": quantity("published", "published, %", scale={"domain": [0, 100]}),
                    "y": quantity("ours", "ours, %", scale={"domain": [0, 100]}),
                    "tooltip": tooltip(
                        method="defence", what="measured", table="table", told_published="published", told_ours="ours"
                    ),
                },
            },
        ],
    )
    shown = ("method", "what", "told_published", "told_ours")
    rows = tuple(tuple(str(point[name]) for name in shown) for point in points)
    headings = ("defence", "measured", "published", "ours")
    return (Figure(f"{identifier}-scatter", "Ours against published", note, summary, spec, headings, rows),)

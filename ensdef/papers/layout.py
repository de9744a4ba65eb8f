"""How a paper's cells make a table: what tells its rows apart, and its columns. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from ensdef.papers.published import PublishedCell

#: Fields that may tell rows apart, and columns. Of the rows' those are shown that are needed.
ROW_FIELDS = ("method", "variant", "members", "combiner", "dataset")
#: Conditions of single cells, not of columns.
MARKS = ("whitebox=1",)
_CONDITIONS = ("attack", "attack_params", "norm", "eps", "metric")


def column_fields(cells: Sequence[PublishedCell]) -> tuple[str, ...]:
    """What tells columns apart: the architecture only where one row has several."""
    rows = telling(cells, ROW_FIELDS)
    several = len({key(cell, [*rows, "architecture"]) for cell in cells}) > len({key(cell, rows) for cell in cells})
    return (*(("architecture",) if several else ()), *_CONDITIONS)


def column_of(cell: PublishedCell, cells: Sequence[PublishedCell]) -> tuple[str, ...]:
    """The column of a cell among all cells of its table: what its numbers may be compared within.

    Data sets are never compared, nor combiners where one model is under several.
    """
    apart = [name for name in ("dataset", "combiner") if name in telling(cells, ROW_FIELDS)]
    return key(cell, [*apart, *column_fields(cells)])


def telling(cells: Sequence[PublishedCell], names: Sequence[str]) -> list[str]:
    """The first of the names, and those that tell apart what the ones before them do not."""
    found = [names[0]]
    for name in names[1:]:
        if len({key(cell, [*found, name]) for cell in cells}) > len({key(cell, found) for cell in cells}):
            found.append(name)
    return found


def varying(cells: Sequence[PublishedCell], names: Sequence[str]) -> list[str]:
    """The names by which cells differ; the last where they do not."""
    return [name for name in names if len({key(cell, [name]) for cell in cells}) > 1] or [names[-1]]


def key(cell: PublishedCell, names: Sequence[str]) -> tuple[str, ...]:
    """A cell's values of some fields."""
    return tuple(
        _without_marks(getattr(cell, name)) if name == "attack_params" else getattr(cell, name) for name in names
    )


def _without_marks(conditions: str) -> str:
    """Conditions but those that mark a cell of a column: the attacked model's own examples on a table's diagonal."""
    return ";".join(part for part in conditions.split(";") if part not in MARKS)


def column_title(column: tuple[str, ...], names: Sequence[str], cells: Sequence[PublishedCell]) -> str:
    """What tells a column from the others: conditions that all cells share are left out."""
    shown = []
    for name, value in zip(names, column, strict=True):
        if name == "attack_params":
            value = " ".join(part for part in value.split(";") if part and _tells(part, column, names, cells))
        if name == "metric" and value in ("accuracy", "robust_accuracy") and "attack" in names:
            continue
        if value:
            shown.append("clean" if (name, value) == ("attack", "none") else value)
    return " ".join(shown) or "clean"


def _tells(part: str, column: tuple[str, ...], names: Sequence[str], cells: Sequence[PublishedCell]) -> bool:
    """Whether a condition differs among the columns of one attack."""
    attack = column[names.index("attack")] if "attack" in names else None
    same = [cell for cell in cells if attack is None or cell.attack == attack]
    return any(part not in cell.attack_params.split(";") for cell in same)

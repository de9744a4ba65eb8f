"""A comparison as CSV, Markdown and LaTeX. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from ensdef.footnotes import Footnotes
from ensdef.latex import latex_table
from ensdef.markdown import escaped, markdown_table
from ensdef.papers.comparison import Comparison, Entry
from ensdef.papers.layout import ROW_FIELDS, column_fields, column_title, key, telling, varying
from ensdef.papers.orderings import best, orderings
from ensdef.records import Record


def files(comparison: Comparison) -> dict[str, str]:
    """The files of a table by name."""
    name = comparison.name
    return {f"{name}.csv": csv(comparison), f"{name}.md": markdown(comparison), f"{name}.tex": latex(comparison)}


def csv(comparison: Comparison) -> str:
    """One published cell a row, ours behind it."""
    import pandas as pd

    rows = []
    for entry in comparison.entries:
        cell = dataclasses.asdict(entry.cell)
        value, std = cell.pop("value"), cell.pop("std")
        rows.append(
            {
                **cell,
                "published": value,
                "published_std": std,
                "ours": _rounded(entry.ours),
                "ours_stderr": _rounded(entry.stderr),
                "difference": _rounded(entry.difference),
                "n": entry.n,
                "scale": comparison.scale,
                "protocol": f"{comparison.protocol}-v{comparison.version}",
                "note": entry.note,
                "files": " ".join(_files(entry)),
            }
        )
    frame = pd.DataFrame(rows).astype({"n": "Int64"})
    return str(frame.to_csv(index=False, lineterminator="\n"))


def markdown(comparison: Comparison) -> str:
    """The paper's layout, each cell ours and, in brackets, the paper's."""
    grid = _Grid(comparison)
    text = f"# {escaped(comparison.title)}\n\n{escaped(_told(comparison))}\n\n"
    text += markdown_table(grid.rows, frozenset(grid.bold))
    text += f"\n\n{_KEY} {_agreement(comparison)}"
    text += "".join(f"\n\n{escaped(note)}" for note in grid.notes)
    if comparison.deviations:
        text += "\n\nWhat differs from the paper:\n\n" + "\n".join(
            f"- {escaped(told)}" for told in comparison.deviations
        )
    if comparison.notes:
        text += "\n\nOn the published numbers:\n\n" + "\n".join(f"- {escaped(told)}" for told in comparison.notes)
    return text + "\n"


def latex(comparison: Comparison) -> str:
    """The same grid for a paper, with booktabs rules."""
    grid = _Grid(comparison)
    told = [_told(comparison), f"{_KEY} {_agreement(comparison)}", *grid.notes, *comparison.deviations]
    return latex_table(grid.rows, name=comparison.name, title=comparison.title, notes=told, bold=grid.bold)


_KEY = "Each cell: ours ± standard error over images (published); in bold what is not told apart from the best of ours."


class _Grid:
    """The paper's layout: rows are models, columns what they met; flags and failures as footnotes.

    Attributes:
        rows: cells by column.
        bold: (row number, column) of accuracies that are not told apart from the best of their column.
        notes: below the table.
    """

    def __init__(self, comparison: Comparison) -> None:
        entries = comparison.entries
        cells = [entry.cell for entry in entries]
        labels, conditions = telling(cells, ROW_FIELDS), varying(cells, column_fields(cells))
        titles: dict[tuple[str, ...], str] = {}
        for cell in cells:
            place = key(cell, conditions)
            if place not in titles:
                title = column_title(place, conditions, cells)
                titles[place] = title if title not in titles.values() else f"{title} ({len(titles) + 1})"
        footnotes = Footnotes([_examined(record) for entry in entries for record in entry.records if not record.error])
        found: dict[tuple[str, ...], dict[str, str]] = {}
        bold: list[tuple[tuple[str, ...], str]] = []
        for entry, is_best in zip(entries, best(entries), strict=True):
            row, column = key(entry.cell, labels), titles[key(entry.cell, conditions)]
            if row not in found:
                found[row] = {**dict(zip(labels, row, strict=True)), **dict.fromkeys(titles.values(), "")}
            ours = "-" if entry.ours is None else _shown(entry)
            marks = footnotes.marks(*(_examined(record) for record in entry.records if not record.error))
            marks += footnotes.add(entry.note) if entry.note else ""
            found[row][column] = f"{ours} ({entry.cell.value or '-'}){marks}"
            if is_best:
                bold.append((row, column))
        self.rows = list(found.values())
        numbers = {row: number for number, row in enumerate(found)}
        self.bold = {(numbers[row], column) for row, column in bold}
        self.notes = [f"[{number}] {note}" for number, note in enumerate(footnotes.texts, start=1)]


def _examined(record: Record) -> Record:
    """The record without the finding that images are few: every cell has its standard error."""
    return dataclasses.replace(record, flags=[flag for flag in record.flags if flag["flag"] != "uncertain"])


def _told(comparison: Comparison) -> str:
    """Scale and number of images."""
    images = sorted({entry.n for entry in comparison.entries if entry.n is not None})
    count = f" n = {' to '.join(map(str, dict.fromkeys((images[0], images[-1]))))} images." if images else ""
    return f"Scale {comparison.scale}: {comparison.scale_title}.{count}"


def _shown(entry: Entry) -> str:
    assert entry.ours is not None
    digits = 1 if entry.cell.unit == "percent" else 3 if entry.cell.unit in ("fraction", "") else 2
    text = f"{entry.ours:.{digits}f}"
    return text if entry.stderr is None else f"{text} ± {entry.stderr:.{digits}f}"


def _agreement(comparison: Comparison) -> str:
    """How many cells have an answer, and how far the order of rows is the paper's."""
    answered = sum(entry.ours is not None for entry in comparison.entries)
    told = f"{answered} of {len(comparison.entries)} cells answered."
    found = orderings(comparison.entries)
    if found.pairs:
        told += (
            f" Of {found.pairs} pairs of rows that a column of the paper orders, ours are ordered the same way in "
            f"{found.same}, the other way in {found.opposite}, and not told apart in {found.undecided} (exact "
            "paired test on images, standard errors where there are no outcomes; 5 % for each pair)."
        )
    return told


def _files(entry: Entry) -> list[str]:
    sources: list[Any] = [*entry.records, *entry.measurements]
    return list(dict.fromkeys(f"{source.label}:{source.key[:16]}" for source in sources))


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 6)

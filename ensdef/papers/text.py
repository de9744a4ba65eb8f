"""A comparison as CSV, Markdown and LaTeX. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ensdef.papers.comparison import Comparison, Entry
from ensdef.papers.layout import COLUMN_FIELDS, ROW_FIELDS, column_title, key, telling, varying
from ensdef.papers.orderings import orderings


def files(comparison: Comparison) -> dict[str, str]:
    """The files of a table by name."""
    name = comparison.name
    return {f"{name}.csv": csv(comparison), f"{name}.md": markdown(comparison), f"{name}.tex": latex(comparison)}


def csv(comparison: Comparison) -> str:
    """One published cell a row, ours behind it."""
    import dataclasses

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
    from tabulate import tabulate

    notes = _Notes()
    header, body = _grid(comparison, lambda entry: _cell_text(entry, notes))
    images = sorted({entry.n for entry in comparison.entries if entry.n is not None})
    count = f" n = {' to '.join(map(str, dict.fromkeys((images[0], images[-1]))))} images." if images else ""
    text = f"# {comparison.title}\n\nScale {comparison.scale}: {comparison.scale_title}.{count}\n\n"
    text += tabulate(body, headers=header, tablefmt="github", disable_numparse=True)
    text += "\n\nEach cell: ours ± standard error (published). " + _agreement(comparison)
    text += "".join(f"\n\n[{number}] {note}" for number, note in enumerate(notes.texts, start=1))
    if comparison.deviations:
        text += "\n\nWhat differs from the paper:\n\n" + "\n".join(f"- {told}" for told in comparison.deviations)
    if comparison.notes:
        text += "\n\nOn the published numbers:\n\n" + "\n".join(f"- {told}" for told in comparison.notes)
    return text + "\n"


def latex(comparison: Comparison) -> str:
    """The same grid for a paper, with booktabs rules."""
    import pandas as pd

    header, body = _grid(comparison, _latex_cell)
    labels = _labels(comparison)
    body = [[_escaped(text) if index < labels else text for index, text in enumerate(row)] for row in body]
    # two columns may have one title: the frame's own names are numbers
    frame = pd.DataFrame(body)
    titles: dict[object, str] = {number: _escaped(title) for number, title in enumerate(header)}
    styler = frame.style.hide(axis="index").format_index(lambda number: titles[number], axis="columns")
    return f"% {comparison.title} ({comparison.scale}): ours (published)\n{styler.to_latex(hrules=True)}"


class _Notes:
    """Footnotes, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"


def _grid(comparison: Comparison, show: Callable[[Entry], str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the paper's layout: rows are models, columns what they met."""
    cells = [entry.cell for entry in comparison.entries]
    row_fields, column_fields = telling(cells, ROW_FIELDS), varying(cells, COLUMN_FIELDS)
    columns = list(dict.fromkeys(key(cell, column_fields) for cell in cells))
    rows: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for entry in comparison.entries:
        row = rows.setdefault(key(entry.cell, row_fields), {})
        row[key(entry.cell, column_fields)] = show(entry)
    header = [*row_fields, *(column_title(column, column_fields, cells) for column in columns)]
    return header, [[*labels, *(row.get(column, "") for column in columns)] for labels, row in rows.items()]


def _labels(comparison: Comparison) -> int:
    return len(telling([entry.cell for entry in comparison.entries], ROW_FIELDS))


def _cell_text(entry: Entry, notes: _Notes) -> str:
    published = entry.cell.value or "-"
    ours = "-" if entry.ours is None else _shown(entry)
    return f"{ours} ({published})" + (notes.mark(entry.note) if entry.note else "")


def _latex_cell(entry: Entry) -> str:
    ours = "--" if entry.ours is None else _shown(entry).replace(" ± ", r" $\pm$ ")
    published = entry.cell.value or "--"
    if entry.cell.bold == "1":
        published = rf"\textbf{{{published}}}"
    return f"{ours} ({published})"


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
            f"{found.same}, the other way in {found.opposite}, and not told apart in {found.undecided} (paired test, "
            "5 % for each pair)."
        )
    return told


def _files(entry: Entry) -> list[str]:
    sources: list[Any] = [*entry.records, *entry.measurements]
    return list(dict.fromkeys(f"{source.label}:{source.key[:16]}" for source in sources))


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 6)


def _escaped(text: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#")):
        text = text.replace(plain, escaped)
    return text.replace("²", r"\textsuperscript{2}")

"""Tables for people: texts from files as Markdown prints them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SPECIAL = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "\\<", "\n": " ", "\r": " "})


def escaped(text: str) -> str:
    """A text that ends no cell and no line, and starts no tag and no link."""
    return text.translate(_SPECIAL).replace("](", "]\\(")


def markdown_table(rows: Sequence[Mapping[str, object]], bold: frozenset[tuple[int, str]] = frozenset()) -> str:
    """Rows with the same columns as a table; ``None`` is an empty cell.

    Args:
        bold: (row number, column) of cells in bold, the marks of footnotes left out.
    """
    from tabulate import tabulate

    cells = [
        {
            escaped(column): _strong(text) if (number, column) in bold else text
            for column, value in row.items()
            for text in ["" if value is None else escaped(str(value))]
        }
        for number, row in enumerate(rows)
    ]
    return str(tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True))


def _strong(text: str) -> str:
    number, bracket, marks = text.partition(" [")
    return f"**{number}**{bracket}{marks}"

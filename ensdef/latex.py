"""Tables for papers: LaTeX with booktabs rules, through pandas. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

_SPECIAL: dict[str, str | int | None] = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    # printed as other characters in LaTeX's old default encoding
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    # the separators of a table's label and of thousands
    "±": "$\\pm$",
    "×": "$\\times$",
    "\n": " ",
    "\r": " ",
}


def escaped(text: str) -> str:
    """The text as LaTeX prints it."""
    return text.translate(str.maketrans(_SPECIAL))


def latex_table(
    rows: Sequence[Mapping[str, str]],
    *,
    name: str,
    title: str,
    notes: Sequence[str] = (),
    bold: Collection[tuple[int, str]] = (),
) -> str:
    """A floating table that needs the package booktabs alone.

    Args:
        rows: cells by column, as printed.
        name: of the label, ``tab:name``.
        notes: paragraphs below the table.
        bold: (row number, column) of cells in bold.
    """
    import pandas as pd

    if not rows:
        return "% no rows\n"
    columns = list(rows[0])
    heads = [escaped(column) for column in columns]
    frame = pd.DataFrame([[escaped(row[column]) for column in columns] for row in rows], columns=heads)
    # a command that encloses the cell, in the notation of pandas' Styler
    styles = [
        ["textbf:--rwrap;" if (number, column) in bold else "" for column in columns] for number in range(len(rows))
    ]
    styler = frame.style.hide(axis="index").apply(lambda _: pd.DataFrame(styles, columns=heads), axis=None)
    text = styler.to_latex(
        hrules=True,
        column_format="l" * len(columns),
        position="t",
        position_float="centering",
        caption=escaped(title),
        label=f"tab:{name}",
    )
    below = "".join(f"\\par\\smallskip\\footnotesize {escaped(note)}\n" for note in notes)
    head, end, _ = str(text).rpartition("\\end{table}")
    return f"% needs \\usepackage{{booktabs}}\n{head}{below}{end}\n"

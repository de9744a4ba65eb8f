"""Measurements as tables: CSV for machines, Markdown for people, LaTeX for papers. A function of files; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensdef.latex import latex_table
from ensdef.markdown import escaped, markdown_table
from ensdef.measurement import Measurement

#: Columns of the CSV.
COLUMNS = [
    *("method", "dataset", "architecture", "members", "train_seed", "measure", "norm", "eps", "combiner", "n"),
    *("quantity", "value", "stderr", "file"),
]
_KEY = "Values ± standard error where there is one, on n images; `ensdef list measurements` tells what they are."


def files(name: str, title: str, measurements: Sequence[Measurement], results: Path) -> dict[str, str]:
    """The files of a table by name."""
    return {
        f"{name}.csv": csv(measurements, results),
        f"{name}.md": markdown(measurements, title),
        f"{name}.tex": latex_table(_rows(measurements), name=name, title=title, notes=[_KEY]),
    }


def csv(measurements: Sequence[Measurement], results: Path) -> str:
    """One value a row."""
    import pandas as pd

    rows = []
    for one in measurements:
        path = Path(str(one.path))
        for value, number in one.values.items():
            rows.append(
                {
                    "method": one.label,
                    "dataset": one.dataset,
                    "architecture": one.architecture,
                    "members": one.members,
                    "train_seed": one.train_seed,
                    "measure": one.call,
                    "norm": one.norm,
                    "eps": one.eps,
                    "combiner": one.combiner,
                    "n": one.n,
                    "quantity": value,
                    "value": number,
                    "stderr": one.stderr.get(value),
                    "file": path.relative_to(results).as_posix() if path.is_relative_to(results) else path.as_posix(),
                }
            )
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"members": "Int64", "train_seed": "Int64", "n": "Int64"})
    return str(frame.to_csv(index=False, lineterminator="\n"))


def markdown(measurements: Sequence[Measurement], title: str) -> str:
    """One measurement a row, its values as columns."""
    return f"# {escaped(title)}\n\n{markdown_table(_rows(measurements))}\n\n{_KEY}\n"


def _rows(measurements: Sequence[Measurement]) -> list[dict[str, str]]:
    names = list(dict.fromkeys(value for one in measurements for value in one.values))
    rows = []
    for one in measurements:
        known: dict[str, Any] = {
            "method": one.label,
            "data": one.dataset,
            "arch": None if one.architecture is None else f"{one.members} x {one.architecture}",
            "seed": one.train_seed,
            "measure": one.call,
            "eps": one.eps,
            "n": one.n,
        }
        told = {name: "-" if value is None else str(value) for name, value in known.items()}
        for name in names:
            number = one.values.get(name)
            told[name] = "-" if number is None else f"{number:.4g}"
            if number is not None and name in one.stderr:
                told[name] += f" ± {one.stderr[name]:.2g}"
        rows.append(told)
    return rows

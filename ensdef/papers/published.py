"""Numbers that the papers print, cell by cell as they print them. Files alone; no torch."""

from __future__ import annotations

import csv
import dataclasses
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ensdef.errors import UsageError, suggest


@dataclass(frozen=True)
class PublishedCell:
    """One number of a table, every field as text.

    Args:
        paper, table: ``"cda2"``, ``"table1"``.
        dataset, architecture, members, method, variant, combiner: of the row's model; empty where the paper is silent.
        attack: ``"none"`` for clean accuracy; empty where no attack is involved.
        attack_params: ``key=value`` joined by semicolons, what the paper states.
        norm, eps: of the attack; the radius as printed.
        metric: ``accuracy``, ``robust_accuracy``, ``time_s``, ...
        value, std: the digits as printed; an empty value is a cell that the paper leaves out or that cannot be read.
        unit: ``percent``, ``seconds``, ``fraction``, ``count``, ``megabytes``, or empty.
        bold: ``"1"`` where the paper prints it bold.
    """

    paper: str
    table: str
    dataset: str
    architecture: str
    members: str
    method: str
    variant: str
    combiner: str
    attack: str
    attack_params: str
    norm: str
    eps: str
    metric: str
    value: str
    std: str
    unit: str
    bold: str

    @property
    def label(self) -> str:
        """Method and variant, ``cce;rm``."""
        return f"{self.method};{self.variant}" if self.variant else self.method

    @property
    def conditions(self) -> dict[str, str]:
        """``attack_params`` by name."""
        return dict(part.split("=", 1) for part in self.attack_params.split(";") if part)

    @property
    def number(self) -> float | None:
        """The value, None where there is none."""
        return float(self.value) if self.value else None


@cache
def paper_titles() -> dict[str, str]:
    """Titles by paper."""
    text = files("ensdef.benchmarks").joinpath("published", "papers.toml").read_text(encoding="utf-8")
    return {paper: str(title) for paper, title in tomllib.loads(text).items()}


@cache
def published() -> dict[str, tuple[PublishedCell, ...]]:
    """Every published table by ``paper/table``, cells in the order of the paper's rows."""
    tables: dict[str, list[PublishedCell]] = {}
    folder = files("ensdef.benchmarks").joinpath("published")
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        paper, _, suffix = path.name.rpartition(".")
        if suffix != "csv":
            continue
        names = {field.name for field in dataclasses.fields(PublishedCell)} - {"paper"}
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            if set(row) != names:
                raise UsageError(f"{path.name} has columns {', '.join(row)}; expected {', '.join(sorted(names))}")
            tables.setdefault(f"{paper}/{row['table']}", []).append(PublishedCell(paper, **row))
    return {name: tuple(cells) for name, cells in tables.items()}


def published_table(name: str) -> tuple[PublishedCell, ...]:
    """The cells of one table, such as ``cda2/table1``.

    Raises:
        UsageError: no such table.
    """
    tables = published()
    if name not in tables:
        raise UsageError(suggest("published table", name, list(tables)))
    return tables[name]

"""Records to tables: CSV for machines, Markdown for people, LaTeX for papers. A pure function of files; no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ensdef.errors import UsageError, suggest
from ensdef.footnotes import Footnotes
from ensdef.latex import latex_table
from ensdef.leaderboard_table import leaderboard_files
from ensdef.measurement import Measurement, read_measurement
from ensdef.metrics import binomial_stderr
from ensdef.records import Record, read_record, write_text
from ensdef.set_aside import whole
from ensdef.worst_case import met_together, worst_case, worst_cases

#: What is made of a table's records: a row each, a row a defence with ranks, numbers beside
#: accuracy, or answers to a paper's cells.
Kind = Literal["grid", "leaderboard", "measures", "paper"]
#: Columns of the CSV, numbers as fractions.
COLUMNS = (
    "method",
    "dataset",
    "architecture",
    "members",
    "train_seed",
    "train_eps",
    "attack",
    "norm",
    "eps",
    "success",
    "combiner",
    "search",
    "n",
    "clean_accuracy",
    "clean_stderr",
    "robust_accuracy",
    "robust_stderr",
    "seconds",
    "forwards",
    "backwards",
    "flags",
    "error",
    "protocol",
    "record",
)


def row(record: Record, results: Path) -> dict[str, Any]:
    """One record as a CSV row; fractions and numbers stay numbers."""
    path = Path(record.path) if record.path else None
    if path is not None and path.is_relative_to(results):
        path = path.relative_to(results)
    clean = record.clean_accuracy
    return {
        "method": record.label,
        "dataset": record.dataset,
        "architecture": record.architecture,
        "members": record.members,
        "train_seed": record.train_seed,
        "train_eps": record.training.get("eps"),
        "attack": record.attack_label,
        "norm": record.norm,
        "eps": record.eps,
        "success": record.success,
        "combiner": record.combiner,
        "search": record.provenance.get("search"),
        "n": record.n,
        "clean_accuracy": clean,
        "clean_stderr": None if clean is None else binomial_stderr(clean, record.n),
        "robust_accuracy": record.robust_accuracy,
        "robust_stderr": record.stderr,
        "seconds": record.seconds,
        "forwards": record.forwards,
        "backwards": record.backwards,
        "flags": " ".join(flag["flag"] for flag in record.flags),
        "error": record.error,
        "protocol": record.provenance.get("protocol"),
        "record": path.as_posix() if path else None,
    }


def csv(records: Sequence[Record], results: Path) -> str:
    """The records as CSV, one a row."""
    import pandas as pd

    rows = [{name: _one_line(value) for name, value in row(record, results).items()} for record in records]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return str(frame.to_csv(index=False, lineterminator="\n"))


def _one_line(value: Any) -> Any:
    """A carriage return would end a row: the writer quotes line feeds alone."""
    return value.replace("\r", " ") if isinstance(value, str) else value


def markdown(records: Sequence[Record], results: Path, title: str = "") -> str:
    """The records as a Markdown table in percent, footnotes for flags and failures below."""
    from tabulate import tabulate

    notes = Footnotes(records)
    worst = {id(record): worst_case(met) for met in met_together(records) for record in met}
    text = f"# {title}\n\n" if title else ""
    text += tabulate(_grid(records, results, notes, worst), headers="keys", tablefmt="github", disable_numparse=True)
    text += "".join(f"\n\n{paragraph}" for paragraph in _below(notes, worst))
    departures = {(record.method, why): None for record in records for why in record.training.get("deviations", ())}
    if departures:
        text += "\n\nWhere methods depart from their papers or released code:\n"
        text += "".join(f"\n- {method}: {why}" for method, why in departures)
    return text + "\n"


def latex(records: Sequence[Record], results: Path, name: str, title: str = "") -> str:
    """The records as a LaTeX table, without what only finds or times them; footnotes below."""
    notes = Footnotes(records)
    worst = {id(record): worst_case(met) for met in met_together(records) for record in met}
    rows = [
        {head: "" if value is None else str(value) for head, value in row.items() if head not in ("time s", "record")}
        for row in _grid(records, results, notes, worst)
    ]
    return latex_table(rows, name=name, title=title, notes=_below(notes, worst))


def _below(notes: Footnotes, worst: Mapping[int, Record]) -> list[str]:
    """Paragraphs below a table."""
    told = []
    if worst:
        radius = " (at this radius)" if any(record.norm for record in worst.values()) else ""
        told.append(f"worst %: right under every attack on this model in this table{radius}, image by image.")
    told.append("Accuracy in percent ± binomial standard error over n test images.")
    return told + [f"[{index}] {note}" for index, note in enumerate(notes.texts, start=1)]


def _grid(
    records: Sequence[Record], results: Path, notes: Footnotes, worst: Mapping[int, Record]
) -> list[dict[str, Any]]:
    """The table itself, as printed. ``worst`` has worst cases by the id() of a record."""
    rows = []
    for record in records:
        rows.append(
            {
                "method": record.label,
                "data": record.dataset,
                "arch": f"{record.members} x {record.architecture}",
                "seed": record.train_seed,
                "attack": record.attack_label + ("" if record.combiner == "native" else f" on {record.combiner}"),
                "norm": record.norm or "-",
                "eps": record.eps or "-",
                "clean %": percent(record.clean_accuracy, record.n),
                "robust %": percent(record.robust_accuracy, record.n) + notes.marks(record),
                **({"worst %": _worst_percent(worst.get(id(record)))} if worst else {}),
                "n": record.n,
                "time s": f"{record.seconds:.1f}",
                "record": row(record, results)["record"] or "-",
            }
        )
    return rows


def _worst_percent(worst: Record | None) -> str:
    return "-" if worst is None else percent(worst.robust_accuracy, worst.n)


def percent(accuracy: float | None, n: int) -> str:
    """``67.2 ± 2.1``; a dash where there is no number."""
    if accuracy is None:
        return "-"
    return f"{100 * accuracy:.1f} ± {100 * binomial_stderr(accuracy, n):.1f}"


class Manifests:
    """Which cells make up which table: ``manifests/<name>.json``, written by the run, read by ``ensdef table``."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.folder = results / "manifests"

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def of_protocol(self, name: str) -> list[str]:
        """The table of this name, or those of a protocol at all its scales.

        Raises:
            UsageError: there is none.
        """
        known = self.names()
        found = [table for table in known if table == name or table.rpartition("-")[0] == name]
        if not found:
            raise UsageError(suggest("table", name, known) + f" (in {self.results}; `ensdef run` makes them)")
        return found

    def write(
        self,
        name: str,
        title: str,
        records: Sequence[Record],
        *,
        extend: bool,
        kind: Kind = "grid",
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Remember the records of a table and what is made of them; ``extend`` keeps those that were there before.

        Args:
            tell: is told of what was there before and cannot be read.
        """
        paths = self._readable(name, tell) if extend and name in self.names() else []
        for record in records:
            path = Path(str(record.path)).relative_to(self.results).as_posix()
            if path not in paths:
                paths.append(path)
        content = {"title": title, "kind": kind, "records": paths}
        write_text(self.folder / f"{name}.json", json.dumps(content, indent=1) + "\n")

    def _readable(self, name: str, tell: Callable[[str], None]) -> list[str]:
        """The records that a table had so far, without those that are gone or damaged: these stay where they are,
        because only who has claimed a cell may set its record aside.
        """
        content = whole(lambda: self._read(name), self.folder / f"{name}.json", tell)
        paths = []
        for relative in content["records"] if content else []:
            try:
                read_record(self.results / relative)
            except UsageError as error:
                tell(f"left out of the table {name}: {error}")
            else:
                paths.append(relative)
        return paths

    def read(self, name: str) -> tuple[str, list[Record]]:
        """Title and records of a table.

        Raises:
            UsageError: no such table, or a record is missing.
        """
        content = self._read(name)
        records = []
        for relative in content["records"]:
            path = self.results / relative
            if not path.resolve().is_relative_to(self.results.resolve()) or not path.is_file():
                raise UsageError(f"table {name}: record {relative} is missing; run the protocol again")
            records.append(read_record(path))
        return str(content["title"]), records

    def kind(self, name: str) -> Kind:
        """What is made of a table's records; manifests that do not say so are grids.

        Raises:
            UsageError: no such table, or of a kind that is not known.
        """
        kind: Kind = self._content(name).get("kind", "grid")
        if kind not in get_args(Kind):
            expected = ", ".join(get_args(Kind))
            raise UsageError(f"{self.folder / (name + '.json')} is of kind {kind!r}; expected one of {expected}")
        return kind

    def write_measurements(self, name: str, title: str, measurements: Sequence[Measurement]) -> None:
        """Remember the measurements of a table; those that failed have no file."""
        paths = [Path(str(one.path)).relative_to(self.results).as_posix() for one in measurements if one.path]
        content = {"title": title, "kind": "measures", "measurements": paths}
        write_text(self.folder / f"{name}.json", json.dumps(content, indent=1) + "\n")

    def measurements(self, name: str) -> tuple[str, list[Measurement]]:
        """Title and measurements of a table.

        Raises:
            UsageError: a measurement is missing or was edited.
        """
        content = self._content(name)
        paths = [self.results / str(path) for path in content.get("measurements", ())]
        for path in paths:
            if not path.resolve().is_relative_to(self.results.resolve()):
                raise UsageError(f"table {name}: measurement {path} is outside {self.results}; run the protocol again")
        return str(content.get("title", name)), [read_measurement(path) for path in paths]

    def _content(self, name: str) -> dict[str, Any]:
        self.of_protocol(name)
        path = self.folder / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is no table manifest ({error!r})") from error
        if not isinstance(content, dict):
            raise UsageError(f"{path} is no table manifest (it holds no object)")
        return content

    def _read(self, name: str) -> dict[str, Any]:
        content = self._content(name)
        try:
            paths = [str(path) for path in content["records"]]
            return {"title": str(content["title"]), "records": paths}
        except (KeyError, TypeError) as error:
            raise UsageError(f"{self.folder / (name + '.json')} is no table manifest ({error!r})") from error


def build_table(name: str, results: Path) -> dict[str, str]:
    """The files of a table by name: ``{"x.csv": text, "x.md": text, "x.tex": text}``, of a grid with ``x.worst.csv``
    for worst cases.

    Raises:
        UsageError: no such table, a record is missing, or records that do not belong in one leaderboard.
    """
    manifests = Manifests(results)
    if manifests.kind(name) == "paper":
        from ensdef.papers import text
        from ensdef.papers.comparison import compare

        return text.files(compare(name, results))
    if manifests.kind(name) == "measures":
        from ensdef import measure_tables

        return measure_tables.files(name, *manifests.measurements(name), results)
    title, records = manifests.read(name)
    if manifests.kind(name) == "leaderboard":
        return leaderboard_files(name, title, records)
    files = {
        f"{name}.csv": csv(records, results),
        f"{name}.md": markdown(records, results, title),
        f"{name}.tex": latex(records, results, name, title),
    }
    if worst := worst_cases(records):
        files[f"{name}.worst.csv"] = csv(worst, results)
    return files


def write_table(name: str, results: Path, tables: Path) -> list[Path]:
    """Write a table's files; returns their paths."""
    paths = []
    for file, text in build_table(name, results).items():
        write_text(tables / file, text)
        paths.append(tables / file)
    return paths


def stale_tables(results: Path, only: str | None = None) -> list[str]:
    """Names of committed files in ``published/tables/`` that differ from what the published records give.

    Args:
        results: the folder that holds ``published/``.
        only: one table; None: all.
    """
    published = results / "published"
    names = Manifests(published).names() if only is None else Manifests(published).of_protocol(only)
    if not names:
        raise UsageError(f"no published tables in {published}; expected manifests/*.json there")
    stale = []
    for name in names:
        for file, text in build_table(name, published).items():
            path = published / "tables" / file
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(file)
    return stale

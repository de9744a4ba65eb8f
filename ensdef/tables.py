"""Records to tables: CSV for machines, Markdown for people. A pure function of files; no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ensdef.errors import UsageError, suggest
from ensdef.footnotes import Footnotes
from ensdef.metrics import binomial_stderr
from ensdef.records import Record, with_outcomes, write_text

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


def worst_cases(records: Sequence[Record]) -> list[Record]:
    """For every model that met several attacks: the images that stay right under all of them."""
    return [_worst_case(met) for met in _met_together(records)]


def _met_together(records: Sequence[Record]) -> list[list[Record]]:
    """Records of one model on the same images; radius by radius where it was attacked at several of one norm, since
    there the largest alone would decide.
    """
    models: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.error is None and "key" in record.training:
            models.setdefault((record.label, record.training["key"], record.combiner), []).append(record)
    groups: list[list[Record]] = []
    for met in models.values():
        radii = {(record.norm, record.eps_value) for record in met}
        if len({norm for norm, _ in radii}) == len(radii):
            groups.append(met)
            continue
        for radius in sorted(radii, key=str):
            groups.append([record for record in met if (record.norm, record.eps_value) == radius])
    return [
        met
        for met in groups
        if len(met) > 1 and all(record.outcomes["ids"] == met[0].outcomes["ids"] for record in met)
    ]


def _worst_case(met: Sequence[Record]) -> Record:
    robust = [min(images) for images in zip(*(record.outcomes["robust"] for record in met), strict=True)]
    label = " + ".join(f"{record.attack_label}{f' {record.norm}' if record.norm else ''}" for record in met)
    cost = {name: sum(getattr(record, name) for record in met) for name in ("seconds", "forwards", "backwards")}
    one = len({(record.norm, record.eps_value) for record in met}) == 1
    blank = dataclasses.replace(
        met[0],
        attack="worst_case",
        attack_label=f"worst of {label}",
        norm=met[0].norm if one else None,
        eps=met[0].eps if one else None,
        path=None,
        flags=[],
        **cost,
    )
    return with_outcomes(blank, met[0].outcomes["ids"], met[0].outcomes["clean"], robust)


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
    notes = Footnotes(records)
    text = f"# {title}\n\n" if title else ""
    worst = {id(record): _worst_case(met) for met in _met_together(records) for record in met}
    text += _grid(records, results, notes, worst)
    if worst:
        text += "\n\nworst %: right under every attack on this model in this table"
        text += " (at this radius)" if any(record.norm for record in worst.values()) else ""
        text += ", image by image."
    text += "\n\nAccuracy in percent ± binomial standard error over n test images."
    text += "".join(f"\n\n[{index}] {note}" for index, note in enumerate(notes.texts, start=1))
    departures = {(record.method, why): None for record in records for why in record.training.get("deviations", ())}
    if departures:
        text += "\n\nWhere methods depart from their papers or released code:\n"
        text += "".join(f"\n- {method}: {why}" for method, why in departures)
    return text + "\n"


def _grid(records: Sequence[Record], results: Path, notes: Footnotes, worst: Mapping[int, Record]) -> str:
    """The table itself. ``worst`` has worst cases by the id() of a record."""
    from tabulate import tabulate

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
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


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

    def kind(self, name: str) -> str:
        """``"grid"``, ``"leaderboard"`` or ``"paper"``."""
        return str(self._content(name).get("kind", "grid"))

    def write(self, name: str, title: str, records: Sequence[Record], *, extend: bool) -> None:
        """Remember the records of a table; ``extend`` keeps those that were there before."""
        paths = self._read(name)["records"] if extend and name in self.names() else []
        for record in records:
            path = Path(str(record.path)).relative_to(self.results).as_posix()
            if path not in paths:
                paths.append(path)
        write_text(self.folder / f"{name}.json", json.dumps({"title": title, "records": paths}, indent=1) + "\n")

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
            records.append(Record.from_json(path.read_text(encoding="utf-8"), path))
        return str(content["title"]), records

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
            return {"title": str(content["title"]), "records": [str(path) for path in content["records"]]}
        except (KeyError, TypeError) as error:
            raise UsageError(f"{self.folder / (name + '.json')} is no table manifest ({error!r})") from error


def build_table(name: str, results: Path) -> dict[str, str]:
    """The files of a table by name: ``{"x.csv": text, "x.md": text}``, with ``x.worst.csv`` for worst cases."""
    if Manifests(results).kind(name) == "paper":
        from ensdef.papers import text
        from ensdef.papers.comparison import compare

        return text.files(compare(name, results))
    title, records = Manifests(results).read(name)
    files = {f"{name}.csv": csv(records, results), f"{name}.md": markdown(records, results, title)}
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

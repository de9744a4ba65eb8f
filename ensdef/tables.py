"""Records to tables: CSV for machines, Markdown for people, LaTeX for papers. A pure function of files; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ensdef.errors import UsageError
from ensdef.footnotes import Footnotes
from ensdef.latex import latex_table
from ensdef.leaderboard_table import leaderboard_files
from ensdef.manifests import Manifests
from ensdef.markdown import escaped, markdown_table
from ensdef.metrics import binomial_stderr, wilson
from ensdef.records import Record, write_text
from ensdef.worst_case import met_together, worst_case, worst_cases

#: Columns of the CSV, numbers as fractions. No times: equal runs give equal bytes.
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
    "robust_low",
    "robust_high",
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
        **dict(zip(("robust_low", "robust_high"), interval(record) or (None, None), strict=True)),
        "forwards": record.forwards,
        "backwards": record.backwards,
        "flags": " ".join(flag["flag"] for flag in record.flags),
        "error": record.error,
        "protocol": record.provenance.get("protocol"),
        "record": path.as_posix() if path else None,
    }


def interval(record: Record) -> tuple[float, float] | None:
    """Wilson's 95 % interval of the robust accuracy over images; None where there is no accuracy."""
    return None if record.robust_accuracy is None else wilson(round(record.robust_accuracy * record.n), record.n)


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
    worst = {id(record): worst_case(met) for met in met_together(records) for record in met}
    text = f"# {escaped(title)}\n\n" if title else ""
    text += markdown_table(_grid(records, results, notes, worst))
    text += "".join(f"\n\n{escaped(paragraph)}" for paragraph in _below(notes, worst))
    departures = {(record.method, why): None for record in records for why in record.training.get("deviations", ())}
    if departures:
        text += "\n\nWhere methods depart from their papers or released code:\n"
        text += "".join(f"\n- {method}: {escaped(why)}" for method, why in departures)
    return text + "\n"


def latex(records: Sequence[Record], results: Path, name: str, title: str = "") -> str:
    """The records as a LaTeX table, without what only finds them; footnotes below."""
    notes = Footnotes(records)
    worst = {id(record): worst_case(met) for met in met_together(records) for record in met}
    rows = [
        {head: "" if value is None else str(value) for head, value in row.items() if head != "record"}
        for row in _grid(records, results, notes, worst)
    ]
    return latex_table(rows, name=name, title=title, notes=_below(notes, worst))


def _below(notes: Footnotes, worst: Mapping[int, Record]) -> list[str]:
    """Paragraphs below a table."""
    told = []
    if worst:
        radius = " (at this radius)" if any(record.norm for record in worst.values()) else ""
        told.append(f"worst %: right under every attack on this model in this table{radius}, image by image.")
    told.append(
        "Accuracy in percent ± binomial standard error over n test images; 95 %: Wilson's interval of robust accuracy."
    )
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
                "95 %": _range(interval(record)),
                **({"worst %": _worst_percent(worst.get(id(record)))} if worst else {}),
                "n": record.n,
                "record": row(record, results)["record"] or "-",
            }
        )
    return rows


def _range(found: tuple[float, float] | None) -> str:
    """``49.8-58.5``, in percent; a dash where there is no number."""
    return "-" if found is None else f"{100 * found[0]:.1f}-{100 * found[1]:.1f}"


def _worst_percent(worst: Record | None) -> str:
    return "-" if worst is None else percent(worst.robust_accuracy, worst.n)


def percent(accuracy: float | None, n: int) -> str:
    """``67.2 ± 2.1``; a dash where there is no number."""
    if accuracy is None:
        return "-"
    return f"{100 * accuracy:.1f} ± {100 * binomial_stderr(accuracy, n):.1f}"


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

"""Standings to files: CSV for machines, Markdown for people, LaTeX for papers. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ensdef.footnotes import Footnotes
from ensdef.latex import latex_table
from ensdef.leaderboard import Standing, standings
from ensdef.markdown import escaped, markdown_table
from ensdef.records import Record
from ensdef.statistics import Estimate

#: Costs by the head of their column: attribute, what it is divided by, decimals.
COSTS = {
    "parameters (k)": ("parameters", 1e3, 1),
    "training s": ("training_seconds", 1.0, 1),
    "training passes (M)": ("training_passes", 1e6, 2),
    "multiplications (G)": ("training_multiplications", 1e9, 1),
    "memory MB": ("peak_memory_mb", 1.0, 0),
}


def leaderboard_files(name: str, title: str, records: Sequence[Record]) -> dict[str, str]:
    """``{"x.csv": text, "x.md": text, "x.tex": text}``.

    Raises:
        UsageError: records that do not belong in one leaderboard.
    """
    rows = standings(records)
    return {
        f"{name}.csv": _csv(rows),
        f"{name}.md": _markdown(rows, title, records),
        f"{name}.tex": _latex(rows, name, title, records),
    }


def ranks(standing: Standing) -> str:
    """``3-9``, ``1`` or a dash."""
    if standing.ranks is None:
        return "-"
    best, worst = standing.ranks
    return str(best) if best == worst else f"{best}-{worst}"


def percent(estimate: Estimate | None) -> str:
    """``67.2 ± 2.1``: mean and standard error over images; a dash where there is no number."""
    return "-" if estimate is None else f"{100 * estimate.mean:.1f} ± {100 * estimate.stderr:.1f}"


def _csv(rows: Sequence[Standing]) -> str:
    import pandas as pd

    return str(pd.DataFrame([_numbers(row) for row in rows]).to_csv(index=False, lineterminator="\n"))


def _numbers(row: Standing) -> dict[str, Any]:
    """Fractions and numbers as they are."""
    first, last = row.ranks or (None, None)
    numbers: dict[str, Any] = {
        "rank_best": first,
        "rank_worst": last,
        "best": row.best,
        "method": row.label,
        "architecture": row.architecture,
        "members": row.members,
        "combiner": row.combiner,
        "seeds": " ".join(map(str, row.seeds)),
    }
    for what, estimate in {"clean": row.clean, **row.robust, "worst": row.worst}.items():
        for name in ("mean", "stderr", "seed_std", "n", "seeds"):
            numbers[f"{what} {name}"] = None if estimate is None else getattr(estimate, name)
    numbers |= {attribute: getattr(row.costs, attribute) for attribute, _, _ in COSTS.values()}
    told = {"flags": " ".join(row.flags), "errors": "; ".join(row.errors).replace("\r", " ")}
    return {**numbers, **told, "protocol": row.records[0].provenance.get("protocol")}


def _cells(rows: Sequence[Standing], notes: Footnotes) -> list[dict[str, str]]:
    """As printed, without bold type."""
    printed = []
    spread = any(row.worst is not None and row.worst.seed_std is not None for row in rows)
    for row in rows:
        missing = {column: _missing(row, column, notes) for column in row.robust}
        cells = {
            "rank": ranks(row),
            "method": row.label + ("" if row.combiner == "native" else f" on {row.combiner}"),
            "arch": f"{row.members} x {row.architecture}",
            "clean %": percent(row.clean),
            **{
                _head(column): percent(estimate) + notes.marks(*row.cells[column]) + missing[column]
                for column, estimate in row.robust.items()
            },
            "worst %": percent(row.worst),
        }
        if spread:
            apart = None if row.worst is None else row.worst.seed_std
            cells["seeds ±"] = "-" if apart is None else f"{100 * apart:.1f}"
        printed.append({**cells, **{head: _cost(row, head) for head in COSTS if _told(rows, head)}})
    return printed


def _head(column: str) -> str:
    return f"{column} %"


def _missing(row: Standing, column: str, notes: Footnotes) -> str:
    """The mark of a footnote for cells that were never run."""
    seeds = [seed for seed in row.seeds if all(record.train_seed != seed for record in row.cells[column])]
    return notes.add(f"not run for seed {', '.join(map(str, seeds))}: run the protocol again") if seeds else ""


def _told(rows: Sequence[Standing], head: str) -> bool:
    return any(getattr(row.costs, COSTS[head][0]) is not None for row in rows)


def _cost(row: Standing, head: str) -> str:
    attribute, unit, decimals = COSTS[head]
    value = getattr(row.costs, attribute)
    return "-" if value is None else f"{value / unit:.{decimals}f}"


def _bold(rows: Sequence[Standing]) -> set[tuple[int, str]]:
    """What is not told apart from the best of its column."""
    bold = {(number, _head(column)) for number, row in enumerate(rows) for column in row.best_under}
    return bold | {(number, "worst %") for number, row in enumerate(rows) if row.best}


def _markdown(rows: Sequence[Standing], title: str, records: Sequence[Record]) -> str:
    notes = Footnotes(records)
    parts = [f"# {escaped(title)}", markdown_table(_cells(rows, notes), frozenset(_bold(rows)))]
    below = map(escaped, (*_reading(rows), *_numbered(notes)))
    return "\n\n".join([*parts, *below, *_departures(records)]) + "\n"


def _latex(rows: Sequence[Standing], name: str, title: str, records: Sequence[Record]) -> str:
    notes = Footnotes(records)
    cells = _cells(rows, notes)
    below = [*_reading(rows), *_numbered(notes)]
    return latex_table(cells, name=name, title=title, notes=below, bold=_bold(rows))


def _reading(rows: Sequence[Standing]) -> list[str]:
    """How the table is to be read."""
    measured = [row.clean for row in rows if row.clean is not None]
    images = measured[0].n if measured else 0
    seeds = dict.fromkeys(str(seed) for row in rows for seed in row.seeds)
    told = [
        f"Accuracy in percent ± standard error over {images} test images, mean over training seeds {', '.join(seeds)}. "
        "worst: right under every attack, image by image.",
        "rank: places that a row may have by its worst case, as far as exact sign tests over paired images tell rows "
        "apart (5 % over all pairs together, Holm's correction). Bold: not told apart from the best of the column.",
    ]
    if any(row.worst is not None and row.worst.seed_std is not None for row in rows):
        told.append("seeds ±: standard deviation of the worst case from one training seed to another.")
    if any(_told(rows, head) for head in COSTS):
        told.append(
            "Costs are means over seeds and include trainings that a method starts from; a pass is one training pass "
            "of one member over one image, multiplications are those of all passes, memory is the peak of the training."
        )
    return told


def _numbered(notes: Footnotes) -> list[str]:
    return [f"[{number}] {text}" for number, text in enumerate(notes.texts, start=1)]


def _departures(records: Sequence[Record]) -> list[str]:
    found = {(record.method, why): None for record in records for why in record.training.get("deviations", ())}
    listed = "\n".join(f"- {method}: {escaped(why)}" for method, why in found)
    return [f"Where methods depart from their papers or released code:\n\n{listed}"] if found else []

"""The page: what was gathered, put into ``template.html``. Everything is escaped but our own style and scripts."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ensdef import leaderboard
from ensdef._version import __version__
from ensdef.health.catalogue import FLAGS
from ensdef.leaderboard import Standing
from ensdef.records import Record
from ensdef.report.board import Board, build_board
from ensdef.report.breakdown import breakdowns
from ensdef.report.curves import curves
from ensdef.report.drawers import drawer, measurement_drawer
from ensdef.report.figure import CONFIG, Figure
from ensdef.report.gathering import Gathered, ResultsTable, gather
from ensdef.report.library import chart_library, embeddable
from ensdef.report.replication import papers
from ensdef.report.standings import standings
from ensdef.report.tradeoffs import tradeoffs
from ensdef.report.transfer import between_members, transfers

if TYPE_CHECKING:
    from ensdef.measurement import Measurement

#: Protocols that the header names one by one.
LISTED = 6
#: Sections of a panel, in this order; each where a table has what it draws.
_SECTIONS = (
    ("Accuracy against the radius", curves),
    ("Transfer between defences", transfers),
    ("Which view broke what", breakdowns),
    ("Cost against robustness", tradeoffs),
)


@dataclass(frozen=True)
class Panel:
    """One table of the folder: its leaderboard and what is drawn of it, by section."""

    id: str
    table: ResultsTable
    about: str
    board: Board
    figures: tuple[tuple[str, tuple[Figure, ...]], ...]


def render(results: Path) -> str:
    """The page of a results folder; the same files give the same bytes.

    Raises:
        UsageError: no tables, a damaged record, or no charting library.
    """
    return compose(gather(results), results)


def compose(gathered: Gathered, results: Path) -> str:
    """The page of what was gathered.

    Args:
        results: what the paths of records are told relative to.
    """
    records = gathered.records
    sources: list[Record | Measurement] = [*records, *gathered.compared_measurements]
    positions = {source.key: position for position, source in enumerate(sources)}
    panels = [_panel(f"table-{number}", table, positions) for number, table in enumerate(gathered.tables, start=1)]
    members = between_members(gathered.measurements)
    replicated = papers(gathered.comparisons, positions)
    figures = [item for panel in panels for _, items in panel.figures for item in items] + members
    figures += [item for paper in replicated for item in paper.figures]
    library = chart_library() if figures else ""
    style, script = _asset("style.css"), embeddable(_asset("script.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    return environment.from_string(_asset("template.html")).render(
        policy=_policy([style], [part for part in (library, script) if part]),
        style=Markup(style),
        script=Markup(script),
        library=Markup(library),
        version=__version__,
        facts=_facts(records),
        panels=panels,
        members=members,
        papers=replicated,
        flags=_flags(records),
        records=len(records),
        data=_data(figures, sources, results),
    )


def _panel(identifier: str, table: ResultsTable, positions: Mapping[str, int]) -> Panel:
    ranked = rank(table)
    drawn = [(title, tuple(draw(identifier, ranked))) for title, draw in _SECTIONS]
    images = sorted({record.n for record in table.records})
    spread = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    data = ", ".join(sorted({record.dataset for record in table.records}))
    about = f"{data}, {spread} test images, {len(table.records):,} cells, {len(ranked):,} models"
    about += f"; records of {', '.join(table.protocols)}." if table.protocols else "."
    if any(row.best for row in ranked):
        about += " Ranks are as fine as a paired test over images tells them; best: not told apart from the best."
    return Panel(
        identifier,
        table,
        about,
        build_board(ranked, positions),
        tuple(section for section in drawn if section[1]),
    )


def rank(table: ResultsTable) -> list[Standing]:
    """The models of a table, best worst case first; those of a leaderboard with ranks."""
    if table.kind == "leaderboard":
        return leaderboard.standings(table.records)
    return standings(table.records)


def _listed(names: Sequence[str]) -> str:
    """Names, or how many there are where nobody would read them."""
    return ", ".join(names) if len(names) <= LISTED else f"{len(names)}"


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    failed = sum(record.error is not None for record in records)
    facts = [
        ("protocols", _listed(sorted({str(record.provenance.get("protocol") or "") for record in records} - {""}))),
        ("cells", f"{len(records):,}" + (f", {failed:,} of them failed" if failed else "")),
        *((name, _versions(records, name)) for name in ("ensdef", "torch")),
        ("newest record", max((str(record.provenance.get("date", "")) for record in records), default="")[:10]),
    ]
    return [(name, value) for name, value in facts if value]


def _versions(records: Sequence[Record], package: str) -> str:
    found = {(record.provenance.get("versions") or {}).get(package) for record in records}
    return ", ".join(sorted(str(version) for version in found if version))


def _flags(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The flags that occur, in the catalogue's words where it knows them."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        for flag in record.flags:
            cells.setdefault((str(flag.get("severity")), str(flag.get("flag"))), []).append(flag)
    told = []
    for (severity, name), found in sorted(cells.items(), key=lambda item: (item[0][0] != "masking", item[0])):
        known = FLAGS.get(name)
        meaning, action = (known.meaning, known.action) if known else (found[0].get("meaning"), found[0].get("action"))
        told.append({"name": name, "severity": severity, "cells": len(found), "meaning": meaning, "action": action})
    return told


def _data(figures: Sequence[Figure], sources: Sequence[Record | Measurement], results: Path) -> dict[str, Any]:
    """What the script needs: specifications by figure, and drawers, in which shared groups of values are numbers."""
    groups: dict[str, int] = {}
    contents: list[Any] = []
    drawers = []
    for source in sources:
        told = drawer(source, results) if isinstance(source, Record) else measurement_drawer(source, results)
        numbers = []
        for group in told["groups"]:
            if repr(group) not in groups:
                groups[repr(group)] = len(contents)
                contents.append(group)
            numbers.append(groups[repr(group)])
        drawers.append({**told, "groups": numbers})
    return {
        "config": CONFIG,
        "figures": {figure.id: figure.spec for figure in figures},
        "groups": contents,
        "records": drawers,
    }


def _breakable(text: str) -> Markup:
    """A call with places where a narrow column may break it: before its brackets, after commas and equals signs."""
    return Markup("<wbr>").join(re.split(r"(?=\[)|(?<=[,=])(?=\S)", text))


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """A content security policy under which nothing runs, and nothing is fetched, but what we wrote into the page."""
    style = " ".join(map(_source, styles))
    script = " ".join(map(_source, scripts))
    ours = f"style-src {style}; script-src {script}; img-src data:"
    return f"default-src 'none'; {ours}; base-uri 'none'; form-action 'none'"


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    return files("ensdef.report").joinpath(name).read_text(encoding="utf-8")

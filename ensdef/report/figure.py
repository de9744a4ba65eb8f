"""A chart as data: a Vega-Lite specification without colours of its own, and the same numbers as a table.

Colours are the page's CSS variables, so that a chart follows its theme, on paper too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ensdef.records import Record

#: Distinguishable series; the rest of a chart's models are drawn alike.
SERIES = 8
COLOURS = tuple(f"var(--series-{number})" for number in range(1, SERIES + 1))
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

#: Look of every chart.
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--ink)",
        "titleFontWeight": 600,
        "titlePadding": 10,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "labelLimit": 240,
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "gridColor": "var(--line)",
    },
    "legend": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--ink)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "labelLimit": 240,
        "orient": "top",
        "symbolStrokeWidth": 2,
    },
    "header": {"labelColor": "var(--ink)", "titleColor": "var(--ink)"},
    "text": {"fill": "var(--ink)", "fontSize": 12},
}


@dataclass(frozen=True)
class Figure:
    """A chart, its text alternative and how to read it.

    Args:
        id: unique in the page, of letters, digits and hyphens.
        summary: the chart in a sentence, for those who cannot see it.
        headings, rows: the numbers drawn.
    """

    id: str
    title: str
    note: str
    summary: str
    spec: dict[str, Any]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def chart(summary: str, values: Sequence[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    """A specification as wide as the page leaves room for."""
    width = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"description": summary, "data": {"values": list(values)}, **width, **parts}


def tooltip(**fields: str) -> list[dict[str, str]]:
    """Fields of a datum, by what they are called: ``tooltip(model="defence")``."""
    return [{"field": field, "type": "nominal", "title": title} for field, title in fields.items()]


def quantity(field: str, title: str, **more: Any) -> dict[str, Any]:
    """An encoding of numbers along an axis."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def percentage(field: str, title: str, **more: Any) -> dict[str, Any]:
    """An encoding of percent, from 0 to 100."""
    return quantity(field, title, scale={"domain": [0, 100]}, **more)


def rounded(fraction: float) -> float:
    """A fraction in percent, to two decimals: what a chart can show."""
    return round(100 * fraction, 2)


def family(record: Record) -> tuple[str, str | None]:
    """What the records of one curve share: the attack and its norm."""
    return record.attack_label, record.norm

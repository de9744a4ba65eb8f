"""Robust accuracy against the radius."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ensdef.leaderboard import Standing
from ensdef.records import Record
from ensdef.report.drawers import percent
from ensdef.report.figure import COLOURS, DASHES, SERIES, Figure, chart, family, percentage, quantity, rounded, tooltip
from ensdef.report.standings import model_names
from ensdef.statistics import estimate

#: What stands for all models beyond those that colours tell apart.
OTHERS = "others"


def curves(name: str, ranked: Sequence[Standing]) -> list[Figure]:
    """Robust accuracy against the radius, for every attack that met models at several radii."""
    names = model_names(ranked)
    attacks = dict.fromkeys(family(record) for row in ranked for record in row.records if record.eps_value is not None)
    figures: list[Figure] = []
    for attack, norm in attacks:
        points: list[dict[str, Any]] = []
        for model, row in zip(names, ranked, strict=True):
            points += _curve(model, [record for record in row.records if family(record) == (attack, norm)])
        if len({point["eps"] for point in points if point["eps"] > 0}) > 1:
            figures.append(_curves(f"{name}-curves-{len(figures) + 1}", attack, norm, points))
    return figures


def _curve(model: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Points of one line, from the clean accuracy at radius 0; nothing for a model met at one radius."""
    by_eps: dict[float, list[Record]] = {}
    for record in records:
        if record.error is None and record.eps_value is not None:
            by_eps.setdefault(record.eps_value, []).append(record)
    if len(by_eps) < 2:
        return []
    found = {eps: estimate([record.outcomes["robust"] for record in met]) for eps, met in by_eps.items()}
    if 0.0 not in found:
        found[0.0] = estimate([record.outcomes["clean"] for record in next(iter(by_eps.values()))])
    return [
        {
            "model": model,
            "eps": eps,
            "accuracy": rounded(here.mean),
            "low": max(rounded(here.mean - here.stderr), 0.0),
            "high": min(rounded(here.mean + here.stderr), 100.0),
            "told": f"{percent(here.mean)} ± {percent(here.stderr)} %",
        }
        for eps, here in sorted(found.items())
    ]


def _curves(identifier: str, attack: str, norm: str | None, points: list[dict[str, Any]]) -> Figure:
    models = list(dict.fromkeys(point["model"] for point in points))
    shown = models[:SERIES]
    domain = shown + ([OTHERS] if len(models) > SERIES else [])
    colours = [*COLOURS[: len(shown)], "var(--muted)"][: len(domain)]
    dashes = [*DASHES[: len(shown)], [1, 2]][: len(domain)]
    for point in points:
        point["series"] = point["model"] if point["model"] in shown else OTHERS
        point["colour"] = colours[domain.index(point["series"])]
    summary = f"Robust accuracy of {len(models)} models under {attack} in {norm}, against the radius."
    x = quantity("eps", f"eps ({norm})")
    series = {"field": "series", "type": "nominal", "title": None}
    colour = {**series, "scale": {"domain": domain, "range": colours}}
    # named in the data: a second scale would have a second legend, or with the first one none
    filled = {"fill": {"field": "colour", "type": "nominal", "scale": None}, "detail": {"field": "model"}}
    spec = chart(
        summary,
        points,
        height=360,
        encoding={"x": x},
        layer=[
            {
                "transform": [{"filter": f"datum.series !== '{OTHERS}'"}],
                "mark": {"type": "area", "opacity": 0.12, "aria": False},
                "encoding": {"y": percentage("low", "robust accuracy, %"), "y2": {"field": "high"}, **filled},
            },
            {
                "mark": {"type": "line", "strokeWidth": 2, "aria": False},
                "encoding": {
                    "y": percentage("accuracy", "robust accuracy, %"),
                    "stroke": colour,
                    "strokeDash": {**series, "scale": {"domain": domain, "range": dashes}},
                    "detail": {"field": "model"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
                "encoding": {
                    "y": percentage("accuracy", "robust accuracy, %"),
                    "tooltip": tooltip(model="defence", eps="eps", told="robust"),
                    **filled,
                },
            },
        ],
    )
    rows = tuple((point["model"], f"{point['eps']:g}", point["told"]) for point in points)
    note = "Bands are one standard error; at eps 0 stands the clean accuracy."
    title = f"Under {attack} in {norm}"
    return Figure(identifier, title, note, summary, spec, ("defence", "eps", "robust accuracy"), rows)

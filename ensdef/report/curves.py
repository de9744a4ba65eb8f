"""Robust accuracy against the radius."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ensdef.records import Record
from ensdef.report.drawers import percent
from ensdef.report.figure import COLOURS, DASHES, SERIES, Figure, chart, family, percentage, quantity, rounded, tooltip
from ensdef.report.standings import Standing, estimate, model_names


def curves(name: str, ranked: Sequence[Standing]) -> list[Figure]:
    """Robust accuracy against the radius, for every attack that met models at several radii."""
    names = model_names(ranked)
    attacks = dict.fromkeys(family(record) for row in ranked for record in row.records if record.eps_value is not None)
    figures = []
    for attack, norm in attacks:
        points = []
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
    for point in points:
        point["series"] = point["model"] if point["model"] in shown else "others"
    domain = shown + (["others"] if len(models) > SERIES else [])
    colours = [*COLOURS[: len(shown)], "var(--muted)"][: len(domain)]
    dashes = [*DASHES[: len(shown)], [1, 2]][: len(domain)]
    summary = f"Robust accuracy of {len(models)} models under {attack} in {norm}, against the radius."
    x = quantity("eps", f"eps ({norm})")
    colour = {"field": "series", "type": "nominal", "title": None, "scale": {"domain": domain, "range": colours}}
    shared = {"color": colour, "detail": {"field": "model"}}
    spec = chart(
        summary,
        points,
        height=360,
        encoding={"x": x},
        layer=[
            {
                "mark": {"type": "area", "opacity": 0.12, "aria": False},
                "encoding": {"y": percentage("low", "robust accuracy, %"), "y2": {"field": "high"}, **shared},
            },
            {
                "mark": {"type": "line", "strokeWidth": 2, "aria": False},
                "encoding": {
                    "y": percentage("accuracy", "robust accuracy, %"),
                    "strokeDash": {
                        "field": "series",
                        "type": "nominal",
                        "title": None,
                        "scale": {"domain": domain, "range": dashes},
                    },
                    **shared,
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
                "encoding": {
                    "y": percentage("accuracy", "robust accuracy, %"),
                    "tooltip": tooltip(model="defence", eps="eps", told="robust"),
                    **shared,
                },
            },
        ],
    )
    rows = tuple((point["model"], f"{point['eps']:g}", point["told"]) for point in points)
    note = "Bands are one standard error; at eps 0 stands the clean accuracy."
    title = f"Under {attack} in {norm}"
    return Figure(identifier, title, note, summary, spec, ("defence", "eps", "robust accuracy"), rows)

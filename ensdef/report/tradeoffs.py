"""What the worst case costs: clean accuracy, training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ensdef.leaderboard import Standing
from ensdef.report.drawers import percent
from ensdef.report.figure import Figure, chart, percentage, quantity, rounded, tooltip
from ensdef.report.standings import model_names

_TRAINED = ("trained on adversarial images", "trained on clean images")


def tradeoffs(name: str, ranked: Sequence[Standing]) -> list[Figure]:
    """The worst case against what it costs: clean accuracy, and training where records tell."""
    figures = []
    models = list(zip(model_names(ranked), ranked, strict=True))
    clean = [(model, row, 100 * row.clean.mean) for model, row in models if row.clean]
    figures.append(_tradeoff(f"{name}-cost-clean", "clean accuracy, %", "clean accuracy", clean, larger_is_better=True))
    for field, title in (("training_passes", "training, member passes"), ("training_seconds", "training, seconds")):
        known = [(model, row, getattr(row.costs, field)) for model, row in models]
        told = [(model, row, float(value)) for model, row, value in known if value is not None and value > 0]
        identifier = f"{name}-cost-{field.replace('_', '-')}"
        figures.append(_tradeoff(identifier, title, title, told, larger_is_better=False))
    return [figure for figure in figures if figure is not None]


def _tradeoff(
    identifier: str, axis: str, what: str, models: Sequence[tuple[str, Standing, float]], *, larger_is_better: bool
) -> Figure | None:
    points: list[dict[str, Any]] = [
        {
            "model": model,
            "cost": round(cost, 3),
            "worst": rounded(row.worst.mean),
            "low": max(rounded(row.worst.mean - row.worst.stderr), 0.0),
            "high": min(rounded(row.worst.mean + row.worst.stderr), 100.0),
            "trained": _TRAINED[0] if _adversarial(row) else _TRAINED[1],
            "told": f"{percent(row.worst.mean)} ± {percent(row.worst.stderr)} %",
            "told_cost": f"{cost:,.4g}",
        }
        for model, row, cost in models
        if row.worst
    ]
    if len(points) < 2:
        return None
    front = _front(points, -1 if larger_is_better else 1)
    for point in points:
        place = (point["cost"], point["worst"])
        point["number"] = f"{front.index(place) + 1}" if place in front else ""
    summary = f"Worst case of {len(points)} models against {what}."
    x = quantity("cost", axis, scale={"zero": False} if larger_is_better else {"type": "log"}, axis={"format": "~s"})
    spec = chart(
        summary,
        points,
        height=360,
        encoding={"x": x, "y": percentage("worst", "worst case, %")},
        layer=[
            {
                "mark": {"type": "rule", "stroke": "var(--muted)", "opacity": 0.5, "aria": False},
                "encoding": {"y": percentage("low", "worst case, %"), "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {
                    "color": {
                        "field": "trained",
                        "type": "nominal",
                        "title": None,
                        "scale": {"domain": list(_TRAINED), "range": ["var(--series-1)", "var(--series-2)"]},
                    },
                    "shape": {
                        "field": "trained",
                        "type": "nominal",
                        "title": None,
                        "scale": {"domain": list(_TRAINED), "range": ["circle", "square"]},
                    },
                    "tooltip": tooltip(model="defence", told="worst case", told_cost=what),
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 7, "dy": -8, "fontWeight": 600, "aria": False},
                "encoding": {"text": {"field": "number", "type": "nominal"}},
            },
        ],
    )
    rows = tuple((point["model"], point["told_cost"], point["told"]) for point in points)
    named = [
        f"{number} {', '.join(str(point['model']) for point in points if point['number'] == str(number))}"
        for number in range(1, len(front) + 1)
    ]
    note = f"Bars are one standard error. No model has better means in both than: {'; '.join(named)}."
    return Figure(identifier, f"Worst case against {what}", note, summary, spec, ("defence", what, "worst case"), rows)


def _front(points: Sequence[dict[str, Any]], sign: int) -> list[tuple[float, float]]:
    """Costs and worst cases that no point beats in both, from the best worst case down.

    Args:
        sign: 1 where a small cost is good, -1 where a large one is.
    """
    front: list[tuple[float, float]] = []
    places = {(point["cost"], point["worst"]) for point in points}
    for cost, worst in sorted(places, key=lambda place: (-place[1], sign * place[0])):
        if not front or sign * cost < sign * front[-1][0]:
            front.append((cost, worst))
    return front


def _adversarial(row: Standing) -> bool:
    return any(record.training.get("eps") is not None for record in row.records)

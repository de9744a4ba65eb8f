"""What the worst case costs: clean accuracy, training."""

from __future__ import annotations

from collections.abc import Sequence

from ensdef.report.drawers import percent
from ensdef.report.figure import Figure, chart, percentage, quantity, rounded, tooltip
from ensdef.report.standings import Standing, model_names

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
    points = [
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
    sign = -1 if larger_is_better else 1
    for point in points:
        beaten = any(
            sign * other["cost"] <= sign * point["cost"]
            and other["worst"] >= point["worst"]
            and (other["cost"], other["worst"]) != (point["cost"], point["worst"])
            for other in points
        )
        point["label"] = "" if beaten else point["model"]
    summary = f"Worst case of {len(points)} models against {what}."
    x = quantity("cost", axis, scale={"zero": False, "nice": True} if larger_is_better else {"type": "log"})
    encoding = {
        "x": x,
        "y": percentage("worst", "worst case, %"),
        "color": {
            "field": "trained",
            "type": "nominal",
            "title": None,
            "scale": {
                "domain": list(_TRAINED),
                "range": ["var(--series-1)", "var(--series-2)"],
            },
        },
    }
    spec = chart(
        summary,
        points,
        height=360,
        encoding=encoding,
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 1, "opacity": 0.5, "aria": False},
                "encoding": {"y": percentage("low", "worst case, %"), "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {
                    "shape": {
                        "field": "trained",
                        "type": "nominal",
                        "title": None,
                        "scale": {
                            "domain": list(_TRAINED),
                            "range": ["circle", "square"],
                        },
                    },
                    "tooltip": tooltip(model="defence", told="worst case", told_cost=what),
                },
            },
            {
                "mark": {"type": "text", "align": "right", "dx": -8, "dy": -8, "fontSize": 11, "aria": False},
                "encoding": {"text": {"field": "label", "type": "nominal"}, "color": {"value": "var(--ink)"}},
            },
        ],
    )
    rows = tuple((point["model"], point["told_cost"], point["told"]) for point in points)
    note = "Named are the models that no other beats in both. Bars are one standard error."
    return Figure(identifier, f"Worst case against {what}", note, summary, spec, ("defence", what, "worst case"), rows)


def _adversarial(row: Standing) -> bool:
    return any(record.training.get("eps") is not None for record in row.records)

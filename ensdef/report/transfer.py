"""Whether images crafted on one network fool another: between defences, and between the members of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ensdef.leaderboard import Standing
from ensdef.records import Record
from ensdef.report.drawers import percent
from ensdef.report.figure import Figure, chart, rounded, tooltip
from ensdef.report.standings import model_names
from ensdef.statistics import estimate

if TYPE_CHECKING:
    from ensdef.measurement import Measurement


def transfers(name: str, ranked: Sequence[Standing]) -> list[Figure]:
    """Accuracy of every model on images crafted on others, where the attack names its surrogates."""
    cells: list[dict[str, Any]] = []
    for order, (model, row) in enumerate(zip(model_names(ranked), ranked, strict=True)):
        by_surrogate: dict[str, list[Record]] = {}
        for record in row.records:
            if record.error is None and record.attack_params.get("surrogates"):
                by_surrogate.setdefault(_surrogate(record), []).append(record)
        for surrogate, met in by_surrogate.items():
            here = estimate([record.outcomes["robust"] for record in met])
            told = f"{percent(here.mean)} ± {percent(here.stderr)} %"
            cells.append(
                {"model": model, "order": order, "surrogate": surrogate, "kept": rounded(here.mean), "told": told}
            )
    if not cells:
        return []
    summary = "Accuracy of each defence, in rows, on images crafted on other ensembles, in columns."
    return [
        Figure(
            f"{name}-transfer",
            "On images crafted on hold-out ensembles",
            "Accuracy in percent on images crafted on the ensemble named above; darker is more robust.",
            summary,
            heat_map(summary, cells, "model", "surrogate", "kept", "defence", "crafted on"),
            ("defence", "crafted on", "accuracy"),
            tuple((cell["model"], cell["surrogate"], cell["told"]) for cell in cells),
        )
    ]


#: Shares of the images that two members get right (1) or wrong (0), and CCE's summaries (Bui et al., AAAI 2021).
_SHARES = {
    "T": "T",
    "nT": "nT",
    "a_single": "single member",
    "s11": "both right",
    "s10": "first right",
    "s01": "second right",
    "s00": "both wrong",
}


def between_members(measurements: Sequence[Measurement]) -> list[Figure]:
    """The measurements of transferability: a row a defence, means over training seeds."""
    rows: dict[str, list[Measurement]] = {}
    settings = [(one.dataset, one.architecture, one.call, one.norm, one.eps) for one in measurements]
    varying = [len(set(values)) > 1 for values in zip(*settings, strict=True)]
    for measurement, setting in zip(measurements, settings, strict=True):
        told = [value for value, varies in zip(setting, varying, strict=True) if varies]
        rows.setdefault(", ".join(str(part) for part in (measurement.label, *told) if part), []).append(measurement)
    cells: list[dict[str, Any]] = []
    for order, (model, found) in enumerate(rows.items()):
        for name, column in _SHARES.items():
            values = [value for value in (one.values.get(name) for one in found) if value is not None]
            if values:
                mean = sum(values) / len(values)
                cell = {"model": model, "order": order, "share": column, "value": rounded(mean)}
                cells.append({**cell, "told": f"{percent(mean)} %"})
    if not cells:
        return []
    summary = "How adversarial images of one member fare with the others, for each defence."
    return [
        Figure(
            "members-transfer",
            "Both members, one, or neither",
            "Percent of the images; T and nT as CCE defines them: how many carry over, and how many do not.",
            summary,
            heat_map(summary, cells, "model", "share", "value", "defence", "images"),
            ("defence", "images", "share"),
            tuple((str(cell["model"]), str(cell["share"]), str(cell["told"])) for cell in cells),
        )
    ]


def heat_map(
    summary: str, cells: Sequence[dict[str, Any]], row: str, column: str, value: str, rows: str, columns: str
) -> dict[str, Any]:
    """Cells with an ``order`` of rows, a ``told`` text and values from 0 to 100."""
    return chart(
        summary,
        cells,
        height=26 * len({cell[row] for cell in cells}),
        encoding={
            "y": {"field": row, "type": "nominal", "title": None, "sort": {"field": "order", "op": "min"}},
            "x": {
                "field": column,
                "type": "nominal",
                "title": columns,
                "sort": None,
                "axis": {"orient": "top", "labelAngle": 0, "labelLimit": 160},
            },
        },
        layer=[
            {
                "mark": {"type": "rect", "fill": "var(--heat)", "stroke": "var(--surface)", "strokeWidth": 2},
                "encoding": {
                    "fillOpacity": {
                        "field": value,
                        "type": "quantitative",
                        "scale": {"domain": [0, 100], "range": [0.04, 0.55]},
                        "legend": None,
                    },
                    "tooltip": tooltip(**{row: rows, column: columns, "told": "accuracy"}),
                },
            },
            {
                "mark": {"type": "text", "aria": False},
                "encoding": {"text": {"field": value, "type": "quantitative", "format": ".1f"}},
            },
        ],
    )


def _surrogate(record: Record) -> str:
    params = record.attack_params
    surrogates, members = params["surrogates"], params.get("members", ())
    listed = " + ".join(map(str, surrogates if isinstance(surrogates, list | tuple) else [surrogates]))
    sizes = "+".join(map(str, members if isinstance(members, list | tuple) else [members]))
    return f"{listed}, {sizes} members" if sizes else listed

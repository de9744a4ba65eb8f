"""Which view of an ensemble, or which part of an attack, broke how many images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ensdef.leaderboard import Standing
from ensdef.records import Record
from ensdef.report.drawers import percent
from ensdef.report.figure import COLOURS, Figure, chart, family, percentage, rounded, tooltip
from ensdef.report.standings import model_names

#: Parts of an attack told apart in a chart; the rest is drawn as one.
PARTS = 7
STANDING, ALREADY_WRONG, OTHER = "still right", "wrong before the attack", "other parts"


def breakdowns(name: str, ranked: Sequence[Standing]) -> list[Figure]:
    """Which part of each attack broke how many images: bars that end with the images that stayed right."""
    attacks = dict.fromkeys(family(record) for row in ranked for record in row.records if record.broken_by)
    return [
        figure
        for number, attack in enumerate(attacks, start=1)
        if (figure := _breakdown(f"{name}-broken-{number}", attack, ranked)) is not None
    ]


def part_kind(part: str) -> str:
    """A part without the number of its member: ``"fool member2, have it chosen (1)"`` is done for each of them."""
    return re.sub(r"\bmember\d+", "one member", re.sub(r"\s*\(\d+\)$", "", part))


def _breakdown(identifier: str, attack: tuple[str, str | None], ranked: Sequence[Standing]) -> Figure | None:
    shares = []
    for order, (model, row) in enumerate(zip(model_names(ranked), ranked, strict=True)):
        met = [record for record in row.records if family(record) == attack and record.error is None]
        if met:
            shares.append((order, model, _shares(met)))
    totals: dict[str, float] = {}
    for _, _, share in shares:
        for kind, value in share.items():
            if kind not in (STANDING, ALREADY_WRONG):
                totals[kind] = totals.get(kind, 0.0) + value
    if len(totals) < 2 or not any(totals.values()):  # one part tells nothing that the leaderboard does not
        return None
    leading = [kind for kind, total in sorted(totals.items(), key=lambda item: -item[1]) if total][:PARTS]
    domain = [*leading, OTHER, STANDING, ALREADY_WRONG]
    bars: list[dict[str, Any]] = []
    for order, model, share in shares:
        told = {kind: share.get(kind, 0.0) for kind in leading}
        told[OTHER] = sum(value for kind, value in share.items() if kind not in {*leading, STANDING, ALREADY_WRONG})
        told |= {kind: share.get(kind, 0.0) for kind in (STANDING, ALREADY_WRONG)}
        bars += [
            {
                "model": model,
                "order": order,
                "part": kind,
                "rank": domain.index(kind),
                "share": rounded(value),
                "told": f"{percent(value)} %",
            }
            for kind, value in told.items()
            if value
        ]
    drawn = {bar["part"] for bar in bars}
    domain = [kind for kind in domain if kind in drawn]
    summary = f"For each defence, the share of images that each part of {attack[0]} broke and the share still right."
    return Figure(
        identifier,
        f"Under {' in '.join(part for part in attack if part)}",
        "Each part met the images that the parts before it had left; names are those of the records.",
        summary,
        _bars(summary, bars, domain),
        ("defence", "part", "images"),
        tuple((bar["model"], bar["part"], bar["told"]) for bar in bars),
    )


def _shares(records: Sequence[Record]) -> dict[str, float]:
    """Fractions of the images by what became of them, over training seeds; they sum to 1."""
    images = sum(record.n for record in records)
    counts: dict[str, int] = {}
    for record in records:
        for part, count in record.broken_by.items():
            counts[part_kind(part)] = counts.get(part_kind(part), 0) + count
    robust = sum(sum(record.outcomes["robust"]) for record in records)
    wrong = sum(record.n - sum(record.outcomes["clean"]) for record in records)
    # what no part is credited with fell in the recount of the whole attack
    counts[OTHER] = max(images - robust - wrong - sum(counts.values()), 0)
    counts |= {STANDING: robust, ALREADY_WRONG: wrong}
    return {kind: count / images for kind, count in counts.items()}


def _bars(summary: str, bars: Sequence[dict[str, Any]], domain: Sequence[str]) -> dict[str, Any]:
    fixed = {OTHER: "var(--muted)", STANDING: "var(--bar)", ALREADY_WRONG: "var(--line)"}
    free: Iterator[str] = iter(COLOURS)
    colours = [fixed[kind] if kind in fixed else next(free) for kind in domain]
    return chart(
        summary,
        bars,
        height=22 * len({bar["model"] for bar in bars}),
        mark={"type": "bar", "stroke": "var(--surface)", "strokeWidth": 1},
        encoding={
            "y": {"field": "model", "type": "nominal", "title": None, "sort": {"field": "order", "op": "min"}},
            "x": {**percentage("share", "images, %"), "stack": "zero"},
            "color": {
                "field": "part",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(domain), "range": colours},
            },
            "order": {"field": "rank", "type": "quantitative"},
            "tooltip": tooltip(model="defence", part="broken by", told="images"),
        },
    )

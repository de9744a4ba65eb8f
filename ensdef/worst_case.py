"""What stays right under several attacks on one model, image by image; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ensdef.records import Record, with_outcomes


def worst_cases(records: Sequence[Record]) -> list[Record]:
    """For every model that met several attacks: the images that stay right under all of them."""
    return [worst_case(met) for met in met_together(records)]


def met_together(records: Sequence[Record]) -> list[list[Record]]:
    """Records of one model on the same images; radius by radius where it was attacked at several of one norm, since
    there the largest alone would decide.
    """
    models: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.error is None and "key" in record.training:
            models.setdefault((record.label, record.training["key"], record.combiner), []).append(record)
    groups: list[list[Record]] = []
    for met in models.values():
        radii = {(record.norm, record.eps_value) for record in met}
        if len({norm for norm, _ in radii}) == len(radii):
            groups.append(met)
            continue
        for radius in sorted(radii, key=str):
            groups.append([record for record in met if (record.norm, record.eps_value) == radius])
    return [
        met
        for met in groups
        if len(met) > 1 and all(record.outcomes["ids"] == met[0].outcomes["ids"] for record in met)
    ]


def worst_case(met: Sequence[Record]) -> Record:
    """One record for several on the same images: an image is robust that is so in all of them; costs add up."""
    robust = [min(images) for images in zip(*(record.outcomes["robust"] for record in met), strict=True)]
    label = " + ".join(f"{record.attack_label}{f' {record.norm}' if record.norm else ''}" for record in met)
    cost = {name: sum(getattr(record, name) for record in met) for name in ("seconds", "forwards", "backwards")}
    one = len({(record.norm, record.eps_value) for record in met}) == 1
    blank = dataclasses.replace(
        met[0],
        attack="worst_case",
        attack_label=f"worst of {label}",
        norm=met[0].norm if one else None,
        eps=met[0].eps if one else None,
        path=None,
        flags=[],
        **cost,
    )
    return with_outcomes(blank, met[0].outcomes["ids"], met[0].outcomes["clean"], robust)

"""Results folders for the report: small records with known numbers, and texts that would break a careless page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ensdef.keys import content_key
from ensdef.records import Record, Store, with_outcomes

#: Texts as a record may hold them that was not written by this project.
HOSTILE = (
    "<script>window.broken = 1</script>",
    '"><img src=x onerror="window.broken = 1">',
    "</script><script>window.broken = 1</script><!--",
    "{{ 7 * 7 }}{% raw %}",
    "'; window.broken = 1; //",
    "<b>ü\u2028</b>&amp;",
)
MASKING = {
    "flag": "zero_gradient",
    "severity": "masking",
    "value": 0.25,
    "threshold": 0.001,
    "meaning": "the gradient is exactly zero on images that it should fool",
    "action": "attack with scores alone",
}
INFO = {**MASKING, "flag": "uncertain", "severity": "info", "meaning": "too few images", "action": "attack more"}


def record(
    label: str = "nat",
    robust: tuple[int, ...] = (1, 0, 1, 0),
    clean: tuple[int, ...] = (1, 1, 1, 0),
    attack: str = "pgd",
    **changes: Any,
) -> Record:
    """A finished record over as many images as there are outcomes; its key follows from all the rest."""
    fields: dict[str, Any] = {
        "key": "",
        "method": label.partition("[")[0],
        "hyper": {"weight": 2.0},
        "label": label,
        "dataset": "digits",
        "architecture": "small_resnet",
        "members": 3,
        "train_seed": 0,
        "training": {"key": "", "eps": "0.2", "norm": "linf", "recipe": {"epochs": 10}, "deviations": []},
        "attack": attack.partition("[")[0],
        "attack_params": {"steps": 50},
        "attack_label": attack,
        "success": "any",
        "norm": "linf",
        "eps": "0.2",
        "eps_value": 0.2,
        "combiner": "native",
        "n": len(clean),
        "seconds": 1.25,
        "forwards": 30.5,
        "backwards": 29.0,
        "provenance": {
            "protocol": "toy-v1",
            "date": "2026-01-02T03:04:05+00:00",
            "versions": {"ensdef": "0.1.0", "torch": "2.15.0"},
        },
    }
    made = with_outcomes(Record(**{**fields, **changes}), list(range(len(clean))), list(clean), list(robust))
    return dataclasses.replace(made, key=content_key(dataclasses.asdict(made)))


def failed(label: str, error: str, **changes: Any) -> Record:
    """A cell that gave no number."""
    return dataclasses.replace(
        record(label, **changes), clean_accuracy=None, robust_accuracy=None, stderr=None, outcomes={}, error=error
    )


def write_table(results: Path, name: str, records: Iterable[Record], title: str = "", kind: str = "grid") -> Path:
    """Store records and the manifest that makes them a table; returns the results folder."""
    paths = [Path(str(Store(results).write(one).path)).relative_to(results).as_posix() for one in records]
    manifest = results / "manifests" / f"{name}.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"title": title or name, "records": paths, "kind": kind}), encoding="utf-8")
    return results


def models() -> list[Record]:
    """Four models under two attacks, one of them at three radii; worst cases 3/4, 1/2, 1/4 and 0."""
    made = []
    rows = {
        "adv_en": ((1, 1, 1, 0), (1, 1, 1, 0)),
        "soe[sigma=1]": ((1, 1, 0, 0), (1, 1, 1, 0)),
        "adp": ((1, 0, 0, 0), (1, 1, 0, 0)),
        "nat": ((0, 0, 0, 0), (0, 0, 0, 0)),
    }
    for label, (suite, pgd) in rows.items():
        changes: dict[str, Any] = {}
        if label == "nat":
            changes = {"training": {"key": "", "eps": None, "recipe": {"epochs": 10}, "deviations": []}}
        broken = {"predict, margin": 3 - sum(suite), "fool member1 (2)": 0}
        flags = [MASKING, INFO] if label == "adp" else [INFO] if label == "nat" else []
        made.append(record(label, suite, attack="suite", broken_by=broken, flags=flags, **changes))
        for eps in (0.1, 0.2, 0.3):
            robust = pgd if eps <= 0.2 else suite
            made.append(record(label, robust, eps=str(eps), eps_value=eps, **changes))
    return made

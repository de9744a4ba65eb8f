"""Records made by hand, one a defence, attack and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ensdef.keys import content_key
from ensdef.records import Record, with_outcomes


def measured(
    method: str,
    attack: str,
    robust: Sequence[int],
    seed: int = 0,
    clean: Sequence[int] | None = None,
    **changes: Any,
) -> Record:
    """A finished record; clean outcomes are all right unless given."""
    fields: dict[str, Any] = {
        "method": method.partition("[")[0],
        "hyper": {},
        "label": method,
        "dataset": "digits",
        "architecture": "small_resnet",
        "members": 3,
        "train_seed": seed,
        "training": {"key": f"{method} {seed}", "eps": "0.2"},
        "attack": attack.partition("[")[0],
        "attack_params": {},
        "attack_label": attack,
        "success": "any",
        "norm": "linf",
        "eps": "0.2",
        "eps_value": 0.2,
        "combiner": "native",
        "n": len(robust),
        "provenance": {"protocol": "board-v1", "subset_checksum": "ab"},
        **changes,
    }
    told = [fields[name] for name in ("label", "architecture", "members", "combiner", "norm", "eps", "train_seed")]
    blank = Record(key=content_key([*told, attack]), **fields)
    return with_outcomes(blank, list(range(len(robust))), list(clean or [1] * len(robust)), list(robust))


def failed(method: str, attack: str, error: str, seed: int = 0, **changes: Any) -> Record:
    """A record of a cell that could not be run."""
    return dataclasses.replace(
        measured(method, attack, [0], seed, **changes),
        clean_accuracy=None,
        robust_accuracy=None,
        stderr=None,
        outcomes={},
        error=error,
    )

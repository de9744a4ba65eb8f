"""Canonical text and content keys, and calls with only what differs from the defaults."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def content_key(value: Any) -> str:
    """SHA-256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def checksum_of(body: Mapping[str, Any], name: str) -> str:
    """Content key of a file's JSON object without the entry ``name``, which is where the checksum itself is kept.

    Raises:
        ValueError: NaN or an infinity, which files of this project never hold.
    """
    return content_key({key: value for key, value in body.items() if key != name})


def non_default(cls: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters whose values are not the dataclass's defaults, in its order."""
    defaults = dataclasses.asdict(cls())
    # as text: a tuple comes back from JSON as a list
    return {key: value for key, value in params.items() if canonical(defaults[key]) != canonical(value)}

"""What a record read from a file must look like, so that nobody who reads it need doubt its fields. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ensdef.bounded import check_fields, safe_name
from ensdef.errors import UsageError


@dataclass(frozen=True)
class _Flag:
    flag: str
    severity: str
    meaning: str
    value: float
    action: str = ""
    threshold: float | None = None


@dataclass(frozen=True)
class _Training:
    key: str | None = None
    norm: str | None = None
    eps: str | None = None
    precision: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    deviations: list[str] = field(default_factory=list)
    limit: int | None = None


@dataclass(frozen=True)
class _Cost:
    parameters: float | None = None
    seconds: float | None = None
    passes: float | None = None
    peak_memory_mb: float | None = None
    multiplications: float | None = None


@dataclass(frozen=True)
class _Provenance:
    protocol: str | None = None
    also_in: list[str] = field(default_factory=list)
    attack_seed: int | None = None
    train_seed: int | None = None
    batch_size: int | None = None
    search: str | None = None
    subset_checksum: str | None = None
    health: str | None = None
    date: str | None = None
    device: str | None = None
    device_name: str | None = None
    git_commit: str | None = None
    devices: int | None = None
    threads: int | None = None
    versions: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None


def check_content(cls: type, body: Mapping[str, Any]) -> None:
    """Refuse fields of a record or of a measurement that no run writes.

    Args:
        cls: the dataclass that will be made of ``body``.
    Raises:
        UsageError: a value of another type, a name that would lead out of the results folder, numbers out of range.
    """
    check_fields(cls, body)
    # parts of paths
    for name in ("key", "dataset", "method", "attack", "name"):
        if isinstance(value := body.get(name), str):
            safe_name(value, name)
    for name in ("clean_accuracy", "robust_accuracy", "eps_value", "stderr", "seconds", "forwards", "backwards", "n"):
        value = body.get(name)
        if isinstance(value, int | float) and not 0 <= value <= (1 if name.endswith("accuracy") else 1e15):
            raise UsageError(
                f"{name} is {value}; expected a number {'in [0, 1]' if 'accuracy' in name else 'from 0 on'}"
            )
    _check_all(_Flag, body.get("flags", ()), "flag", needed=("flag", "severity", "meaning", "value"))
    _check_all(_Training, (body.get("training", {}),), "training")
    provenance = body.get("provenance", {})
    _check_all(_Provenance, (provenance,), "provenance")
    _check_all(_Cost, (provenance.get("training") or {},), "provenance: training")


def _check_all(cls: type, parts: Iterable[Mapping[str, Any]], owner: str, needed: Iterable[str] = ()) -> None:
    for part in parts:
        try:
            check_fields(cls, part)
        except UsageError as error:
            raise UsageError(f"{owner}: {error}") from error
        if missing := [name for name in needed if name not in part]:
            raise UsageError(f"a {owner} has no {missing[0]}")

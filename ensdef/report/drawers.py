"""A record, or a measurement, as its reader meets it: groups of named values, in plain words. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensdef.records import Record
from ensdef.report.standings import column_of

if TYPE_CHECKING:
    from ensdef.measurement import Measurement

#: Named values under a heading.
Pairs = list[tuple[str, str]]


def drawer(record: Record, results: Path) -> dict[str, Any]:
    """What stands in the drawer of a record; texts only, for JSON.

    Args:
        results: the folder that the record's path is told relative to.
    """
    return {
        "title": f"{record.label} under {column_of(record)}",
        "seed": "" if record.train_seed is None else f"seed {record.train_seed}",
        "told": "failed" if record.error else f"{percent(record.robust_accuracy)} ± {percent(record.stderr)} %",
        "error": record.error or "",
        "flags": [_flag(flag) for flag in record.flags],
        "groups": [
            (heading, pairs)
            for heading, pairs in (
                ("Result", _result(record)),
                ("Broken by", _broken_by(record)),
                ("Attack", _attack(record)),
                ("Defence", _defence(record)),
                ("Training", _training(record)),
                ("Provenance", _flat(record.provenance)),
            )
            if pairs
        ],
        "deviations": [str(why) for why in record.training.get("deviations", ())],
        "path": relative_path(record, results),
        "command": command(record),
    }


def measurement_drawer(measurement: Measurement, results: Path) -> dict[str, Any]:
    """The same of a measurement."""
    where = [("norm", measurement.norm), ("eps", measurement.eps), ("images (n)", measurement.n)]
    what = [(name, str(value)) for name, value in where if value is not None]
    trained = {key: value for key, value in measurement.training.items() if key != "deviations"}
    defence = [] if measurement.label is None else [("method", measurement.label), *_flat(measurement.hyper)]
    groups = (
        ("Result", _flat(measurement.values)),
        ("Measurement", [("measured", measurement.call), *what, *_flat(measurement.params)]),
        ("Defence", defence),
        ("Training", _flat(trained)),
        ("Provenance", _flat(measurement.provenance)),
    )
    return {
        "title": " of ".join(part for part in (measurement.call, measurement.label) if part),
        "seed": "" if measurement.train_seed is None else f"seed {measurement.train_seed}",
        "told": "",
        "error": measurement.error or "",
        "flags": [],
        "groups": [(heading, pairs) for heading, pairs in groups if pairs],
        "deviations": [str(why) for why in measurement.training.get("deviations", ())],
        "path": relative_path(measurement, results),
        "command": _protocol_command(measurement.provenance),
    }


def relative_path(source: Record | Measurement, results: Path) -> str:
    """Where a file is, seen from the results folder."""
    path = Path(str(source.path or ""))
    return path.relative_to(results).as_posix() if path.is_relative_to(results) else path.name


def command(record: Record) -> str:
    """The command that gives this record again."""
    if whole := _protocol_command(record.provenance):
        return whole
    options: dict[str, Any] = {
        "method": record.label,
        "attack": record.attack_label,
        "dataset": record.dataset,
        "arch": record.architecture,
        "members": record.members,
        "norm": record.norm,
        "eps": record.eps,
        "train-eps": record.training.get("eps"),
        "epochs": record.training.get("recipe", {}).get("epochs"),
        "combiner": None if record.combiner == "native" else record.combiner,
        "seed": record.train_seed,
        "samples": record.n,
    }
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return " ".join(["ensdef bench", *given])


def _protocol_command(provenance: Mapping[str, Any]) -> str:
    """The run of a protocol that makes this and its neighbours; empty where there was none."""
    name, _, version = str(provenance.get("protocol") or "").rpartition("-v")
    return f"ensdef run {shlex.quote(name)}" if name and version else ""


def percent(fraction: float | None) -> str:
    """``67.2``; a dash where there is no number."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _result(record: Record) -> Pairs:
    if record.error is not None:
        return []
    return [
        ("robust accuracy", f"{percent(record.robust_accuracy)} ± {percent(record.stderr)} %"),
        ("clean accuracy", f"{percent(record.clean_accuracy)} %"),
        ("images (n)", f"{record.n}"),
        ("success", "any point the attack tried" if record.success == "any" else record.success),
        ("passes an image", f"{record.forwards:,.0f} forward, {record.backwards:,.0f} backward"),
        ("seconds", f"{record.seconds:,.1f}"),
    ]


def _broken_by(record: Record) -> Pairs:
    broken = {part: count for part, count in record.broken_by.items() if count}
    idle = len(record.broken_by) - len(broken)
    pairs = [(part, f"{count} of {record.n}") for part, count in sorted(broken.items(), key=lambda item: -item[1])]
    return [*pairs, ("parts that broke no more", f"{idle}")] if idle else pairs


def _attack(record: Record) -> Pairs:
    head = [("attack", record.attack_label), ("norm", record.norm), ("eps", record.eps), ("combiner", record.combiner)]
    return [(name, str(value)) for name, value in head if value is not None] + _flat(record.attack_params)


def _defence(record: Record) -> Pairs:
    return [
        ("method", record.label),
        ("data", record.dataset),
        ("members", f"{record.members} x {record.architecture}"),
        *_flat(record.hyper),
    ]


def _training(record: Record) -> Pairs:
    told = {key: value for key, value in record.training.items() if key != "deviations"}
    adversarial = told.get("eps") is not None
    return [("on adversarial images", "yes" if adversarial else "no"), *_flat(told)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Pairs:
    """Nested mappings as ``outer.inner``; what is None is left out."""
    pairs: Pairs = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            pairs.append((f"{prefix}{name}", _text(value)))
    return pairs


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(part) for part in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flag(flag: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": str(flag.get("flag", "")),
        "severity": str(flag.get("severity", "info")),
        "meaning": str(flag.get("meaning", "")),
        "action": str(flag.get("action", "")),
        "value": _text(flag.get("value", "")),
    }

"""A trained defence on disk: ``weights.safetensors`` and ``spec.json`` in one folder. Nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ensdef.bounded import DESCRIPTION, check_fields, read_json
from ensdef.build import build_defense
from ensdef.defense import EnsembleDefense
from ensdef.errors import CheckpointError, ForeignCheckpoint, UsageError
from ensdef.network_size import check_buildable, refuse_other_shapes, shapes_in
from ensdef.records import write_bytes
from ensdef.specs import DataSpec, ModelSpec, Setting, TrainSpec

WEIGHTS = "weights.safetensors"
SPEC = "spec.json"
LAST_GOOD = "last_good.safetensors"


def checkpoint_folder(results: Path, spec: TrainSpec) -> Path:
    """Where a training's weights live."""
    return results / "checkpoints" / f"{spec.method}-{spec.key[:16]}"


def save_checkpoint(folder: Path, defense: EnsembleDefense, spec: TrainSpec, report: Mapping[str, Any]) -> None:
    """Write weights, then the description that makes them valid; ``report`` is what the trainer has to tell."""
    weights = packed(defense.state_dict())
    write_bytes(folder / WEIGHTS, weights)
    _save_description(folder, spec, report, weights)


def save_last_good(folder: Path, weights: bytes, spec: TrainSpec, reason: str) -> Path:
    """Keep the last good epoch of a training that broke, loadable but not complete; returns its path."""
    write_bytes(folder / LAST_GOOD, weights)
    _save_description(folder, spec, {"broken": reason}, weights)
    return folder / LAST_GOOD


def _save_description(folder: Path, spec: TrainSpec, report: Mapping[str, Any], weights: bytes) -> None:
    description = {
        "format": 1,
        **spec.describe(),
        "report": _finite(dict(report)),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    description["sha256"] = description_checksum(description)
    write_bytes(folder / SPEC, json.dumps(description, indent=1, sort_keys=True).encode())


def _finite(value: Any) -> Any:
    """JSON values with None in the place of what is no number of JSON, such as a loss that was never defined."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def description_checksum(description: Mapping[str, Any]) -> str:
    """SHA-256 of a checkpoint's description as it is read back, without the checksum itself."""
    body = json.loads(json.dumps({name: value for name, value in description.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def packed(weights: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file's bytes, contiguous and on the CPU."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})


def load_checkpoint(path: str | Path) -> EnsembleDefense:
    """Rebuild a trained defence: an ordinary module, images in [0, 1] -> (B, C) log-scores, CPU, eval mode.

    Args:
        path: the checkpoint's folder, or its weights file.
    Raises:
        CheckpointError: missing, truncated, a pickle, edited since it was saved, or weights that do not fit the
            description.
    """
    path = Path(path)
    folder, weights = (path.parent, path) if path.is_file() else (path, path / WEIGHTS)
    if not weights.is_file():
        raise CheckpointError(f"no checkpoint at {path}: expected a folder with {WEIGHTS} and {SPEC}")
    description = _description(folder)
    try:
        known = {field.name for field in dataclasses.fields(ModelSpec)}
        fields = {name: value for name, value in description["model"].items() if name in known}
        check_fields(ModelSpec, fields)
        for name in ("image_shape", "mean", "std"):
            fields[name] = tuple(fields[name])
        spec = ModelSpec(**fields)
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{folder / SPEC} does not describe a model ({error!r}); train it again") from error
    refuse_pickle(weights)
    try:
        check_buildable(spec, shapes_in(weights), weights)
        defense = build_defense(spec)
    except CheckpointError:
        raise
    except UsageError as error:
        raise CheckpointError(f"{folder / SPEC}: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:  # parameters of another version, values of another type
        raise CheckpointError(f"{folder / SPEC} does not describe a model ({error!r}); train it again") from error
    fit(defense, read_weights(weights), weights)
    _verify(weights, description)
    defense.training_key = description.get("key")
    report = description.get("report")
    defense.imported = report.get("imported") if isinstance(report, dict) else None
    return defense


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        CheckpointError: truncated, a pickle, or otherwise no safetensors file.
    """
    refuse_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}); delete it and train again"
        ) from error


def _verify(weights: Path, description: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the description; descriptions older than the checksum have none."""
    expected = description.get("weights_sha256")
    speaks_of = LAST_GOOD if _tells_of_a_break(description) else WEIGHTS
    if expected is not None and weights.name == speaks_of:
        found = _file_checksum(weights.resolve(), *file_version(weights))
        if found != expected:
            raise CheckpointError(
                f"{weights} is not the file that {SPEC} describes: its SHA-256 is {found[:16]}, expected "
                f"{str(expected)[:16]}; delete the folder and train again"
            )


def file_version(file: Path) -> tuple[int, int, int]:
    """Changes whenever a file is written."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=1024)
def _file_checksum(path: Path, *version: int) -> str:
    """SHA-256 of a file, read once a process for as long as it is the same ``version``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pickle(path: Path) -> None:
    """Refuse what ``torch.save`` writes.

    Raises:
        ForeignCheckpoint: it is a pickle, or a zip archive of one.
    """
    with path.open("rb") as file:
        head = file.read(9)
    # a safetensors file begins with a length of eight bytes, which may look like anything, and a brace
    if head[8:] != b"{" and (head[:1] == b"\x80" or head[:4] == b"PK\x03\x04"):
        raise ForeignCheckpoint(
            f"{path} is a pickle (torch.save); loading one can run code, so it is refused. "
            "`ensdef import-pth` reads tensors out of other people's files and nothing else"
        )


def fit(defense: EnsembleDefense, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Load ``weights`` into ``defense``; every name and shape must agree.

    Raises:
        CheckpointError: weights of another architecture, member count or number of classes.
    """
    own, found = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (defense.state_dict(), weights)
    )
    refuse_other_shapes(own, found, origin)
    with torch.no_grad():
        defense.load_state_dict(dict(weights))


def training_report(folder: Path) -> dict[str, Any]:
    """What the trainer told when it saved: seconds, history, device, versions."""
    return typing.cast(dict[str, Any], _description(folder).get("report", {}))


def data_spec(folder: Path) -> DataSpec:
    """The data set that a checkpoint's defence was trained on.

    Raises:
        CheckpointError: the description does not tell.
    """
    try:
        told = _description(folder)["setting"]["data"]
        known = {item.name for item in dataclasses.fields(DataSpec)}
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in told.items()
        }
        return DataSpec(**{name: value for name, value in fields.items() if name in known})
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / SPEC} does not describe a data set ({error!r}); train it again") from error


def training_spec(folder: Path) -> TrainSpec:
    """The training that a checkpoint says it is of, resolved anew by the code that is here.

    Its key is the one in the description unless that, or the method's code, was changed since.

    Raises:
        CheckpointError: the description does not tell.
        UsageError: what it names cannot be.
    """
    described = _description(folder)
    try:
        known = {item.name for item in dataclasses.fields(Setting)}
        fields = {name: value for name, value in described["setting"].items() if name in known}
        setting = Setting(**{**fields, "data": data_spec(folder)})
        return TrainSpec.create(described["model"]["method"], described["model"]["hyper"], setting)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / SPEC} does not describe a training ({error!r}); train it again") from error


def has_both_files(folder: Path) -> bool:
    """Whether weights and description are there (the description is written last)."""
    return (folder / SPEC).is_file() and (folder / WEIGHTS).is_file()


def is_complete(folder: Path, spec: TrainSpec) -> bool:
    """Whether the folder holds this training's finished weights.

    Raises:
        CheckpointError: the description was edited, or is none.
    """
    if not has_both_files(folder):
        return False
    description = _description(folder)
    # beside new weights there may still lie what was told when this training broke before
    return description.get("key") == spec.key and not _tells_of_a_break(description)


def _tells_of_a_break(description: Mapping[str, Any]) -> bool:
    report = description.get("report")
    return isinstance(report, Mapping) and "broken" in report


def _description(folder: Path) -> dict[str, Any]:
    if not (folder / SPEC).exists():
        raise CheckpointError(f"{folder / SPEC} is missing; a checkpoint is a folder with {WEIGHTS} and {SPEC}")
    try:
        content = read_json(folder / SPEC, DESCRIPTION)
    except UsageError as error:
        raise CheckpointError(f"{error}; delete the folder and train again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / SPEC} is no checkpoint description; delete the folder and train again")
    if "sha256" in content and content["sha256"] != description_checksum(content):
        raise CheckpointError(
            f"{folder / SPEC} was edited since it was saved (its checksum does not fit); delete the folder and train "
            "again"
        )
    return content

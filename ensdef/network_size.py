"""What a weights file holds, told without reading it, and whether a description may be built for it.

A description is a text that anybody may write; a network of any size could be asked for in it. The header of the
weights file bounds what it may ask: names and shapes are compared on torch's meta device, where tensors take no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ensdef.bounded import check_fields
from ensdef.build import build_defense
from ensdef.errors import CheckpointError, ForeignCheckpoint, UsageError
from ensdef.registry import ARCHITECTURES, METHODS
from ensdef.specs import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]

#: Whole numbers up to this one are allowed whatever the weights are: they cost seconds at most.
HARMLESS = 1024


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from a safetensors file's header; lengths and sizes are checked against the file.

    Raises:
        CheckpointError: truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}); delete it and train again"
        ) from error


def check_buildable(spec: ModelSpec, found: Shapes, origin: Path) -> None:
    """Refuse a description that asks for more than the weights have, before anything is allocated.

    Args:
        found: see :func:`shapes_in`.
        origin: the weights file, for messages.
    Raises:
        CheckpointError: numbers beyond the weights, or other names and shapes than theirs.
        UsageError: a method or an architecture that is not known, or a combination that they refuse.
        TypeError: parameters of another type than method and architecture have.
    """
    method, architecture = METHODS.get(spec.method), ARCHITECTURES.get(spec.architecture)
    try:
        check_fields(method.Hyper, spec.hyper)
        check_fields(architecture.Params, spec.architecture_params)
    except UsageError as error:
        raise TypeError(str(error)) from error
    most = max([HARMLESS, len(found), *(size for shape in found.values() for size in shape)])
    for name, number in _numbers(vars(spec)):
        if abs(number) > most:
            raise CheckpointError(f"{origin} belongs to another architecture: {name} is {number}, of which it has none")
    try:
        with torch.device("meta"):
            described = build_defense(spec)
    except (NotImplementedError, RuntimeError):  # a plug-in that looks at its own weights while it is built
        return
    refuse_other_shapes({name: tuple(tensor.shape) for name, tensor in described.state_dict().items()}, found, origin)


def refuse_other_shapes(own: Shapes, found: Shapes, origin: Path) -> None:
    """Every name and shape must agree.

    Raises:
        ForeignCheckpoint: weights of another architecture, member count or number of classes.
    """
    missing = sorted(set(own) - set(found))
    extra = sorted(set(found) - set(own))
    shapes = [
        f"{name} is {found[name]}, expected {own[name]}"
        for name in sorted(set(own) & set(found))
        if own[name] != found[name]
    ]
    if missing or extra or shapes:
        told = [
            *(f"missing {name}" for name in missing[:2]),
            *(f"unexpected {name}" for name in extra[:2]),
            *shapes[:2],
        ]
        count = len(missing) + len(extra) + len(shapes)
        raise ForeignCheckpoint(
            f"{origin} belongs to another architecture: {count} tensors differ ({'; '.join(told)}); put the weights "
            "back that belong there, or delete the folder to have them trained again"
        )


def _numbers(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers of a description, with their names."""
    for name, value in content.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, Mapping):
                yield from _numbers(one, f"{prefix}{name}.")
            elif isinstance(one, int) and not isinstance(one, bool):
                yield f"{prefix}{name}", one

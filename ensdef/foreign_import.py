"""Other people's weights as a checkpoint: read, fitted, written, and told apart from what was trained here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ensdef.build import build_defense
from ensdef.checkpoints import SPEC, WEIGHTS, packed
from ensdef.errors import UsageError
from ensdef.foreign import file_hash, read_foreign
from ensdef.foreign_layout import fitted, layout_of
from ensdef.records import write_bytes
from ensdef.specs import ModelSpec
from ensdef.weights import weights_hash


def import_weights(
    files: Sequence[Path],
    out: Path,
    method: str,
    hyper: Mapping[str, Any],
    architecture: str,
    members: int | None,
    num_classes: int,
    image_shape: tuple[int, int, int],
    normaliser: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> str:
    """Write a checkpoint with the weights of ``files`` in it; its key is that of the weights, not of a training.

    Args:
        files: one with all members, or one a member.
        members: None: as many as there are.
        normaliser: mean and standard deviation per channel, or one for all; None: the files have it inside.
    Returns:
        what was imported, in a sentence.
    Raises:
        CheckpointError: a file that is refused or damaged, or weights of another architecture.
        UsageError: no normaliser, or two.
    """
    layout = layout_of([read_foreign(path) for path in files])
    inside = None if layout.mean is None or layout.std is None else (layout.mean, layout.std)
    if inside is None and normaliser is None:
        raise UsageError(
            "the files have no normaliser inside; say with --mean and --std what the networks expect (0 and 1 if they "
            "take images in [0, 1] as they are)"
        )
    if inside is not None and normaliser not in (None, inside):
        raise UsageError(f"the files normalise by {inside}, and --mean and --std say {normaliser}; leave them out")
    mean, std = inside or normaliser or ((0.0,), (1.0,))
    spec = ModelSpec.create(
        method, hyper, architecture, members or len(layout.members), num_classes, image_shape, mean, std
    )
    with torch.device("meta"):  # shapes first: what does not fit costs no memory
        fitted(build_defense(spec).state_dict(), layout, mean, std)
    defense = build_defense(spec)
    defense.load_state_dict(fitted(defense.state_dict(), layout, mean, std))
    told = {
        "files": [{"name": path.name, "sha256": file_hash(path)} for path in files],
        "normaliser": "inside the files" if inside is not None else "told by the user",
    }
    description = {
        "format": 1,
        "key": weights_hash(defense),
        "model": dataclasses.asdict(spec),
        "report": {"imported": told},
    }
    write_bytes(out / WEIGHTS, packed(defense.state_dict()))
    write_bytes(out / SPEC, json.dumps(description, indent=1, sort_keys=True).encode())
    parameters = sum(parameter.numel() for parameter in defense.parameters())
    return (
        f"{spec.method_call}, {spec.members} x {spec.architecture_call}, {parameters:,} parameters from "
        f"{', '.join(path.name for path in files)}"
    )

"""Adversarial images crafted on one model and offered to others: made once, stored with what made them.

A set is ``adversarial_sets/<key>.json``, its manifest: surrogate, attack, radius, seed, images, and checksums of the
surrogate's weights and of the images' file, which is named ``<key>-<checksum>.safetensors``: should two processes craft
one set after all, either may win, on machines that round differently too. What no longer agrees is refused, or set
aside and made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ensdef.attack_spec import AttackSpec
from ensdef.bounded import DESCRIPTION, read_json
from ensdef.checkpoints import read_weights
from ensdef.claims import one_at_a_time
from ensdef.errors import DataError
from ensdef.keys import content_key
from ensdef.progress import Progress
from ensdef.records import write_bytes
from ensdef.registry import ATTACKS
from ensdef.session import Session
from ensdef.set_aside import whole
from ensdef.target import Target


class AdversarialSets:
    """The sets of one results folder; without a folder they are made and handed out, but not kept.

    Args:
        results: the folder.
        tell: is told of sets that were damaged, and are set aside and made again; None: they are refused.
    """

    def __init__(self, results: Path | None = None, tell: Callable[[str], None] | None = None) -> None:
        self.folder = None if results is None else results / "adversarial_sets"
        self.tell = tell

    def get(self, made_from: Mapping[str, Any], weights: str, make: Callable[[], Tensor]) -> Tensor:
        """The set that ``made_from`` describes, (N, ...); made and stored if there is none, by one process at a time.

        Args:
            made_from: everything that decides the set, JSON values.
            weights: checksum of the surrogate's weights.
        Raises:
            DataError: the stored set or its surrogate is not what the manifest says, or half of it is missing.
        """
        if self.folder is None:
            return make()
        name = content_key(made_from)[:16]
        manifest = self.folder / f"{name}.json"
        if (stored := self._stored(manifest, weights, None)) is not None:
            return stored
        with one_at_a_time(self.folder, name, self.tell or (lambda text: None)):
            if (stored := self._stored(manifest, weights, self.tell)) is not None:
                return stored
            made = make().cpu().contiguous()
            content = save({"x_adv": made})
            told = {**made_from, "weights": weights, "sha256": hashlib.sha256(content).hexdigest()}
            write_bytes(_images(manifest, told["sha256"]), content)
            write_bytes(manifest, json.dumps({"format": 1, **told}, indent=1, sort_keys=True).encode())
            return made

    def _stored(self, manifest: Path, weights: str, tell: Callable[[str], None] | None) -> Tensor | None:
        """The images of a manifest, if there is one; ``tell`` as in :func:`ensdef.set_aside.whole`."""
        if not manifest.is_file():
            return None

        def read() -> Tensor:
            tensors = read_weights(self._checked(manifest, weights))
            if "x_adv" not in tensors:
                raise DataError(
                    f"{manifest}: its file has no images; delete {manifest.name} to have the set crafted again"
                )
            return tensors["x_adv"]

        return read() if self.tell is None else whole(read, manifest, tell)

    def _checked(self, manifest: Path, weights: str) -> Path:
        """The images' file that a manifest speaks of."""
        remedy = f"delete {manifest.name} to have the set crafted again"
        try:
            told = read_json(manifest, DESCRIPTION)
            surrogate, checksum = told["weights"], bytes.fromhex(told["sha256"]).hex()
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{manifest} is no manifest of adversarial images ({error!r}); {remedy}") from error
        if surrogate != weights:
            raise DataError(
                f"{manifest}: crafted on a surrogate with weights {surrogate[:16]}, but the surrogate now has "
                f"{weights[:16]}; {remedy}, or restore the checkpoint"
            )
        images = _images(manifest, checksum)
        if not images.is_file():
            raise DataError(f"{manifest}: its images {images.name} are missing; {remedy}")
        if hashlib.sha256(images.read_bytes()).hexdigest() != checksum:
            raise DataError(f"{images} was altered since it was crafted (checksum differs from its manifest); {remedy}")
        return images


def _images(manifest: Path, checksum: str) -> Path:
    return manifest.with_name(f"{manifest.stem}-{checksum[:16]}.safetensors")


def craft(
    surrogate: nn.Module,
    spec: AttackSpec,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    *,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Tensor:
    """The last iterate of an attack on a surrogate for every image, right or wrong there, (N, ...) like ``x``."""
    attack = ATTACKS.get(spec.name)(spec.params_object)
    judge, target = Target(surrogate, fold=False, device=x.device), Target(surrogate, device=x.device)
    traits = judge.traits(x[:1])
    attack.fits(traits)
    session = Session(spec, judge, x, y, ids, batch_size, traits.num_classes)
    session.run(attack, target, torch.arange(len(x), device=x.device), progress or Progress(), f"{spec.call}, crafted")
    return session.x_adv

"""From a specification to a module, the same on every device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ensdef.architecture import ImageSpec, Network
from ensdef.defense import EnsembleDefense
from ensdef.registry import ARCHITECTURES, METHODS
from ensdef.specs import ModelSpec


def build_defense(spec: ModelSpec, seed: int = 0) -> EnsembleDefense:
    """An untrained defence on the CPU, in eval mode.

    Args:
        spec: method, architecture, members, image shape.
        seed: of the initial weights; the global random state is left as it was.
    Raises:
        UsageError: a combination that the method or the architecture refuses.
    """
    architecture = ARCHITECTURES.get(spec.architecture)
    params = architecture.Params(**spec.architecture_params)
    image = ImageSpec(spec.image_shape, spec.num_classes, spec.mean, spec.std)

    def make_network(outputs: int | None = None) -> Network:
        network: Network = architecture(replace(image, num_classes=outputs or image.num_classes), params)
        return network

    method = METHODS.get(spec.method)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        defense: EnsembleDefense = method.build(
            make_network, spec.members, spec.num_classes, method.Hyper(**spec.hyper)
        )
    defense.eval()
    defense.spec = spec
    return defense


def create_defense(
    method: str,
    *,
    architecture: str = "resnet20",
    members: int = 3,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.25,),
    seed: int = 0,
    **hyper: Any,
) -> EnsembleDefense:
    """An untrained defence by name.

    Args:
        method: registered name, such as ``"soe"``.
        architecture: of the members, such as ``"resnet20"`` or ``"resnet[depth=26]"``.
        members: number of members, for methods that do not fix it.
        num_classes: C.
        image_shape: (channels, height, width).
        mean, std: per channel (or one for all), for the normalisation inside the members.
        seed: of the initial weights.
        **hyper: the method's hyper-parameters.
    Returns:
        a module in eval mode: images in [0, 1], (B, *image_shape) -> (B, C) log-scores.
    Raises:
        UsageError: unknown name or parameter, or an impossible combination.
    """
    return build_defense(
        ModelSpec.create(method, hyper, architecture, members, num_classes, image_shape, mean, std), seed
    )

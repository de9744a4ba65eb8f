"""Improving Transferability of Adversarial Examples with Input Diversity (Xie, Zhang, Zhou, Bai, Wang, Ren, Yuille;
CVPR 2019, arXiv:1803.06978) with the momentum of Dong et al. (CVPR 2018, arXiv:1710.06081): M-DI2-FGSM.

The paper enlarges ImageNet's images and pads them to a fixed larger size. Networks for small images want their own
size, so here an image is shrunk to a random size and padded with zeros back to the size it had, at a random place. No
paper states the range of sizes for small images; ``resize_rate`` is that of torchattacks (28 to 31 pixels out of 32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ensdef.attacks._gradient import GradientAttack, GradientParams
from torch import Tensor

from ensdef.attack import register_attack
from ensdef.errors import UsageError
from ensdef.rng import KeyedRandom
from ensdef.target import Traits


@dataclass(frozen=True)
class MFgsmParams(GradientParams):
    """Settings of ``m_fgsm``: those of MIM, and the transform.

    Args:
        probability: of an image to be transformed at a step.
        resize_rate: smallest size, as a share of the height; drawn uniformly from there up to one pixel less than the
            height. The width is shrunk in proportion.
    """

    steps: int = 100
    random_start: bool = False
    decay: float = 1.0
    probability: float = 0.5
    resize_rate: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("probability", "resize_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1")


@register_attack("m_fgsm")
class MomentumDiverseInputs(GradientAttack):
    """Momentum steps along gradients of randomly shrunk and padded images; made for transfer."""

    Params = MFgsmParams

    def fits(self, traits: Traits) -> None:
        super().fits(traits)
        if len(traits.image_shape) != 3:
            raise UsageError(
                f"images are of shape {traits.image_shape}; shrinking them needs (channels, height, width)"
            )

    def shown(self, x_adv: Tensor, rng: KeyedRandom) -> Tensor:
        if not self.params.probability:
            return x_adv
        chosen = rng.uniform() < self.params.probability
        return shrunk_and_padded(x_adv, chosen, rng, self.params.resize_rate)


def shrunk_and_padded(x: Tensor, chosen: Tensor, rng: KeyedRandom, resize_rate: float) -> Tensor:
    """Every chosen image at a random smaller size (nearest neighbour), at a random place on black.

    Args:
        x: (B, C, H, W).
        chosen: (B,) bool; the others are returned as they are.
        rng: draws size and place of each image.
        resize_rate: smallest height as a share of H.
    Returns:
        images of the same size, with gradient to ``x``.
    """
    height, width = x.shape[2:]
    smallest = min(max(1, int(resize_rate * height)), max(1, height - 1))
    size = smallest + rng.integers(max(1, height - smallest))
    new_height = torch.where(chosen, size, height)
    new_width = torch.where(chosen, (size * width // height).clamp_min(1), width)
    rows, in_rows = _sources(height, new_height, rng)
    columns, in_columns = _sources(width, new_width, rng)
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    picked = x.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return picked * (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _sources(length: int, new_length: Tensor, rng: KeyedRandom) -> tuple[Tensor, Tensor]:
    """For every position of a padded line the pixel it shows, and whether it shows one, both (B, length)."""
    offset = (rng.uniform() * (length - new_length + 1)).long()
    position = torch.arange(length, device=new_length.device) - offset[:, None]
    inside = (position >= 0) & (position < new_length[:, None])
    source = (position * length).div(new_length[:, None], rounding_mode="floor")
    return source.clamp(0, length - 1), inside

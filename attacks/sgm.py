"""Skip Connections Matter: On the Transferability of Adversarial Examples Generated with ResNets (Wu, Wang, Xia,
Bailey, Ma; ICLR 2020, arXiv:2002.05990): the skip gradient method.

The forward pass stays as it is, bit for bit; in the backward pass the gradient through every residual branch is
multiplied by gamma, the gradient through the shortcut is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ensdef.attacks._gradient import GradientAttack, GradientParams
from torch import Tensor

from ensdef.architecture import ResidualBlock
from ensdef.attack import State, register_attack
from ensdef.errors import UsageError
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat


@dataclass(frozen=True)
class SgmParams(GradientParams):
    """Settings of ``sgm``: those of the base attack, which is BIM by default and MIM with ``decay=1``.

    Args:
        gamma: factor on the gradient through residual branches, in [0, 1]; 1: the base attack itself.
    """

    steps: int = 100
    random_start: bool = False
    gamma: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise UsageError(f"gamma is {self.gamma}; expected a factor from 0 to 1")


@register_attack("sgm")
class SkipGradientMethod(GradientAttack):
    """Gradient steps that trust shortcuts more than residual branches; made for transfer from residual networks."""

    Params = SgmParams
    random = False

    def fits(self, traits: Traits) -> None:
        super().fits(traits)
        if not traits.residual_branches:
            raise UsageError(
                "this attack scales the gradient through residual branches, and the model has none that can be found "
                "(ensdef.architecture.ResidualBlock); take a residual architecture such as resnet20, or another attack"
            )

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        with _branches_scaled(target.residual_blocks, self.params.gamma):
            moved: tuple[Tensor, State] = super().step(target, x_adv, y, state, threat, rng)
        return moved


@contextmanager
def _branches_scaled(blocks: Sequence[ResidualBlock], gamma: float) -> Iterator[None]:
    """The blocks with another factor, until the end of the step: the attack may look at the model in between."""
    before = [block.branch_scale for block in blocks]
    for block in blocks:
        block.branch_scale = gamma
    try:
        yield
    finally:
        for block, scale in zip(blocks, before, strict=True):
            block.branch_scale = scale

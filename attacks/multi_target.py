"""Improving Ensemble Robustness by Collaboratively Promoting and Demoting Adversarial Robustness (Bui, Le, Zhao,
Montague, deVel, Abraham, Phung; AAAI 2021): the multi-targeted attacks of its evaluation.

Once for every wrong class the base attack lowers the cross-entropy to it. Any wrong decision counts, also another class
than the one aimed at. An image that is never fooled costs (C - 1)(steps + 1) forward and (C - 1) steps backward passes
(189 and 180 for ten classes): every iterate is judged by the pass that gives its gradient, the last one of a run by a
pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ensdef.attacks._gradient import GradientAttack, GradientParams, Loss

from ensdef.attack import register_attack


@dataclass(frozen=True)
class MultiPgdParams(GradientParams):
    """PGD towards every wrong class; the paper takes 20 steps of a quarter of the radius (2/255 of 8/255)."""

    steps: int = 20
    step_size: str = "eps/4"
    loss: Loss = "targeted"


@dataclass(frozen=True)
class MultiBimParams(MultiPgdParams):
    """The same from the image itself."""

    random_start: bool = False


@dataclass(frozen=True)
class MultiMimParams(MultiBimParams):
    """The same with momentum."""

    decay: float = 1.0


@register_attack("mul_pgd")
class MultiPgd(GradientAttack):
    """PGD towards each wrong class in turn; fooled if any run changes the decision."""

    Params = MultiPgdParams


@register_attack("mul_bim")
class MultiBim(GradientAttack):
    """BIM towards each wrong class in turn."""

    Params = MultiBimParams
    random = False


@register_attack("mul_mim")
class MultiMim(GradientAttack):
    """MIM towards each wrong class in turn."""

    Params = MultiMimParams
    random = False

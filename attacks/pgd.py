"""Towards Deep Learning Models Resistant to Adversarial Attacks (Madry et al., ICLR 2018, arXiv:1706.06083): PGD, and
its relatives FGSM (Goodfellow et al., ICLR 2015, arXiv:1412.6572), BIM (Kurakin et al., 2017, arXiv:1607.02533) and
MIM (Dong et al., CVPR 2018, arXiv:1710.06081).
"""

from __future__ import annotations

from dataclasses import dataclass

from ensdef.attacks._gradient import GradientAttack, GradientParams

from ensdef.attack import register_attack


@dataclass(frozen=True)
class FgsmParams(GradientParams):
    """One step of the whole radius from the image itself."""

    steps: int = 1
    step_size: str = "eps"
    random_start: bool = False


@dataclass(frozen=True)
class BimParams(GradientParams):
    """PGD from the image itself."""

    steps: int = 20
    random_start: bool = False


@dataclass(frozen=True)
class MimParams(BimParams):
    """BIM with momentum; Dong et al. use a decay of 1."""

    decay: float = 1.0


@register_attack("pgd")
class Pgd(GradientAttack):
    """Projected gradient descent with random starts and restarts."""


@register_attack("fgsm")
class Fgsm(GradientAttack):
    """Fast gradient sign method: one step; a diagnostic, not an evaluation."""

    Params = FgsmParams
    random = False


@register_attack("bim")
class Bim(GradientAttack):
    """Basic iterative method: projected gradient steps without a random start."""

    Params = BimParams
    random = False


@register_attack("mim")
class Mim(GradientAttack):
    """Momentum iterative method: steps along accumulated, l1-normalised gradients."""

    Params = MimParams
    random = False

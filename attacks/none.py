"""No attack: what a table's clean column asks for."""

from __future__ import annotations

from torch import Tensor

from ensdef.attack import WholeAttack, register_attack
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat


@register_attack("none")
class NoAttack(WholeAttack):
    """The image itself, so that the robust accuracy is the clean one."""

    access = "decision"
    norms = ()
    budget = "none"
    random = False
    per_image = True

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        return x

"""Fog and snow, the weather that MoRE is evaluated under (Cheng, Xu, Wang, Kailkhura, Lin, Goldhahn; 2021,
arXiv:2104.10586) after Ozdag et al. (2019). Nothing is searched for: one transform of every image, without a budget;
the target is asked for its verdict alone.
"""

from __future__ import annotations

from torch import Tensor

from ensdef import weather
from ensdef.attack import WholeAttack, register_attack
from ensdef.recipe import Fog, Snow
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat


@register_attack("fog")
class FogAttack(WholeAttack):
    """The same fog over every image, without a depth map; nothing random."""

    Params = Fog
    access = "decision"
    norms = ()
    random = False
    budget = "none"
    per_image = True

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        return weather.fog(x, self.params.density, self.params.light)


@register_attack("snow")
class SnowAttack(WholeAttack):
    """Dark pixels turn bright; what counts as dark is drawn for each image."""

    Params = Snow
    access = "decision"
    norms = ()
    budget = "none"
    per_image = True

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        return weather.snow(x, rng.uniform(), self.params.brightness)

"""Sign Bits Are All You Need for Black-Box Attacks (Al-Dujaili and O'Reilly; ICLR 2020): SignHunter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from ensdef.attacks._queries import ProposalAttack, blocks, flip, spread
from torch import Tensor

from ensdef.attack import State, register_attack
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat


@dataclass(frozen=True)
class SignHunterParams:
    """Settings of SignHunter.

    Args:
        queries: questions a run; the first is about all signs positive. 500 reach blocks of about twelve coordinates
            of a CIFAR image.
        order: how images are flattened before they are cut into blocks: ``hwc`` (the channel runs fastest, as in the
            released code) or ``chw``.
    """

    queries: int = 500
    order: Literal["hwc", "chw"] = "hwc"

    def __post_init__(self) -> None:
        at_least("", queries=(self.queries, 1))


@register_attack("signhunter")
class SignHunter(ProposalAttack):
    """Flips blocks of signs, first the whole image, at last single coordinates; keeps what raises the margin."""

    Params = SignHunterParams
    random = False

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        signs = torch.ones_like(x)
        state = super().start(target, x, y, threat, rng)
        return {**state, "signs": signs, "tried": signs.clone(), "x_adv": x + threat.ascent(signs) * threat.eps}

    def propose(self, better: Tensor, state: State, threat: Threat, rng: KeyedRandom) -> tuple[Tensor, State]:
        x = state["x"]
        signs = torch.where(spread(better, x), state["tried"], state["signs"])
        bounds = blocks(x[0].numel(), x.device)
        # after the single coordinates it starts over with the whole image
        tried = flip(signs, bounds[(rng.step - 1) % len(bounds)], self.position(x))
        # in l2 all coordinates move by eps / sqrt(d)
        return x + threat.ascent(tried) * threat.eps, {**state, "signs": signs, "tried": tried}

    def position(self, x: Tensor) -> Tensor:
        """Place of every coordinate in the flattened image, of the shape of one image."""
        count = torch.arange(x[0].numel(), device=x.device)
        if self.params.order == "chw":
            return count.view(x.shape[1:])
        return count.view(*x.shape[2:], x.shape[1]).movedim(-1, 0)

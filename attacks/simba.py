"""Simple Black-box Adversarial Attacks (Guo, Gardner, You, Wilson, Weinberger; ICML 2019, arXiv:1905.07121): SimBA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from ensdef.attacks._queries import ProposalAttack, log_odds, require_planes, spread
from torch import Tensor

from ensdef.attack import State, register_attack
from ensdef.notation import at_least, relative
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import TINY, Threat


@dataclass(frozen=True)
class SimbaParams:
    """Settings of SimBA. The original has no ball; iGAT, which reports it in linf, states no settings.

    Args:
        queries: questions a run; the first is about the image itself, then at most two for each direction. A run
            ends sooner when every direction was tried.
        basis: the directions: single ``pixel`` values, or ``dct``: cosine waves of one channel.
        step_size: in image units, or in units of the radius. Directions have a largest value of 1 in linf and length
            1 in l2. Not given: ``eps`` in linf, so that a pixel that is taken goes to the face of the ball, and
            ``eps/10`` in l2, so that a hundred directions fill the ball (they are orthogonal).
    """

    queries: int = 5000
    basis: Literal["pixel", "dct"] = "pixel"
    step_size: str | None = None

    def __post_init__(self) -> None:
        at_least("", queries=(self.queries, 1))
        if self.step_size is not None:
            at_least("", step_size=(relative(self.step_size, 1.0, "step_size"), 0))

    def length(self, threat: Threat) -> float:
        """Length of a step in image units."""
        default = "eps/10" if threat.norm == "l2" else "eps"
        return relative(self.step_size or default, threat.eps, "step_size")


@register_attack("simba")
class Simba(ProposalAttack):
    """Tries directions of a basis in random order, plus then minus, and keeps what lowers the true probability."""

    Params = SimbaParams

    def fits(self, traits: Traits) -> None:
        if self.params.basis == "dct":
            require_planes("cosine waves", traits)

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        order = rng.bits(x[0].numel()).argsort(dim=1, stable=True)[:, : self.params.queries]
        before = torch.full_like(y, -1)
        return {
            **super().start(target, x, y, threat, rng),
            "order": order,
            # which direction is being tried, and which way; the image itself comes before the first
            "number": before,
            "way": before.to(x.dtype),
        }

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        odds: Tensor = log_odds(scores, y)
        return odds

    def propose(self, better: Tensor, state: State, threat: Threat, rng: KeyedRandom) -> tuple[Tensor, State]:
        best, order = state["best"], state["order"]
        following = better | (state["way"] < 0)
        number = state["number"] + following
        way = torch.where(following, 1.0, -1.0)
        done = number >= order.shape[1]
        chosen = order.gather(1, number.clamp(max=order.shape[1] - 1)[:, None])
        step = spread(way, best) * self.params.length(threat) * self.direction(chosen, best, threat.norm)
        return best + step, {**state, "number": number, "way": way, "done": done}

    def direction(self, chosen: Tensor, x: Tensor, norm: str | None) -> Tensor:
        """The basis vectors with the numbers ``chosen`` (B, 1), like ``x``."""
        spikes = torch.zeros_like(x).flatten(1).scatter(1, chosen, 1.0).view(x.shape)
        if self.params.basis == "pixel":
            return spikes
        height, width = x.shape[2:]
        waves = cosines(height, x.device).T @ spikes @ cosines(width, x.device)
        if norm == "linf":
            waves = waves / spread(waves.flatten(1).abs().amax(dim=1).clamp_min(TINY), x)
        return waves


def cosines(size: int, device: torch.device) -> Tensor:
    """Orthonormal cosine transform (DCT-II): row u is the wave of frequency u, (size, size)."""
    place = torch.arange(size, device=device, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves.to(torch.float32)

"""Prior Convictions: Black-Box Adversarial Attacks with Bandits and Priors (Ilyas, Engstrom, Madry; ICLR 2019,
arXiv:1807.07978).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from ensdef.attacks._queries import log_odds, positive, require_planes, spread
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ensdef.attack import IterativeAttack, State, register_attack
from ensdef.notation import at_least, relative
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat


@dataclass(frozen=True)
class BanditsParams:
    """Settings of Bandits with time and data priors. iGAT, which reports it, states none; step, probe, prior rate, grid
    and exploration are those of the configuration in its repository.

    Args:
        queries: questions a run, two a step. The look at the iterate that tells success is one more pass a step,
            which the paper does not count either.
        step_size: h, of the image; in image units, or in units of the radius.
        probe: eta, how far from the iterate the two questions are, in l2.
        prior_lr: step size of the prior.
        grid: rows and columns of the prior, at most those of the image (data prior).
        exploration: delta, how far the two probes are from the prior.
    """

    queries: int = 5000
    step_size: str = "0.01"
    probe: float = 0.01
    prior_lr: float = 0.1
    grid: int = 20
    exploration: float = 0.1

    def __post_init__(self) -> None:
        at_least("", queries=(self.queries, 2), grid=(self.grid, 1))
        at_least("", step_size=(relative(self.step_size, 1.0, "step_size"), 0))
        positive(probe=self.probe, prior_lr=self.prior_lr, exploration=self.exploration)


@register_attack("bandits")
class Bandits(IterativeAttack):
    """Ascent along a coarse estimate of the gradient, learnt from two scores a step and carried over between steps."""

    Params = BanditsParams
    access = "score"

    @property
    def steps(self) -> int:
        return int(self.params.queries) // 2

    def fits(self, traits: Traits) -> None:
        require_planes("the coarse gradients of bandits", traits)

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        channels, height, width = x.shape[1:]
        return {"prior": x.new_zeros(len(x), channels, min(self.params.grid, height), min(self.params.grid, width))}

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        size = list(x_adv.shape[2:])
        prior = self.learnt(target, x_adv, y, state["prior"], threat, rng)
        step = relative(self.params.step_size, threat.eps, "step_size")
        return x_adv + step * threat.ascent(interpolate(self.shown(prior, threat), size)), {"prior": prior}

    def learnt(self, target: Target, x: Tensor, y: Tensor, prior: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        """The prior after one pair of questions (Algorithms 2 and 3), like ``prior``.

        In linf the prior is kept as atanh(v): the exponentiated gradient step on v adds to it, and v never saturates.
        """
        noise = rng.normal(*prior.shape[1:]) / math.sqrt(prior[0].numel())
        shown = self.shown(prior, threat)
        losses = []
        for way in (1, -1):
            direction = interpolate(shown + way * self.params.exploration * noise, list(x.shape[2:]))
            length = spread(direction.flatten(1).norm(dim=1), x)
            scores = target(x + self.params.probe * direction / length).double()
            losses.append(nn.functional.softplus(log_odds(scores, y)))  # -log p_y, not rounded to 0 where p_y is near 1
        slope = ((losses[0] - losses[1]) / (self.params.probe * self.params.exploration)).to(x.dtype)
        slope = torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)
        learnt: Tensor = prior + self.params.prior_lr * spread(slope, x) * noise
        return learnt

    def shown(self, prior: Tensor, threat: Threat) -> Tensor:
        """The estimate v of the gradient on the coarse grid; within (-1, 1) in linf."""
        return prior if threat.norm == "l2" else torch.tanh(prior)

"""Towards Evaluating the Robustness of Neural Networks (Carlini, Wagner; IEEE S&P 2017, arXiv:1608.04644).

Two attacks go by this name in the literature on ensembles. ``variant=pgd`` is projected ascent on their margin loss.
``variant=min_norm`` is their linf attack as released with iGAT (Deng, Mu; NeurIPS 2023): a point in tanh space is moved
by Adam until it fools within tau, tau shrinks, and so on; every iterate is clipped to the ball and tested.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from ensdef.attacks._gradient import GradientAttack, GradientParams, Loss
from torch import Tensor

from ensdef.attack import Attack, CompositeAttack, IterativeAttack, State, register_attack, require_gradient
from ensdef.errors import UsageError
from ensdef.losses import margin
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat

#: Settings of the minimum-norm variant that iGAT's release fixes.
LEARNING_RATE, FIRST_CONSTANT, CONSTANTS, SHRINK, SMALLEST_TAU = 5e-3, 0.01, 5, 0.9, 1 / 256
#: Values of tau from 1 down to the smallest.
LEVELS = math.ceil(math.log(SMALLEST_TAU) / math.log(SHRINK))
#: Keeps black and white pixels at a finite place of tanh space.
INSIDE = 0.999999


@dataclass(frozen=True)
class CwParams(GradientParams):
    """Settings of ``cw``: those of PGD for ``variant=pgd``.

    Args:
        variant: ``pgd``: ascent on the margin in the ball; ``min_norm``: Carlini and Wagner's linf attack, of which
            only ``iterations`` and ``view`` can be set.
        iterations: of ``min_norm``, Adam steps at most for a pair of tau and constant.
    """

    loss: Loss = "margin"
    variant: Literal["pgd", "min_norm"] = "pgd"
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("", iterations=(self.iterations, 1))
        if self.variant == "pgd":
            return
        ignored = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("variant", "iterations", "view") and getattr(self, field.name) != field.default
        ]
        if ignored:
            raise UsageError(f"variant=min_norm takes iterations and view alone; drop {', '.join(ignored)}")


@register_attack("cw")
class CarliniWagner(CompositeAttack):
    """The margin of the best wrong class, raised by PGD or in the authors' own minimum-norm way."""

    Params = CwParams

    @classmethod
    def norms_for(cls, params: Any) -> tuple[str, ...]:
        return ("linf",) if params.variant == "min_norm" else cls.norms

    def fits(self, traits: Traits) -> None:
        for _, part in self.parts(traits):
            part.fits(traits)

    def parts(self, traits: Traits) -> Sequence[tuple[str, Attack]]:
        if self.params.variant == "min_norm":
            return [("cw, minimum norm", MinimumNorm(self.params))]
        return [("cw", GradientAttack(self.params))]


class MinimumNorm(IterativeAttack):
    """Adam on sum max(|delta| - tau, 0) + c max(-margin, 0) over a point in tanh space.

    Every image walks through levels of tau, beginning at 1. A level tries constants c, each ten times the one before,
    until an iterate fools within tau; tau becomes 0.9 max |delta|, and the next level begins there. A level that is
    lost ends the image. The harness clips every iterate to the ball and tests it, which takes a forward pass beside the
    one that moves the point; the image also ends when that succeeds.
    """

    Params = CwParams
    norms = ("linf",)
    random = False

    @property
    def steps(self) -> int:
        return LEVELS * CONSTANTS * int(self.params.iterations)

    def fits(self, traits: Traits) -> None:
        require_gradient(self.params.view, traits)

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        place = _to_tanh_space(x)
        ones, zeros = torch.ones(len(x), device=x.device), torch.zeros(len(x), device=x.device)
        return {
            "clean": x,
            "place": place,
            "origin": place,  # where every constant of the level begins
            "closest": x,  # the nearest point that fooled
            "tau": ones,
            "constant": ones * FIRST_CONSTANT,
            "trial": zeros,
            "iteration": zeros,
            "first_moment": torch.zeros_like(x),
            "second_moment": torch.zeros_like(x),
        }

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        state = dict(state)
        place = state["place"].detach().requires_grad_()
        point = _from_tanh_space(place)
        gap = margin(target.views[self.params.view](point), y)
        outside = ((point - state["clean"]).abs() - _wide(state["tau"], point)).clamp_min(0).flatten(1).sum(dim=1)
        loss = outside + state["constant"] * (-gap).clamp_min(0)
        gradient = torch.nan_to_num(torch.autograd.grad(loss.sum(), place)[0], nan=0.0, posinf=0.0, neginf=0.0)
        won = (gap > 0).logical_and(outside == 0)
        _adam(state, gradient)
        done = self._walk(state, point.detach(), won)
        # an image that ends is judged at the best point it found
        return torch.where(_wide(done, point), state["closest"], _from_tanh_space(state["place"])), {
            **state,
            "done": done,
        }

    def _walk(self, state: State, point: Tensor, won: Tensor) -> Tensor:
        """On to the next constant or level, where one is over; returns the images that end, (B,)."""
        wide = _wide(won, point)
        distance = (point - state["clean"]).abs().flatten(1).amax(dim=1)
        state["closest"] = torch.where(wide, point, state["closest"])
        state["origin"] = torch.where(wide, _to_tanh_space(point), state["origin"])
        state["tau"] = torch.where(won, SHRINK * torch.minimum(state["tau"], distance), state["tau"])
        over = ~won & (state["iteration"] >= self.params.iterations)
        state["trial"] = torch.where(won, 0.0, state["trial"] + over)
        state["constant"] = FIRST_CONSTANT * 10 ** state["trial"]
        restart = won | over
        for moment in ("first_moment", "second_moment"):
            state[moment] = state[moment] * _wide(~restart, point)
        state["iteration"] = state["iteration"] * ~restart
        state["place"] = torch.where(_wide(restart, point), state["origin"], state["place"])
        return (state["trial"] >= CONSTANTS) | (state["tau"] < SMALLEST_TAU)


def _adam(state: State, gradient: Tensor) -> None:
    """Kingma and Ba (ICLR 2015) with its own decay rates; every image counts its own iterations."""
    state["iteration"] = state["iteration"] + 1
    state["first_moment"] = 0.9 * state["first_moment"] + 0.1 * gradient
    state["second_moment"] = 0.999 * state["second_moment"] + 0.001 * gradient.square()
    first = state["first_moment"] / _wide(1 - 0.9 ** state["iteration"], gradient)
    second = state["second_moment"] / _wide(1 - 0.999 ** state["iteration"], gradient)
    state["place"] = state["place"] - LEARNING_RATE * first / (second.sqrt() + 1e-8)


def _to_tanh_space(x: Tensor) -> Tensor:
    return torch.atanh((2 * x - 1) * INSIDE)


def _from_tanh_space(place: Tensor) -> Tensor:
    return (torch.tanh(place) + 1) / 2


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1)."""
    return values.view(-1, *[1] * (like.dim() - 1))

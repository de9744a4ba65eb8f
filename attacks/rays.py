"""RayS: A Ray Searching Method for Hard-label Adversarial Attack (Chen and Gu; KDD 2020, arXiv:2006.12792)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from ensdef.attacks._queries import blocks, flip, spread
from torch import Tensor

from ensdef.attack import IterativeAttack, State, register_attack
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

#: A radius above 1 leads every ray to a corner of the box: no adversarial direction is known yet.
NONE_YET = 2.0
#: Where a search for the radius ends, in units of l2 length.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class RaysParams:
    """Settings of RayS.

    Args:
        queries: questions a run, searches for the radius included.
    """

    queries: int = 10_000

    def __post_init__(self) -> None:
        at_least("", queries=(self.queries, 1))


@register_attack("rays")
class Rays(IterativeAttack):
    """Hard labels alone: searches the signs along which the decision changes soonest; dense, so weak in l2.

    Every step asks one question, about an image in the box at any distance: is the direction with one more block
    flipped adversarial at the present radius? If so, at which radius does it begin to be (bisection)? An image is
    fooled as soon as one of these points is within eps in the norm of the threat (the authors' ``order``), or in the
    end by the shortest one projected onto the ball.
    """

    Params = RaysParams
    access = "decision"
    random = False
    budget = "min_norm"

    @property
    def steps(self) -> int:
        return int(self.params.queries)

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        zeros = x.new_zeros(len(x))
        state = {
            "x": x,
            "signs": torch.ones_like(x),
            "radius": zeros + NONE_YET,
            # where the search for the radius stands, and the number of the block that is flipped meanwhile
            "searching": zeros.bool(),
            "low": zeros,
            "high": zeros,
            "block": torch.zeros_like(y),
        }
        return {**state, "x_adv": self.question(state)}

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        adversarial = target(x_adv).argmax(dim=1) != y
        state = self.answered(adversarial, state)
        shortest = threat.project(ray(state["x"], state["signs"], state["radius"]), state["x"])
        over = spread(rng.step >= self.steps, x_adv)
        return torch.where(over, shortest, self.question(state)), state

    def answered(self, adversarial: Tensor, state: State) -> State:
        """What is known after the answer to :meth:`question`, (B,) bool."""
        radius, searching = state["radius"], state["searching"]
        middle = (state["low"] + state["high"]) / 2
        begins = ~searching & adversarial
        high = torch.where(begins, radius.clamp(max=1.0), torch.where(searching & adversarial, middle, state["high"]))
        low = torch.where(begins, 0.0, torch.where(searching & ~adversarial, middle, state["low"]))
        searching = searching | begins
        found = searching & (high - low <= TOLERANCE / math.sqrt(state["x"][0].numel()))
        shorter = found & (high < radius)
        return {
            "x": state["x"],
            "signs": torch.where(spread(shorter, state["x"]), self.tried(state), state["signs"]),
            "radius": torch.where(shorter, high, radius),
            "searching": searching & ~found,
            "low": low,
            "high": high,
            "block": state["block"] + (~searching | found),
        }

    def question(self, state: State) -> Tensor:
        """The next point to ask about, (B, ...)."""
        middle = (state["low"] + state["high"]) / 2
        return ray(state["x"], self.tried(state), torch.where(state["searching"], middle, state["radius"]))

    def tried(self, state: State) -> Tensor:
        """The direction under test, like ``x``: the best signs with the present block flipped."""
        count = state["x"][0].numel()
        bounds = blocks(count, state["x"].device)
        # after the last level, the single coordinates, that level is repeated
        number = torch.where(
            state["block"] < len(bounds), state["block"], len(bounds) - count + (state["block"] - len(bounds)) % count
        )
        position = torch.arange(count, device=state["x"].device).view(state["x"].shape[1:])
        tried: Tensor = flip(state["signs"], bounds[number], position)
        return tried


def ray(x: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
    """The point that every coordinate has moved to by ``radius`` (B,), inside the box."""
    point: Tensor = (x + spread(radius, x) * signs).clamp(0.0, 1.0)
    return point

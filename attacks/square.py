"""Square Attack: a query-efficient black-box adversarial attack via random search (Andriushchenko, Croce, Flammarion,
Hein; ECCV 2020, arXiv:1912.00049).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from ensdef.attacks._pyautoattack import as_plain_model
from ensdef.attacks._pyramids import moved, place, tiled, window
from ensdef.attacks._queries import ProposalAttack, require_planes
from torch import Tensor

from ensdef.attack import Attack, CompositeAttack, State, WholeAttack, register_attack
from ensdef.errors import UsageError
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat

#: Proposals after which the painted share of the image is halved, for a budget of 10,000.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class SquareParams:
    """Settings of Square.

    Args:
        queries: questions a run. The own implementation counts its starting point as the first; the official one
            asks about it besides.
        p: share of the image that the first squares cover, in (0, 1].
        restarts: independent runs; the worst counts.
        resc_schedule: stretch the schedule of square sizes from 10,000 queries to ``queries``; the official default
            is to use its numbers as they are.
        implementation: ``own``: every image has squares of its own, drawn from its own random numbers, anywhere in
            the image. ``official``: pyautoattack's, which gives a whole batch the same square and never repaints
            the last row and column; for square images of at least 5 pixels a side.
    """

    queries: int = 5000
    p: float = 0.8
    restarts: int = 1
    resc_schedule: bool = False
    implementation: Literal["own", "official"] = "own"

    def __post_init__(self) -> None:
        at_least("", queries=(self.queries, 1), restarts=(self.restarts, 1))
        if not 0 < self.p <= 1:
            raise UsageError(f"p is {self.p}; expected a share of the image, above 0 and at most 1")

    def halvings(self, proposal: Tensor) -> Tensor:
        """How often the painted share has been halved before a proposal, numbered from 0; (B,) -> (B,)."""
        if self.resc_schedule:
            proposal = proposal * 10_000 // self.queries
        return (proposal[:, None] > torch.tensor(HALVED_AFTER, device=proposal.device)).sum(dim=1)

    def sides(self, height: int, width: int, norm: str | None) -> list[int]:
        """Side of the squares after 0, 1, ... halvings; in l2 odd and at least 3, where the image has room."""
        exact = [(self.p / 2**halvings * height * width) ** 0.5 for halvings in range(len(HALVED_AFTER) + 1)]
        if norm == "l2":
            wanted = [max(round(side), 3) // 2 * 2 + 1 for side in exact]
        else:
            wanted = [max(round(side), 1) for side in exact]
        return [min(side, height, width) for side in wanted]


@register_attack("square")
class Square(CompositeAttack):
    """Random search over squares that shrink, on scores alone (in l2: over pyramids in square windows)."""

    Params = SquareParams
    access = "score"

    def fits(self, traits: Traits) -> None:
        require_planes("squares", traits)
        _, height, width = traits.image_shape
        if self.params.implementation == "official" and not height == width >= 5:
            raise UsageError(
                f"the official implementation needs square images of at least 5 by 5 pixels, these are {height} by "
                f"{width}; use implementation=own"
            )

    def parts(self, traits: Traits) -> Sequence[tuple[str, Attack]]:
        if self.params.implementation == "official":
            return [("square (official)", OfficialSquare(self.params))]
        return [("square", SquareSearch(self.params))]


class SquareSearch(ProposalAttack):
    """Squares drawn for each image by itself; one query a step."""

    Params = SquareParams

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        if threat.norm == "l2":
            first = x + threat.eps * tiled(x, rng)
        else:  # vertical stripes
            first = x + threat.eps * rng.signs(x.shape[1], 1, x.shape[3])
        return {**super().start(target, x, y, threat, rng), "x_adv": first}

    def propose(self, better: Tensor, state: State, threat: Threat, rng: KeyedRandom) -> tuple[Tensor, State]:
        x, best = state["x"], state["best"]
        channels, height, width = x.shape[1:]
        choice = self.params.halvings(rng.step - 1)
        sides = self.params.sides(height, width, threat.norm)
        if threat.norm == "l2":
            return moved(x, best, threat.eps, sides, choice, rng), state
        side = torch.tensor(sides, device=x.device)[choice]
        painted = window(side, *place(side, height, width, rng), height, width)
        return torch.where(painted, x + threat.eps * rng.signs(channels, 1, 1), best), state

    def foresee(self, x_adv: Tensor, state: State, threat: Threat, rng: KeyedRandom) -> Tensor:
        refused = torch.zeros_like(state["best_loss"], dtype=torch.bool)
        return self.propose(refused, state, threat, rng)[0]


class OfficialSquare(WholeAttack):
    """The authors' implementation, as packaged by pyautoattack; it seeds every batch anew with the attack seed."""

    Params = SquareParams
    access = "score"

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        from pyautoattack.square import SquareAttack

        attack = SquareAttack(
            as_plain_model(target),
            norm={"linf": "Linf", "l2": "L2"}[str(threat.norm)],
            n_queries=self.params.queries,
            eps=threat.eps,
            p_init=self.params.p,
            n_restarts=self.params.restarts,
            seed=rng.seed,
            loss="margin",
            resc_schedule=self.params.resc_schedule,
            device=x.device,
        )
        with torch.no_grad():
            candidates: Tensor = attack.perturb(x.contiguous(), y)
        return candidates

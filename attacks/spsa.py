"""Adversarial Risk and the Dangers of Evaluating Against Weak Attacks (Uesato, O'Donoghue, van den Oord, Kohli;
ICML 2018, arXiv:1802.05666).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ensdef.attacks._queries import positive, spread
from torch import Tensor

from ensdef.attack import IterativeAttack, State, register_attack
from ensdef.errors import UsageError
from ensdef.losses import margin
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

#: Pairs of points evaluated in one pass, over all images of a batch; on a CPU fewer where images are large: passes
#: whose activations leave its cache take longer a point.
PAIRS_A_PASS, VALUES_A_PASS = 256, 2**18
#: Adam's decay rates and floor, as Kingma and Ba give them.
MEAN_DECAY, SQUARE_DECAY, FLOOR = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class SpsaParams:
    """Settings of SPSA.

    Args:
        steps: Adam steps.
        samples: evaluations a step, two for each random direction.
        delta: length of the finite differences, in image units and for every pixel. The points evaluated may lie
            outside ball and box by as much; the iterates do not.
        lr: Adam's step size, in image units.
        random_start: begin in the ball instead of at the image.
    """

    steps: int = 50
    samples: int = 128
    delta: float = 0.01
    lr: float = 0.01
    random_start: bool = True

    def __post_init__(self) -> None:
        at_least("", steps=(self.steps, 0), samples=(self.samples, 2))
        if self.samples % 2:
            raise UsageError(f"samples is {self.samples}; expected an even number, two for each direction")
        positive(delta=self.delta, lr=self.lr)


@register_attack("spsa")
class Spsa(IterativeAttack):
    """Adam on the margin, its gradient estimated from differences along random signs; scores alone."""

    Params = SpsaParams
    access = "score"
    norms = ("linf",)
    #: differences of scores a hundredth of a pixel apart drown in bf16's rounding
    low_precision = False

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        state = {"mean": torch.zeros_like(x), "square": torch.zeros_like(x)}
        return {**state, "x_adv": threat.random_start(x, rng)} if self.params.random_start else state

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        gradient = self.gradient(target, x_adv, y, rng)
        mean = MEAN_DECAY * state["mean"] + (1 - MEAN_DECAY) * gradient
        square = SQUARE_DECAY * state["square"] + (1 - SQUARE_DECAY) * gradient.square()
        step = spread(rng.step, x_adv)
        direction = (mean / (1 - MEAN_DECAY**step)) / ((square / (1 - SQUARE_DECAY**step)).sqrt() + FLOOR)
        return x_adv + self.params.lr * direction, {"mean": mean, "square": square}

    def gradient(self, target: Target, x: Tensor, y: Tensor, rng: KeyedRandom) -> Tensor:
        """Estimate of the margin's gradient, like ``x``: mean of (L(x + c v) - L(x - c v)) v / 2c over signs v."""
        pairs, delta = self.params.samples // 2, self.params.delta
        total = torch.zeros_like(x)
        room = PAIRS_A_PASS if x.is_cuda else min(PAIRS_A_PASS, VALUES_A_PASS // (2 * x[0].numel()))
        at_once = max(1, room // len(x))
        for done in range(0, pairs, at_once):
            directions = torch.stack([rng.signs(*x.shape[1:]) for _ in range(min(at_once, pairs - done))])
            probes = torch.cat([x + delta * directions, x - delta * directions]).flatten(0, 1)
            losses = margin(target(probes), y.repeat(2 * len(directions))).view(2, len(directions), len(x))
            slopes = torch.nan_to_num((losses[0] - losses[1]) / (2 * delta), nan=0.0, posinf=0.0, neginf=0.0)
            for slope, direction in zip(slopes, directions, strict=True):  # one by one: their order fixes the rounding
                total = total + spread(slope, x) * direction
        mean: Tensor = total / pairs
        return mean

"""One gradient engine: momentum, norm, loss and targets are settings; the harness owns everything else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ensdef.attack import IterativeAttack, State
from ensdef.errors import UsageError
from ensdef.losses import cross_entropy, margin, targeted_margin
from ensdef.notation import at_least, relative
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import TINY, Threat

Loss = Literal["ce", "margin", "targeted", "targeted_margin"]


@dataclass(frozen=True)
class GradientParams:
    """Settings of a gradient attack.

    Args:
        steps: gradient steps of one run.
        step_size: in image units, or in units of the radius (``eps/5``).
        restarts: independent runs; the worst counts.
        random_start: begin in the ball instead of at the image.
        loss: what is raised. ``ce``; ``margin``: best wrong score minus true score; ``targeted``: minus the
            cross-entropy to a wrong class; ``targeted_margin``: its score minus the true score. The targeted losses
            run once for each of the C - 1 wrong classes (times restarts).
        decay: momentum factor on l1-normalised gradients; 0: none.
        view: the reading of the target whose gradient is followed; success is judged on ``predict`` all the same.
    """

    steps: int = 50
    step_size: str = "eps/5"
    restarts: int = 1
    random_start: bool = True
    loss: Loss = "ce"
    decay: float = 0.0
    view: str = "predict"

    def __post_init__(self) -> None:
        at_least("", steps=(self.steps, 0), restarts=(self.restarts, 1), decay=(self.decay, 0))
        at_least("", step_size=(relative(self.step_size, 1.0, "step_size"), 0))

    @property
    def targeted(self) -> bool:
        return self.loss.startswith("targeted")


class GradientAttack(IterativeAttack):
    """Projected ascent on a loss of the target's scores."""

    Params = GradientParams

    def runs(self, num_classes: int) -> int:
        return int(self.params.restarts) * (num_classes - 1 if self.params.targeted else 1)

    def fits(self, views: Collection[str]) -> None:
        if self.params.view not in views:
            raise UsageError(f"the target has no view {self.params.view!r}; it has: {', '.join(views)}")

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        state: State = {"momentum": torch.zeros_like(x)} if self.params.decay else {}
        if self.params.targeted:
            # the first `restarts` runs aim at the class after the true one, the next at the one after that, ...
            state["target"] = 1 + rng.run // self.params.restarts
        if self.params.random_start:
            state["x_adv"] = threat.random_start(x, rng)
        return state

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        views = target.views
        self.fits(views)
        x_adv = x_adv.detach().requires_grad_()
        scores = views[self.params.view](x_adv)
        gradient = torch.autograd.grad(self.objective(scores, y, state).sum(), x_adv)[0]
        # where the model is not finite there is no direction; the harness counts the image as fooled
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        if self.params.decay:
            # floored: a zero gradient must not turn the momentum into NaN for good
            length = gradient.abs().flatten(1).sum(dim=1).clamp_min(TINY).view(-1, *[1] * (x_adv.dim() - 1))
            gradient = self.params.decay * state["momentum"] + gradient / length
            state = {**state, "momentum": gradient}
        return x_adv.detach() + self.step_size(threat) * threat.ascent(gradient), state

    def step_size(self, threat: Threat) -> float:
        """Length of a step in image units."""
        return relative(self.params.step_size, threat.eps, "step_size")

    def objective(self, scores: Tensor, y: Tensor, state: State) -> Tensor:
        """What is raised, (B,)."""
        if self.params.loss == "ce":
            return cross_entropy(scores, y)
        if self.params.loss == "margin":
            return margin(scores, y)
        wrong = (y + state["target"]) % scores.shape[1]
        if self.params.loss == "targeted":
            return -cross_entropy(scores, wrong)
        return targeted_margin(scores, y, wrong)

"""One gradient engine: momentum, norm, loss and targets are settings; the harness owns everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ensdef import losses
from ensdef.attack import IterativeAttack, State, require_gradient
from ensdef.errors import UsageError
from ensdef.notation import at_least, relative
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import TINY, Threat

Loss = Literal["ce", "margin", "dlr", "targeted", "targeted_margin", "targeted_dlr"]
#: Classes without which a loss has no meaning.
FEWEST_CLASSES = {"dlr": 3, "targeted_dlr": 4}


@dataclass(frozen=True)
class GradientParams:
    """Settings of a gradient attack.

    Args:
        steps: gradient steps of one run.
        step_size: in image units, or in units of the radius (``eps/5``).
        restarts: independent runs; the worst counts.
        random_start: begin in the ball instead of at the image.
        loss: what is raised. ``ce``; ``margin``: best wrong score minus true score; ``dlr``: that over the distance of
            the largest and the third largest score; ``targeted``: minus the cross-entropy to a wrong class;
            ``targeted_margin``: its score minus the true score; ``targeted_dlr``: that over a distance of scores. The
            targeted losses run once for each wrong class (times restarts).
        targets: of the targeted losses: only the wrong classes that score highest on the clean image, this many;
            0: all C - 1.
        decay: momentum factor on l1-normalised gradients; 0: none.
        view: the reading of the target whose gradient is followed; success is judged on ``predict`` all the same.
    """

    steps: int = 50
    step_size: str = "eps/5"
    restarts: int = 1
    random_start: bool = True
    loss: Loss = "ce"
    targets: int = 0
    decay: float = 0.0
    view: str = "predict"

    def __post_init__(self) -> None:
        at_least(
            "", steps=(self.steps, 0), restarts=(self.restarts, 1), targets=(self.targets, 0), decay=(self.decay, 0)
        )
        at_least("", step_size=(relative(self.step_size, 1.0, "step_size"), 0))
        if self.targets and not self.targeted:
            raise UsageError(
                f"targets is {self.targets}, but the loss {self.loss} aims at no class; "
                "use targeted, targeted_margin or targeted_dlr"
            )

    @property
    def targeted(self) -> bool:
        return self.loss.startswith("targeted")


class GradientAttack(IterativeAttack):
    """Projected ascent on a loss of the target's scores."""

    Params = GradientParams

    def runs(self, num_classes: int) -> int:
        aims = min(self.params.targets or num_classes, num_classes - 1) if self.params.targeted else 1
        return int(self.params.restarts) * aims

    def fits(self, traits: Traits) -> None:
        require_gradient(self.params.view, traits)
        fewest = FEWEST_CLASSES.get(self.params.loss, 2)
        if traits.num_classes < fewest:
            works = [name for name in get_args(Loss) if traits.num_classes >= FEWEST_CLASSES.get(name, 2)]
            raise UsageError(
                f"loss is {self.params.loss}, which needs at least {fewest} classes, but the model has "
                f"{traits.num_classes}; use {', '.join(works)}"
            )

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        state: State = {"momentum": torch.zeros_like(x)} if self.params.decay else {}
        if self.params.targeted:
            state["target"] = self.aim(target, x, y, rng.run // self.params.restarts)
        if self.params.random_start:
            # one start for all targets of a restart: the order of the classes must not matter
            same = rng.at(run=rng.run % self.params.restarts) if self.params.targeted else rng
            state["x_adv"] = threat.random_start(x, same)
        return state

    def aim(self, target: Target, x: Tensor, y: Tensor, turn: Tensor) -> Tensor:
        """How many classes after the true one (modulo C) the class aimed at lies, (B,), in 1 ... C - 1.

        Args:
            turn: the first `restarts` runs are turn 0, the next turn 1, ...; (B,).
        """
        if not self.params.targets:
            return 1 + turn
        with torch.no_grad():
            scores = target.views[self.params.view](x)
        likeliest = scores.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        return (likeliest.gather(1, turn[:, None]).squeeze(1) - y) % scores.shape[1]

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        x_adv = x_adv.detach().requires_grad_()
        scores = target.views[self.params.view](self.shown(x_adv, rng))
        gradient = torch.autograd.grad(self.raised(scores, y, state).sum(), x_adv)[0]
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

    def shown(self, x_adv: Tensor, rng: KeyedRandom) -> Tensor:
        """What the model is shown of the points, (B, ...); the points themselves unless an attack transforms them."""
        return x_adv

    def raised(self, scores: Tensor, y: Tensor, state: State) -> Tensor:
        """The loss that is raised, (B,)."""
        loss = self.params.loss
        if loss == "ce":
            return losses.cross_entropy(scores, y)
        if loss == "margin":
            return losses.margin(scores, y)
        if loss == "dlr":
            return losses.dlr(scores, y)
        wrong = (y + state["target"]) % scores.shape[1]
        if loss == "targeted":
            return -losses.cross_entropy(scores, wrong)
        if loss == "targeted_margin":
            return losses.targeted_margin(scores, y, wrong)
        return losses.targeted_dlr(scores, y, wrong)

"""DeepFool: a simple and accurate method to fool deep neural networks (Moosavi-Dezfooli, Fawzi, Frossard; CVPR 2016,
arXiv:1511.04599).

A shortest-perturbation attack: where it ends does not depend on the radius, with which its length is compared. As a
verdict at a fixed radius it is weaker than PGD; it is for curves over the distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ensdef.attack import IterativeAttack, State, register_attack
from ensdef.errors import UsageError
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

#: Added to every distance, as the authors' code does: a step must not end on the boundary itself.
MARGIN = 1e-4
#: Under norms of gradients.
FLOOR = 1e-8


@dataclass(frozen=True)
class DeepFoolParams:
    """Settings of ``deepfool``.

    Args:
        steps: linearisations at most.
        overshoot: share of the displacement that is added to it.
        candidates: classes that are looked at, the true one and those that score highest on the clean image.
    """

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10

    def __post_init__(self) -> None:
        at_least("", steps=(self.steps, 0), overshoot=(self.overshoot, 0))
        if self.candidates < 2:
            raise UsageError(f"candidates is {self.candidates}; expected at least 2, the true class and another one")


@register_attack("deepfool")
class DeepFool(IterativeAttack):
    """Steps to the nearest boundary of the linearised model, until it is crossed; shortest perturbation."""

    Params = DeepFoolParams
    random = False
    budget = "min_norm"
    #: its points lie so close to the boundary that bf16 takes too many for crossed
    low_precision = False

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        # the classes are ranked in the first step, by the pass it makes anyway
        aims = y.new_zeros(len(y), self.params.candidates - 1)
        return {"clean": x, "total": torch.zeros_like(x), "aims": aims}

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        point = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            scores = target(point)
        fooled = scores.argmax(dim=1) != y
        aims = self._aims(scores.detach(), y, state["aims"], rng.step == 1)
        kept = min(aims.shape[1], scores.shape[1] - 1)  # the rest are places for classes that do not exist
        # also of rows that have crossed: what an image costs must not depend on the others of its batch
        displacement = _nearest_boundary(scores, point, y, aims[:, :kept], threat)
        unfooled = ~fooled.view(-1, *[1] * (x_adv.dim() - 1))
        total = torch.where(unfooled, state["total"] + displacement, state["total"])
        moved = (state["clean"] + (1 + self.params.overshoot) * total).clamp(0, 1)
        state = {"clean": state["clean"], "total": total, "aims": aims, "done": fooled}
        return torch.where(unfooled, moved, x_adv.detach()), state

    @staticmethod
    def _aims(scores: Tensor, y: Tensor, known: Tensor, first: Tensor) -> Tensor:
        """Wrong classes in the order of their scores on the clean image, (B, candidates - 1)."""
        if not bool(first.any()):
            return known
        order = scores.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :-1]
        ranked = known.clone()
        ranked[:, : order.shape[1]] = order[:, : known.shape[1]]
        return torch.where(first[:, None], ranked, known)


def _nearest_boundary(scores: Tensor, point: Tensor, y: Tensor, aims: Tensor, threat: Threat) -> Tensor:
    """The shortest displacement that the linearised scores call a crossing, (B, ...): one graph, a backward a class."""
    differences = scores.gather(1, aims) - scores.gather(1, y[:, None])
    count = aims.shape[1]
    nearest, displacement = torch.full_like(differences[:, 0].detach(), torch.inf), torch.zeros_like(point)
    for index in range(count):
        difference = differences[:, index]
        gradient = torch.autograd.grad(difference.sum(), point, retain_graph=index + 1 < count)[0]
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        # the distance to a hyperplane is measured in the dual norm of its normal
        length = torch.linalg.vector_norm(gradient.flatten(1), ord=2 if threat.norm == "l2" else 1, dim=1) + FLOOR
        distance = difference.detach().abs() / length
        closer = (distance < nearest) & torch.isfinite(distance)
        direction = gradient / _wide(length, gradient) if threat.norm == "l2" else gradient.sign()
        step = _wide(distance + MARGIN, gradient) * direction
        displacement = torch.where(_wide(closer, gradient), step, displacement)
        nearest = torch.where(closer, distance, nearest)
    return displacement.detach()


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1)."""
    return values.view(-1, *[1] * (like.dim() - 1))

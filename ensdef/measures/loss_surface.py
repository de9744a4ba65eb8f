"""CCE: Improving Ensemble Robustness by Collaboratively Promoting and Demoting Adversarial Robustness (Bui et al., AAAI
2021, arXiv:2009.09612), supplement, Figures 6 to 8.

The loss of ensemble and members on a plane of images around an adversarial one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.diagnostics.answers import answer, right
from ensdef.diagnostics.crafting import loss_of, view_of
from ensdef.diagnostics.curvature import gradient
from ensdef.errors import UsageError
from ensdef.folding import frozen_copy
from ensdef.losses import cross_entropy, member_cross_entropy
from ensdef.measure import Measured, Subject, register_measure
from ensdef.measures._crafting import OnView, ViewCrafting
from ensdef.notation import at_least
from ensdef.rng import derived_generator
from ensdef.threat import Threat

#: Levels of a stored picture.
LEVELS = 255


@register_measure("loss_surface")
class LossSurface(OnView):
    """Cross-entropy and predicted class of the ensemble and of every member on a grid of images x + i u + j v.

    x is the adversarial image, u the steepest ascent of the ensemble's loss there (its gradient's sign in linf, its
    direction in l2), v random signs made perpendicular to u; both as long as a step of one radius, the same for all
    networks so that their panels show the same images. Grid points are clipped to [0, 1]. The paper takes the plain
    gradient of each network and does not say how far its grids reach.

    Values: ``ensemble_right``, ``member1_right``, ... (fractions of the grid points with the true class),
    ``ensemble_loss``, ``member1_loss``, ... (means over the grids, nats). Series, for the first images that the
    ensemble gets right: ``offsets`` (G,) in units of the radius; ``loss`` and ``predicted`` (images, 1 + K, G, G), the
    ensemble before its members, rows along u, columns along v; ``ids``, ``labels``; ``clean`` and ``centre`` (images,
    channels, height, width) in 0 ... 255.
    """

    @dataclass(frozen=True)
    class Params(ViewCrafting):
        """Crafting, and what is drawn.

        Args:
            images: number of images.
            grid: points a side, an odd number, so that the centre is one of them.
            reach: of the grid to each side, in radii.
            around: ``adversarial``, or the ``clean`` image.
        """

        images: int = 2
        grid: int = 21
        reach: float = 1.0
        around: Literal["adversarial", "clean"] = "adversarial"

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least("", images=(self.images, 1), grid=(self.grid, 3), reach=(self.reach, 1e-9))
            if self.grid % 2 == 0:
                raise UsageError(f"grid is {self.grid}; expected an odd number, so that the centre is a point of it")

    def measure(self, subject: Subject) -> Measured:
        params = self.params
        chosen = right(answer(subject.defense, subject.x).scores, subject.y).nonzero().squeeze(1)[: params.images]
        if not len(chosen):
            raise UsageError(f"the ensemble gets none of the {len(subject.x)} images right; give more (--samples)")
        clean, y = subject.x[chosen], subject.y[chosen]
        shown = dataclasses.replace(subject, x=clean, y=y)
        centre = clean if params.around == "clean" else params.craft(shown, params.view)
        offsets = torch.linspace(-params.reach, params.reach, params.grid, device=centre.device)
        losses, predicted = [], []
        for image, label, u, v in zip(centre, y, *self._directions(subject, centre, y), strict=True):
            steps = offsets.view(-1, *[1] * image.dim())
            grid = (image + steps[:, None] * u + steps[None] * v).clamp(0, 1).flatten(0, 1)
            answers, labels = answer(subject.defense, grid), label.expand(len(grid))
            loss = torch.cat(
                [cross_entropy(answers.scores, labels)[None], member_cross_entropy(answers.logits, labels)]
            )
            classes = torch.cat([answers.scores[None], answers.logits]).argmax(dim=-1)
            losses.append(loss.view(-1, params.grid, params.grid))
            predicted.append(classes.view(-1, params.grid, params.grid))
        loss, classes = torch.stack(losses).double(), torch.stack(predicted)
        hits = (classes == y.view(-1, 1, 1, 1)).double()
        names = ["ensemble", *(f"member{number}" for number in range(1, loss.shape[1]))]
        return Measured(
            {
                **{f"{name}_right": float(hits[:, row].mean()) for row, name in enumerate(names)},
                **{f"{name}_loss": float(loss[:, row].mean()) for row, name in enumerate(names)},
            },
            series={
                "offsets": offsets.tolist(),
                "loss": loss.tolist(),
                "predicted": classes.tolist(),
                "ids": subject.ids[chosen].tolist(),
                "labels": y.tolist(),
                "clean": _picture(clean),
                "centre": _picture(centre),
            },
            n=len(chosen),
        )

    def _directions(self, subject: Subject, centre: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """u and v of every image, (N, ...), perpendicular and of equal length."""
        threat = Threat.parse(subject.norm, subject.eps)
        model = frozen_copy(subject.defense)
        assert isinstance(model, EnsembleDefense)
        ascent = gradient(loss_of(view_of(model, self.params.view), y), centre)
        u = threat.eps * threat.ascent(ascent)
        rng = derived_generator(torch.device("cpu"), subject.seed, -7)
        signs = torch.randint(2, u.shape, generator=rng).to(u) * 2 - 1
        return u, _perpendicular(signs, u)


def _perpendicular(direction: Tensor, u: Tensor) -> Tensor:
    """What of ``direction`` is perpendicular to ``u``, as long as ``u``, image by image, (N, ...)."""
    flat, along = direction.flatten(1).double(), u.flatten(1).double()
    squared = along.square().sum(dim=1, keepdim=True)
    flat = flat - (flat * along).sum(dim=1, keepdim=True) / squared.clamp_min(1e-30) * along
    length = flat.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
    return (flat * squared.sqrt() / length).view_as(u).to(u.dtype)


def _picture(x: Tensor) -> list[object]:
    levels: list[object] = (x * LEVELS).round().to(torch.int64).tolist()
    return levels

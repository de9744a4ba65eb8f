"""The adversary inside training: a plain projected gradient loop over a whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ensdef.defense import Batch, EnsembleDefense, InnerAdversary, Objective
from ensdef.folding import FoldedCopy
from ensdef.losses import cross_entropy
from ensdef.notation import relative
from ensdef.recipe import InnerAttack
from ensdef.rng import BatchRandom, Random
from ensdef.threat import TINY, Threat


@dataclass(frozen=True)
class Part:
    """What one of several processes has of a batch.

    Args:
        rows: its images.
        total: number of images in the batch.
        rng: for draws of its own.
    """

    rows: slice
    total: int
    rng: torch.Generator


class Adversary:
    """What the trainer lends a defence; called through :meth:`EnsembleDefense.adversary`.

    Args:
        defense: the defence in training, put into eval mode while a callable objective is attacked with batch norm
            in eval mode.
        attack: steps, step size, start, batch-norm mode, labels.
        norm: of the default threat.
        eps: (low, high); a radius is drawn uniformly per batch when they differ.
    """

    def __init__(self, defense: EnsembleDefense, attack: InnerAttack, norm: str, eps: tuple[float, float]) -> None:
        self.defense = defense
        self.attack = attack
        self.norm = norm
        self.eps = eps
        self.rng = torch.Generator()
        self.part: Part | None = None
        self.threat = Threat(norm, eps[1])
        self._copies: dict[int, FoldedCopy] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Adversary:
        return self  # a copied defence shares the adversary: copying it would copy the defence once more

    def begin_batch(self, rng: torch.Generator, part: Part | None = None) -> None:
        """Use ``rng`` for this batch, and draw its radius.

        Where the batch is shared by processes, all of them give the same ``rng``, and each its ``part``: attacks on
        the whole part start where one process would have started them. Attacks on fewer or more images (on those that
        one member answers) start at random points of the process's own.
        """
        self.rng = rng
        self.part = part
        low, high = self.eps
        share = float(torch.rand((), generator=rng, device=rng.device)) if high > low else 0.0
        self.threat = Threat(self.norm, low + share * (high - low))

    def __call__(
        self,
        objective: Objective,
        x: Tensor,
        y: Tensor | None = None,
        *,
        threat: Threat | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        momentum: float = 0.0,
        start: Literal["uniform", "zero"] | None = None,
        descend: bool = False,
    ) -> Tensor:
        threat = threat or self.threat
        steps = self.attack.steps if steps is None else steps
        size = relative(self.attack.step_size, threat.eps, "step_size") if step_size is None else step_size
        size = -size if descend else size
        x = x.detach()
        with self._attacked(objective) as surface, torch.enable_grad():
            if isinstance(objective, nn.Module) and (y is None or self.attack.label == "predicted"):
                with torch.no_grad():
                    y = surface(x).argmax(dim=1)
            x_adv = x
            if (start or self.attack.start) == "uniform":
                x_adv = threat.random_start(x, self._draws(len(x)))
            velocity = torch.zeros_like(x)
            for _ in range(steps):
                x_adv = x_adv.detach().requires_grad_()
                value = surface(x_adv)
                if isinstance(objective, nn.Module):
                    assert y is not None
                    value = cross_entropy(value.float(), y)
                # the sum, not the mean: an example's gradient must not depend on the size of its batch
                gradient = torch.autograd.grad(value.sum(), x_adv)[0].detach()
                if momentum:
                    length = gradient.abs().flatten(1).sum(dim=1).clamp_min(TINY)
                    velocity = momentum * velocity + gradient / length.view(-1, *[1] * (x.dim() - 1))
                    gradient = velocity
                x_adv = threat.project(x_adv.detach() + size * threat.ascent(gradient), x)
        return x_adv.detach()

    def as_attacked(self, module: nn.Module) -> nn.Module:
        """See :meth:`EnsembleDefense.as_attacked`."""
        if self.attack.batch_norm == "train":
            return module
        copy = self._copies.get(id(module))
        if copy is None or copy.source is not module:
            copy = self._copies[id(module)] = FoldedCopy(module)
        return copy.refresh()

    def _draws(self, size: int) -> Random:
        if self.part is None:
            return BatchRandom(self.rng, size)
        if size == self.part.rows.stop - self.part.rows.start:
            return BatchRandom(self.rng, self.part.total, self.part.rows)
        return BatchRandom(self.part.rng, size)

    @contextmanager
    def _attacked(self, objective: Objective) -> Iterator[Any]:
        """The function whose gradient is followed, in the batch-norm mode of the recipe."""
        if self.attack.batch_norm == "train":
            yield objective
        elif isinstance(objective, nn.Module):
            yield self.as_attacked(objective)
        else:
            training = {module: module.training for module in self.defense.modules()}
            self.defense.eval()
            try:
                yield objective
            finally:
                for module, flag in training.items():
                    module.training = flag


@dataclass(frozen=True, eq=False)
class AlreadyCrafted:
    """What a composed defence lends the one inside it: an attack that was just made on its behalf is not made again.

    Args:
        adversary: makes every other attack.
        objective, batch: the attack that was made: plain, on this module and these images and labels.
        x_adv: what came of it.
    """

    adversary: InnerAdversary
    objective: nn.Module
    batch: Batch
    x_adv: Tensor

    def __call__(self, objective: Objective, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        plain = {"threat": None, "steps": None, "step_size": None, "momentum": 0.0, "start": None, "descend": False}
        same = objective is self.objective and x is self.batch.x and y is self.batch.y and options == plain
        return self.x_adv if same else self.adversary(objective, x, y, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adversary, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> AlreadyCrafted:
        return self

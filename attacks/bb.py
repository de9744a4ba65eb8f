"""Accurate, reliable and fast robustness evaluation (Brendel, Rauber, Kümmerer, Ustyuzhaninov, Bethge; NeurIPS 2019,
arXiv:1907.01003), through foolbox: ``pip install 'ensdef[foolbox]'``.

From an image that the model takes for another class it walks along the decision boundary to the place nearest to the
clean image. The start may be far away, which does not matter to a shortest-perturbation attack: it is the nearest image
of the batch that gets another decision, in each repeat the next one. A start inside the ball, as from PGD, would only
find again what PGD found.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from ensdef.attacks import _wrapped
from torch import Tensor

from ensdef.attack import WholeAttack, register_attack
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat

#: foolbox's classes by norm.
CLASSES = {"linf": "LinfinityBrendelBethgeAttack", "l2": "L2BrendelBethgeAttack"}
#: foolbox's first trust region, as a share of the number of pixels, and the number of pixels it was chosen for.
SHARE, PIXELS = 1e-3, 3 * 32 * 32


@dataclass(frozen=True)
class BrendelBethgeParams:
    """Settings of ``bb``.

    Args:
        steps: along the boundary, a run.
        repeats: runs from different starts; the shortest perturbation counts.
    """

    steps: int = 100
    repeats: int = 3

    def __post_init__(self) -> None:
        at_least("", steps=(self.steps, 1), repeats=(self.repeats, 1))


@register_attack("bb")
class BrendelBethge(WholeAttack):
    """Walk along the decision boundary to its nearest point; shortest perturbation, needs foolbox and numba."""

    Params = BrendelBethgeParams
    budget = "min_norm"

    def fits(self, traits: Traits) -> None:
        super().fits(traits)
        for package in ("foolbox", "numba"):
            _wrapped.library(package, "bb")

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        if threat.eps == 0:
            return x
        attacks = _wrapped.library("foolbox.attacks", "bb")
        closest, distance = x.clone(), torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        pool, order = self._starts(target, x, y, threat, rng)
        with _wrapped.guarded(rng.seed, self.warnings):
            warnings.filterwarnings("ignore", message="At the first initialisation")  # numba compiles, no finding
            model = _wrapped.library("foolbox", "bb").PyTorchModel(
                _wrapped.ModelForLibrary(target, x.device), bounds=(0, 1), device=x.device
            )
            for repeat in range(self.params.repeats):
                # an image that fell already needs no shorter perturbation
                rows = ((order[:, repeat] >= 0) & (distance > threat.eps)).nonzero().squeeze(1)
                if not len(rows):
                    continue
                found = self._walk(attacks, model, x[rows], y[rows], pool[order[rows, repeat]], threat)
                length = threat.distance(found, x[rows])
                closer = length < distance[rows]
                closest[rows[closer]], distance[rows[closer]] = found[closer], length[closer]
        return closest

    def _walk(self, attacks: Any, model: Any, x: Tensor, y: Tensor, starts: Tensor, threat: Threat) -> Tensor:
        # foolbox multiplies the trust region by the number of elements of the batch: results depend on the batch, and
        # small images are never left. Divided by the images, and growing like distances (the root of the number of
        # pixels), it is foolbox's for a single image of CIFAR, in every batch.
        pixels = x[0].numel()
        radius = SHARE * (PIXELS / pixels) ** 0.5 / len(x)
        attack = getattr(attacks, CLASSES[str(threat.norm)])(steps=self.params.steps, lr=radius)
        found: Tensor = attack.run(model, x.contiguous(), y, starting_points=starts.contiguous())
        return found.detach().clamp(0, 1)

    def _starts(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> tuple[Tensor, Tensor]:
        """Where walks may begin: points, (P, ...), and for each image their numbers, nearest first; -1: no more.

        The images of the batch, and uniform noise for batches in which all images are of one class.
        """
        pool = torch.cat([x, rng.uniform(*x.shape[1:])])
        with torch.no_grad():
            decided = target(pool.contiguous()).argmax(dim=1)
        length = torch.cdist(x.flatten(1), pool.flatten(1), p=2.0 if threat.norm == "l2" else torch.inf)
        length[:, len(x) :] += length.max() + 1  # noise comes last
        length = length.masked_fill(decided[None] == y[:, None], torch.inf)
        order = length.argsort(dim=1, stable=True)
        order = torch.where(torch.isinf(length.gather(1, order)), -1, order)
        missing = max(0, self.params.repeats - order.shape[1])
        return pool, torch.nn.functional.pad(order, (0, missing), value=-1)

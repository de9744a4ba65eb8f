"""One network against a union of perturbations. ``max``, ``avg``: Adversarial Training and Robustness for Multiple
Perturbations (Tramer, Boneh; NeurIPS 2019, arXiv:1904.13000). ``msd``: Adversarial Robustness Against the Union of
Multiple Perturbation Models (Maini, Wong, Kolter; ICML 2020, arXiv:1909.04068).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ensdef import weather
from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense, require
from ensdef.losses import cross_entropy
from ensdef.notation import relative
from ensdef.recipe import Fog, InnerAttack, Recipe, Snow, parse_train_eps
from ensdef.specs import TrainSpec
from ensdef.threat import Threat

#: Coordinates that share one l1 step, drawn anew for every step (MSD's code).
SPARSITY = (5, 20)


@dataclass(frozen=True)
class UnionHyper:
    """Hyper-parameters of ``msd``.

    Args:
        linf, l2, l1: radii, or ``none`` to leave a ball out; in units of the training radius where that is in the same
            norm. MoRE compares at 8/255 and 1; MSD's code has 0.03, 0.5 (trained at 0.3) and 12.
    """

    linf: str = "eps"
    l2: str = "1"
    l1: str = "none"

    def __post_init__(self) -> None:
        require(bool(self.balls), "linf, l2 and l1 are all none, which leaves nothing to train on; give a radius")
        for norm, radius in self.balls:
            relative(radius, 1.0, norm)

    @property
    def balls(self) -> list[tuple[str, str]]:
        """(norm, radius) of each ball in the union, in the order of MSD's code."""
        named = (("l1", self.l1), ("l2", self.l2), ("linf", self.linf))
        return [(norm, radius) for norm, radius in named if radius != "none"]


@dataclass(frozen=True)
class MaxHyper(UnionHyper):
    """Hyper-parameters of ``max``: those of ``msd``, and weather.

    Args:
        weather: add fog (0.15, 0.6) and snow 2.5 to the union, MoRE's columns "all".
    """

    weather: bool = False


@dataclass(frozen=True)
class AvgHyper(MaxHyper):
    """Hyper-parameters of ``avg``: those of ``max``, and the order of steps.

    Args:
        sequential: one optimiser step for each perturbation, crafted on the network as the last step left it, as
            MSD's code has it; otherwise one step on their mean (paper).
    """

    sequential: bool = False


class UnionTraining(EnsembleDefense):
    """What the three share: one network, the union, and how a perturbation is crafted."""

    recipe = Recipe(
        weight_decay=5e-4,
        epochs=50,
        schedule="onecycle",
        attack=InnerAttack(steps=50, step_size="eps/10", start="zero"),
    )
    fixed_members = 1
    deviations: ClassVar[tuple[str, ...]] = (
        "The learning rate falls in one line from its peak at 30 % of the steps; in MSD's code in two, from 40 %.",
        "Attacks see batch norm in eval mode; in MSD's code in train mode.",
    )

    @classmethod
    def prerequisites(cls, spec: TrainSpec) -> Mapping[str, TrainSpec]:
        """None; but radii that do not fit the run are refused here, before anything is trained."""
        setting = spec.setting
        run = Threat(setting.norm, float(parse_train_eps(setting.train_eps, setting.norm)[1]))
        for norm, radius in spec.hyper.balls:
            Threat.relative(norm, radius, run, dimensions=setting.data.dimensions, owner=spec.method)
        return {}

    def threats(self) -> list[Threat]:
        return [Threat.relative(norm, radius, self.training_threat) for norm, radius in self.hyper.balls]

    def step_size(self, threat: Threat) -> float:
        """The inner attack's in units of this radius; a number fits the run's norm alone, others get 2.5 eps / K."""
        attack = self._lent().attack
        if "eps" in attack.step_size or threat.norm == self.training_threat.norm:
            return relative(attack.step_size, threat.eps, "step_size")
        return 2.5 * threat.eps / max(1, attack.steps)

    def steepest(self, batch: Batch, threats: Sequence[Threat]) -> Tensor:
        """:func:`steepest_descent` on the network as the inner attack sees it."""
        network = self.as_attacked(self)
        return steepest_descent(
            lambda x: cross_entropy(network(x), batch.y),
            batch.x,
            threats,
            [self.step_size(threat) for threat in threats],
            self._lent().attack.steps,
            batch.rng,
        )

    def perturbed(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """(name, images) of every perturbation in the union, each crafted when it is asked for."""
        for threat in self.threats():
            if threat.norm == "l1":
                yield "l1", self.steepest(batch, [threat])
            else:
                x_adv = self.adversary(self, batch.x, batch.y, threat=threat, step_size=self.step_size(threat))
                yield str(threat.norm), x_adv
        if self.hyper.weather:
            yield "fog", weather.fog(batch.x, **asdict(Fog()))
            u = torch.rand(len(batch.x), generator=batch.rng, device=batch.x.device)
            yield "snow", weather.snow(batch.x, u, **asdict(Snow()))

    def mean_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.predict(x), y).mean()


@register_defense("max")
class WorstOfUnion(UnionTraining):
    """Trained on the perturbation of the union that hurts an image most."""

    Hyper = MaxHyper

    def loss(self, batch: Batch, progress: float) -> Terms:
        """max over p of CE(x + delta_p), image by image. Terms: adv_ce."""
        candidates = [x for _, x in self.perturbed(batch)]
        network = self.as_attacked(self)
        with torch.no_grad():
            losses = [cross_entropy(network(x), batch.y) for x in candidates]
        return {"adv_ce": self.mean_loss(worst(candidates, losses)[0], batch.y)}


@register_defense("avg")
class MeanOfUnion(UnionTraining):
    """Trained on all perturbations of the union alike."""

    Hyper = AvgHyper
    deviations = (
        *UnionTraining.deviations,
        "One optimiser step on the mean over the union, as in the paper; in MSD's code one for each perturbation "
        "(sequential=true).",
    )

    def loss(self, batch: Batch, progress: float) -> Terms | Iterator[Terms]:
        """Mean over p of CE(x + delta_p), in one step or (``sequential``) one a perturbation. Terms: linf, l2, ..."""
        if self.hyper.sequential:
            return ({name: self.mean_loss(x, batch.y)} for name, x in self.perturbed(batch))
        union = list(self.perturbed(batch))
        return {name: self.mean_loss(x, batch.y) / len(union) for name, x in union}


@register_defense("msd")
class MultiSteepestDescent(UnionTraining):
    """Trained on one perturbation that at every step follows the ball in which the loss rises most."""

    Hyper = UnionHyper

    def loss(self, batch: Batch, progress: float) -> Terms:
        """CE(x + delta), delta by multi steepest descent. Terms: adv_ce."""
        return {"adv_ce": self.mean_loss(self.steepest(batch, self.threats()), batch.y)}


def steepest_descent(
    value: Callable[[Tensor], Tensor],
    x: Tensor,
    threats: Sequence[Threat],
    sizes: Sequence[float],
    steps: int,
    rng: torch.Generator,
) -> Tensor:
    """At every step the steepest move of each ball, projected onto it; each image takes the one of largest value.

    Args:
        value: images -> (B,), to be raised.
        x: images, (B, ...), where all begin.
        threats, sizes: balls and lengths of a step in each, S of both.
        rng: draws how many coordinates share an l1 step.
    Returns:
        the point of largest value met by each image, in one of the balls and in the box, (B, ...).
    Source:
        Maini et al. 2020, Algorithm 1; l1 steps from their code.
    """
    best = x_adv = x.detach()
    with torch.no_grad():
        highest = value(best)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        gradient = torch.autograd.grad(value(x_adv).sum(), x_adv)[0]
        with torch.no_grad():
            moved = [
                threat.project(x_adv + size * direction(threat, gradient, x_adv, rng), x)
                for threat, size in zip(threats, sizes, strict=True)
            ]
            x_adv, reached = worst(moved, [value(candidate) for candidate in moved])
            best, highest = worst([best, x_adv], [highest, reached])
    return best


def direction(threat: Threat, gradient: Tensor, x_adv: Tensor, rng: torch.Generator) -> Tensor:
    """Where to step: the ball's ascent; in l1 shared by a few coordinates that are not held back by the box."""
    if threat.norm != "l1":
        return threat.ascent(gradient)
    free = torch.where(gradient > 0, x_adv < 1, x_adv > 0)
    low, high = SPARSITY
    return threat.ascent(gradient * free, int(torch.randint(low, high + 1, (), generator=rng, device=rng.device)))


def worst(candidates: Sequence[Tensor], losses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """For each image the candidate of largest loss, and that loss: S of (B, ...) and of (B,); the first of equals."""
    chosen, largest = candidates[0], losses[0]
    for candidate, loss in zip(candidates[1:], losses[1:], strict=True):
        higher = loss > largest
        chosen = torch.where(higher.view(-1, *[1] * (chosen.dim() - 1)), candidate, chosen)
        largest = torch.where(higher, loss, largest)
    return chosen, largest

"""DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles (Yang, Zhang, Dong, Inkawhich,
Gardner, Touchet, Wilkes, Berry, Li; NeurIPS 2020, arXiv:2009.14720).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensdef.architecture import Network
from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense, require
from ensdef.losses import member_cross_entropy
from ensdef.notation import at_least, relative
from ensdef.recipe import SGD_200
from ensdef.specs import TrainSpec
from ensdef.threat import Threat


@dataclass(frozen=True)
class DvergeHyper:
    """Hyper-parameters of ``dverge``.

    Args:
        distill_eps: linf radius of distillation in image units, whatever the training radius: 0.07 in the authors'
            code, 0.05 in iGAT's (8 members), 8/255 in CLDL's.
        distill_steps: 10 everywhere.
        distill_step_size: eps/10 of that radius; eps/4 in CLDL's code.
        adversarial: add the cross-entropy of every member on examples crafted against itself.
        distill_weight: c, of the distilled term beside the adversarial one; 1 in the authors' code.
        warm_start: begin with a trained ``nat`` ensemble, as the authors do; features of untrained networks say little
            about vulnerabilities.
    """

    distill_eps: float = 0.07
    distill_steps: int = 10
    distill_step_size: str = "eps/10"
    adversarial: bool = False
    distill_weight: float = 1.0
    warm_start: bool = True

    def __post_init__(self) -> None:
        step_size = relative(self.distill_step_size, 1.0, "distill_step_size")
        at_least("", distill_steps=(self.distill_steps, 0), distill_step_size=(step_size, 0))
        require(0 <= self.distill_eps <= 1, f"distill_eps is {self.distill_eps}; expected a radius in [0, 1]")
        at_least("", distill_weight=(self.distill_weight, 0))
        require(
            self.adversarial or self.distill_weight == 1,
            "distill_weight means nothing without adversarial=true; leave it out",
        )


@register_defense("dverge")
class DiversifyingVulnerabilities(EnsembleDefense):
    """Every member learns images in which the other members see something else."""

    # trains_on_attacks stays True without ``adversarial``: distillation has the inner attack's batch-norm mode
    Hyper = DvergeHyper
    recipe = SGD_200
    streams = 2
    deviations = (
        "Features are distilled with batch norm in eval mode; the authors' code uses batch statistics and lets the "
        "running ones follow (training: attack.batch_norm = 'train' gives theirs).",
    )

    #: Where features are compared: 1 (first convolution) to ``num_layers`` (logits), drawn anew every epoch.
    layer: int = 1

    def __init__(self, members: Sequence[nn.Module], hyper: Any = None) -> None:
        super().__init__(members, hyper)
        require(len(members) > 1, f"dverge with {len(members)} member: there is no other to learn from; use 2 or more")
        foreign = {type(member).__name__ for member in members if not isinstance(member, Network)}
        require(
            not foreign,
            f"dverge compares hidden features by layer; a member of type {', '.join(foreign)} has no numbered layers: "
            "use a registered architecture (a subclass of ensdef.architecture.Network)",
        )

    def loss(self, batch: Batch, progress: float) -> Terms:
        """Sum over members i of [c] sum over j != i of CE(z_i(x'_j), y) [+ CE(z_i(x_adv_i), y)].

        x'_j: the source image with the features of a target image in member j; y: the source's label. No term has two
        members' parameters, so one optimiser step moves each as the released code's own optimisers do.
        Terms: distilled_ce, adv_ce.
        """
        target, _ = batch.streams[0]
        distilled = [self.distill(member, batch.x, target) for member in self.members]
        attacked = [self.adversary(member, batch.x, batch.y) for member in self.members if self.hyper.adversarial]
        # one forward for every member and source: sources must not share batch-norm statistics
        crossing = torch.stack(
            [member(x) for j, x in enumerate(distilled) for i, member in enumerate(self.members) if i != j]
        )
        cross_entropies = member_cross_entropy(crossing, batch.y)
        terms = {"distilled_ce": self.hyper.distill_weight * cross_entropies.mean(dim=1).sum()}
        if attacked:
            own = torch.stack([member(x) for member, x in zip(self.members, attacked, strict=True)])
            terms["adv_ce"] = member_cross_entropy(own, batch.y).mean(dim=1).sum()
        return terms

    def distill(self, member: Network, source: Tensor, target: Tensor) -> Tensor:
        """Images near ``source`` that ``member`` sees as ``target`` in the present layer, (B, ...), detached."""
        net: Any = self.as_attacked(member)
        layer, eps = self.layer, self.hyper.distill_eps

        def wanted() -> Any:
            with torch.no_grad():
                return net.features(target, layer)

        # in train mode the target passes at every step, as in the released code: running statistics follow it
        fixed = None if net.training else wanted()

        def distance(x: Tensor) -> Tensor:
            features = net.features(x, layer)
            return feature_distance(features, wanted() if fixed is None else fixed)

        return self.adversary(
            distance,
            source,
            threat=Threat("linf", eps),
            steps=self.hyper.distill_steps,
            step_size=relative(self.hyper.distill_step_size, eps, "distill_step_size"),
            momentum=1.0,
            start="zero",
            descend=True,
        )

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        self.layer = int(torch.randint(1, self.members[0].num_layers + 1, (), generator=rng))

    @classmethod
    def prerequisites(cls, spec: TrainSpec) -> Mapping[str, TrainSpec]:
        return {"start": spec.derive("nat")} if spec.hyper.warm_start else {}

    def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:
        if self.hyper.warm_start:
            self.members.load_state_dict(prerequisites["start"].members.state_dict())


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of two images' features, each (B, ...) -> (B,).

    The sum, as in the paper, would craft the same images: steps follow signs, and momentum is normalised.
    """
    return F.mse_loss(features, target, reduction="none").flatten(1).mean(dim=1)

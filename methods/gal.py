"""Improving Adversarial Robustness of Ensembles with Diversity Training (Kariyappa, Qureshi; 2019, arXiv:1901.09981):
the gradient alignment loss, GAL. Values are those of its port in DVERGE's code; we know of no code by its authors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ensdef.defense import Batch, EnsembleDefense, MakeNetwork, Terms, register_defense, require
from ensdef.gradients import input_gradients, pairwise_cosines
from ensdef.losses import cross_entropy, member_cross_entropy
from ensdef.notation import at_least
from ensdef.recipe import Recipe


@dataclass(frozen=True)
class GalHyper:
    """Hyper-parameters of ``gal``.

    Args:
        coherence_weight: lambda; 0.5 in DVERGE's port and in TRS's.
        adversarial: add the cross-entropy on examples crafted against the averaged ensemble, as DVERGE's port does
            where asked to. The coherence is that of clean images in either case.
        reduction: of the members' cross-entropies; ``mean`` in DVERGE's port, ``sum`` in TRS's.
    """

    coherence_weight: float = 0.5
    adversarial: bool = False
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        at_least("", coherence_weight=(self.coherence_weight, 0))


@register_defense("gal")
class DiversityTraining(EnsembleDefense):
    """Members' input gradients point apart, so that one step does not raise all their losses."""

    Hyper = GalHyper
    recipe = Recipe(optimizer="adam", lr=1e-3, augment="+noise")
    deviations = (
        "One pass gives cross-entropy and input gradient, where DVERGE's port makes two: equal in value, but the "
        "running statistics move once a step, not twice.",
        "Cosines have no floor under the gradients' lengths, so confident examples count as any other.",
    )

    @classmethod
    def build(cls, make_network: MakeNetwork, members: int, num_classes: int, hyper: Any) -> EnsembleDefense:
        require(members >= 2, f"gal with {members} member has no two gradients to compare; use at least 2 members")
        return super().build(make_network, members, num_classes, hyper)

    @classmethod
    def network_params(cls, hyper: GalHyper) -> Mapping[str, Any]:
        return {"activation": "leaky_relu"}  # dead units have no input gradient to turn

    @classmethod
    def trains_on_attacks(cls, hyper: GalHyper) -> bool:
        return hyper.adversarial

    def loss(self, batch: Batch, progress: float) -> Terms:
        """mean CE + lambda log sum exp cos over pairs [+ mean CE on examples]. Terms: ce, coherence, adv_ce."""
        reduce = torch.sum if self.hyper.reduction == "sum" else torch.mean
        x = batch.x.detach().requires_grad_()
        losses = [cross_entropy(member(x), batch.y) for member in self.members]
        cosines = pairwise_cosines(input_gradients(losses, x))
        terms = {
            "ce": reduce(torch.stack(losses).mean(dim=1)),
            "coherence": self.hyper.coherence_weight * coherence(cosines).mean(),
        }
        if self.hyper.adversarial:
            x_adv = self.adversary(self, batch.x, batch.y)
            terms["adv_ce"] = reduce(member_cross_entropy(self.member_logits(x_adv), batch.y).mean(dim=1))
        return terms


def coherence(cosines: Tensor) -> Tensor:
    """Smooth maximum of the pairs' cosines, log sum exp, (P, B) -> (B,).

    Between ln P - 1/(K-1) and ln P + 1, where all K members are alike: a sum over pairs, not their mean.
    Source: Kariyappa and Qureshi 2019, without the offset of 1e-20 in the logarithm, whose argument is at least 1/e.
    """
    return torch.logsumexp(cosines, dim=0)

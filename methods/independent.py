"""Towards Deep Learning Models Resistant to Adversarial Attacks (Madry et al., ICLR 2018, arXiv:1706.06083), for each
member by itself: what as many networks achieve that know nothing of each other.

``adv_en`` attacks the ensemble as a whole, so its members are trained together; here nothing joins them before the
answer. A method that makes members work together has to do better than this at the same cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense
from ensdef.losses import member_cross_entropy
from ensdef.recipe import SGD_200


@dataclass(frozen=True)
class IndependentHyper:
    """Hyper-parameters of ``independent``.

    Args:
        clean_term: add every member's cross-entropy on clean images with weight 1.
    """

    clean_term: bool = False


@register_defense("independent")
class Independent(EnsembleDefense):
    """Members adversarially trained by themselves, each against its own attacks; probabilities are averaged."""

    Hyper = IndependentHyper
    recipe = SGD_200

    def loss(self, batch: Batch, progress: float) -> Terms:
        """Sum over members n of CE(z_n(x_n), y) [+ CE(z_n(x), y)], x_n = PGD on member n. Terms: adv_ce, ce.

        A sum, so that every member gets the gradient that it would have alone; optimisers keep state per parameter.
        """
        crafted = [self.adversary(member, batch.x, batch.y) for member in self.members]
        logits = torch.stack([member(x) for member, x in zip(self.members, crafted, strict=True)])
        terms = {"adv_ce": member_cross_entropy(logits, batch.y).mean(dim=1).sum()}
        if self.hyper.clean_term:
            terms["ce"] = member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1).sum()
        return terms

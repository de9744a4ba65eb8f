"""Improving Adversarial Robustness via Promoting Ensemble Diversity (Pang, Xu, Du, Chen, Zhu; ICML 2019,
arXiv:1901.08846): adaptive diversity promoting, ADP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ensdef import combine
from ensdef.defense import Batch, EnsembleDefense, MakeNetwork, Terms, register_defense, require
from ensdef.losses import entropy, member_cross_entropy
from ensdef.recipe import InnerAttack, Recipe


@dataclass(frozen=True)
class AdpHyper:
    """Hyper-parameters of ``adp``.

    Args:
        entropy_weight: alpha; 2 in the paper and in every command of its code (the code's flag defaults to 1).
        logdet_weight: beta; 0.5.
        det_offset: added to the Gram diagonal, 1e-6 in the authors' code; bounds the penalty of identical members.
        adversarial: what is trained on examples crafted against the averaged ensemble. ``full``: the whole loss once
            more (authors' code, CCE); ``ce``: only the members' cross-entropies (DVERGE's port); ``none``: nothing.
    """

    entropy_weight: float = 2.0
    logdet_weight: float = 0.5
    det_offset: float = 1e-6
    adversarial: Literal["full", "ce", "none"] = "full"


@register_defense("adp")
class AdaptiveDiversityPromoting(EnsembleDefense):
    """Members agree on the label and spread their wrong-class probabilities in different directions."""

    Hyper = AdpHyper
    recipe = Recipe(
        optimizer="adam",
        lr=1e-3,
        weight_decay=2e-4,  # Keras adds 1e-4 ||w||^2, whose gradient is 2e-4 w
        epochs=180,
        batch_size=64,
        milestones=(80 / 180, 120 / 180, 160 / 180),
        attack=InnerAttack(steps=10, step_size="eps/10"),
    )
    deviations = (
        "The authors' adversarial script subtracts the pixel mean twice; here images stay in [0, 1].",
        "Attacks use the true label; the authors' code attacks the predicted one.",
        "Weight decay reaches all parameters, not convolution kernels alone; last epoch, not best test epoch.",
        "The training radius is the run's, not U(0.01, 0.05), and augmentation the data set's, not flip and 10 % shift "
        "(--train-eps 'uniform(0.01,0.05)' and training: augment = 'shift+flip' give the authors').",
    )

    @classmethod
    def build(cls, make_network: MakeNetwork, members: int, num_classes: int, hyper: Any) -> EnsembleDefense:
        require(
            members <= num_classes - 1,
            f"adp with {members} members on {num_classes} classes: that many directions do not fit into the "
            f"{num_classes - 1} wrong classes, the determinant is 0; use at most {num_classes - 1} members",
        )
        return super().build(make_network, members, num_classes, hyper)

    @classmethod
    def trains_on_attacks(cls, hyper: AdpHyper) -> bool:
        return hyper.adversarial != "none"

    def loss(self, batch: Batch, progress: float) -> Terms:
        """sum CE - alpha H(mean p) - beta log det, on clean and (``full``) adversarial images.

        Terms: ce, entropy, logdet, and the same with adv_ in front.
        """
        terms = self._terms(batch.x, batch.y)
        if self.hyper.adversarial != "none":
            x_adv = self.adversary(self, batch.x, batch.y)
            if self.hyper.adversarial == "full":
                terms |= {f"adv_{name}": value for name, value in self._terms(x_adv, batch.y).items()}
            else:
                terms["adv_ce"] = member_cross_entropy(self.member_logits(x_adv), batch.y).mean(dim=1).sum()
        return terms

    def _terms(self, x: Tensor, y: Tensor) -> Terms:
        return adp_terms(self.member_logits(x), y, self.hyper)


def adp_terms(logits: Tensor, y: Tensor, hyper: AdpHyper) -> Terms:
    """The ADP loss of a batch, (K, B, C) and (B,), as signed, weighted scalars ce, entropy, logdet.

    Source: Pang et al. 2019, Eq. (7) and (8); cross-entropies summed over members as in their code.
    """
    return {
        "ce": member_cross_entropy(logits, y).mean(dim=1).sum(),
        "entropy": -hyper.entropy_weight * entropy(combine.mean_of_probabilities(logits)).mean(),
        "logdet": -hyper.logdet_weight * log_det_diversity(logits, y, hyper.det_offset).mean(),
    }


def log_det_diversity(logits: Tensor, y: Tensor, offset: float) -> Tensor:
    """Log-volume spanned by the members' predictions on the wrong classes.

    Args:
        logits: (K, B, C), any scale.
        y: labels, (B,).
        offset: added to the Gram diagonal.
    Returns:
        (B,), natural log of det(G + offset I); near 0 for orthogonal members, very negative for identical ones.
    Source:
        Pang et al. 2019, arXiv:1901.08846, Eq. (4); offset from the authors' code.
    """
    members, batch, classes = logits.shape
    wrong = logits.masked_select(
        torch.ones_like(logits, dtype=torch.bool).scatter(2, y.view(1, batch, 1).expand(members, batch, 1), False)
    ).view(members, batch, classes - 1)
    # float64: the offset is ten units in the last place of float32, and tiny negative determinants would give NaN;
    # relative to the largest wrong class: probabilities themselves underflow when the true class nears 1
    scaled = (wrong.double() - wrong.double().amax(dim=2, keepdim=True)).exp()
    directions = scaled / torch.linalg.vector_norm(scaled, dim=2, keepdim=True)
    gram = torch.einsum("ibc,jbc->bij", directions, directions)
    eye = torch.eye(members, dtype=gram.dtype, device=gram.device)
    log_volume: Tensor = torch.linalg.slogdet(gram + offset * eye).logabsdet
    return log_volume.to(logits.dtype)

"""Improving Ensemble Robustness by Collaboratively Promoting and Demoting Adversarial Robustness (Bui, Le, Zhao,
Montague, deVel, Abraham, Phung; AAAI 2021, arXiv:2009.09612): crossing collaborative ensemble, CCE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ensdef import combine
from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense, require
from ensdef.losses import entropy, member_cross_entropy
from ensdef.recipe import InnerAttack, Recipe

Indicator = Literal["soft", "hard", "no_sg"]


@dataclass(frozen=True)
class CceHyper:
    """Hyper-parameters of ``cce``.

    Args:
        mode: lambda_pm and lambda_dm of the paper's variants. ``rm`` (robust, its main method): 1 and 1; ``dm``
            (detects attacks, but does not withstand them): 0 and 5; ``base``: 0 and 0, which is what the documented
            command of the released code trains.
        promote_weight, demote_weight: lambda_pm and lambda_dm; None: the mode's.
        indicator: whether a member withstands another's example. ``soft``: its true-class probability, detached
            (Eq. 5); ``hard``: 1 where it is right, else 0 (Eq. 1 and 2); ``no_sg``: the probability with its gradient,
            as in the released code, for ablation: promoting then lowers probabilities below 1/e.
    """

    mode: Literal["base", "rm", "dm"] = "rm"
    promote_weight: float | None = None
    demote_weight: float | None = None
    indicator: Indicator = "soft"

    def __post_init__(self) -> None:
        for name in ("promote_weight", "demote_weight"):
            weight = getattr(self, name)
            require(weight is None or weight >= 0, f"{name} is {weight}; expected at least 0")
        require(
            self.indicator == "soft" or any(self.weights),
            "indicator means nothing where promote_weight and demote_weight are 0; leave it out",
        )

    @property
    def weights(self) -> tuple[float, float]:
        """lambda_pm and lambda_dm."""
        promote, demote = {"base": (0.0, 0.0), "rm": (1.0, 1.0), "dm": (0.0, 5.0)}[self.mode]
        return (
            promote if self.promote_weight is None else self.promote_weight,
            demote if self.demote_weight is None else self.demote_weight,
        )


@register_defense("cce")
class CrossingCollaborativeEnsemble(EnsembleDefense):
    """Members learn their own adversarial examples; on another's they stay right, or else become uncertain."""

    Hyper = CceHyper
    recipe = Recipe(
        optimizer="adam",
        lr=1e-3,
        weight_decay=2e-4,  # Keras adds 1e-4 ||w||^2, whose gradient is 2e-4 w
        epochs=180,
        batch_size=64,
        milestones=(80 / 180, 120 / 180, 160 / 180),
        attack=InnerAttack(steps=10, step_size="eps/10"),  # for ResNet-20; eps/4 for the authors' own CNN
    )
    deviations = (
        "As in the paper, no gradient flows into the weights w and probabilities are softmaxed once; the released code "
        "differentiates w and applies a second softmax in the crossing terms.",
        "Attacks use the true label; the authors' code attacks the predicted one.",
        "Weight decay reaches all parameters, not convolution kernels alone.",
        "The training radius is the run's, not U(0.01, 0.05), and augmentation the data set's, not flip and 10 % shift "
        "(--train-eps 'uniform(0.01,0.05)' and training: augment = 'shift+flip' give the authors').",
    )

    def loss(self, batch: Batch, progress: float) -> Terms:
        """Sum over members n of CE(z_n(x), y) + CE(z_n(x_n), y), x_n = PGD on member n, + 1/(K-1) sum over i != n of
        lambda_pm w CE(z_n(x_i), y) - lambda_dm (1 - w) H(p_n(x_i)), w = p_n,y(x_i) (Eq. 5).

        Terms: ce, adv_ce, and where a lambda is not 0 promote, demote.
        """
        crafted = [self.adversary(member, batch.x, batch.y) for member in self.members]
        # K forwards on clean images and K^2 on crafted ones: sources must not share batch-norm statistics
        own = torch.stack([member(x) for member, x in zip(self.members, crafted, strict=True)])
        clean = self.member_logits(batch.x)
        terms = {
            "ce": member_cross_entropy(clean, batch.y).mean(dim=1).sum(),
            "adv_ce": member_cross_entropy(own, batch.y).mean(dim=1).sum(),
        }
        if len(crafted) > 1 and any(self.hyper.weights):
            crossing = torch.stack(
                [member(x) for i, x in enumerate(crafted) for n, member in enumerate(self.members) if n != i]
            )
            promote, demote = crossing_terms(crossing, batch.y, self.hyper.indicator)
            promoting, demoting = (weight / (len(crafted) - 1) for weight in self.hyper.weights)
            terms["promote"] = promoting * promote.mean(dim=1).sum()
            terms["demote"] = demoting * demote.mean(dim=1).sum()
        return terms


def crossing_terms(logits: Tensor, y: Tensor, indicator: Indicator) -> tuple[Tensor, Tensor]:
    """What a member should do on another's adversarial examples, as signed values to be lowered.

    Args:
        logits: of P pairs (member, source of the images), (P, B, C).
        y: labels, (B,).
        indicator: see :class:`CceHyper`.
    Returns:
        w CE and -(1 - w) H, each (P, B).
    Source:
        Bui et al. 2021, arXiv:2009.09612, Eq. (5).
    """
    losses = member_cross_entropy(logits, y)
    w = (logits.argmax(dim=2) == y).to(losses.dtype) if indicator == "hard" else (-losses).exp()
    if indicator == "soft":
        w = w.detach()
    return w * losses, -(1 - w) * entropy(combine.log_probs(logits))

"""Plain and adversarially trained ensembles: Madry et al., ICLR 2018, arXiv:1706.06083, applied to one network
(``adv``) or to the averaged ensemble as one target (``adv_en``, the baseline of CCE and of DVERGE's code); ``nat`` is
the undefended ensemble they are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense
from ensdef.losses import member_cross_entropy
from ensdef.recipe import SGD_200

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class NaturalHyper:
    """Hyper-parameters of ``nat``.

    Args:
        reduction: of the members' cross-entropies. ``sum`` gives every member the gradient it would have alone.
    """

    reduction: Reduction = "sum"


@dataclass(frozen=True)
class AdversarialHyper:
    """Hyper-parameters of ``adv`` and ``adv_en``.

    Args:
        clean_term: add the cross-entropy on clean images with weight 1, as CCE's code does; off in DVERGE's code and
            in Madry et al. The two conventions differ by several points of clean accuracy.
        reduction: of the members' cross-entropies (both released codes sum).
    """

    clean_term: bool = False
    reduction: Reduction = "sum"


def over_members(losses: Tensor, reduction: Reduction) -> Tensor:
    """(K, B) -> scalar: batch mean, then sum or mean over members."""
    return losses.mean(dim=1).sum() if reduction == "sum" else losses.mean()


@register_defense("nat")
class Natural(EnsembleDefense):
    """Members trained independently on clean images; probabilities are averaged."""

    Hyper = NaturalHyper
    recipe = SGD_200

    @classmethod
    def trains_on_attacks(cls, hyper: NaturalHyper) -> bool:
        return False

    def loss(self, batch: Batch, progress: float) -> Terms:
        """Sum over members of CE(z_i(x), y). Terms: ce."""
        return {"ce": over_members(member_cross_entropy(self.member_logits(batch.x), batch.y), self.hyper.reduction)}


@register_defense("adv_en")
class AdversarialEnsemble(EnsembleDefense):
    """Every member trained on examples crafted against the averaged ensemble."""

    Hyper = AdversarialHyper
    recipe = SGD_200
    deviations = (
        "Attacks use the true label; CCE's code attacks the predicted one (training: attack.label = 'predicted').",
    )

    def loss(self, batch: Batch, progress: float) -> Terms:
        """Sum over members of CE(z_i(x_adv), y) [+ CE(z_i(x), y)], x_adv = PGD on -log mean probability of y.

        Members' own cross-entropies, never that of the mean: the released codes agree on this. Terms: adv_ce, ce.
        """
        x_adv = self.adversary(self, batch.x, batch.y)
        # two passes: clean and adversarial images must not share batch-norm statistics
        terms = {"adv_ce": over_members(member_cross_entropy(self.member_logits(x_adv), batch.y), self.hyper.reduction)}
        if self.hyper.clean_term:
            clean = member_cross_entropy(self.member_logits(batch.x), batch.y)
            terms["ce"] = over_members(clean, self.hyper.reduction)
        return terms


@register_defense("adv")
class Adversarial(AdversarialEnsemble):
    """One network trained on examples crafted against itself (PGD adversarial training)."""

    fixed_members = 1

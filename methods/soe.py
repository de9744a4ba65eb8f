"""Synergy-of-Experts: Collaborate to Improve Adversarial Robustness (Cui, Tian, Zhang, Gong et al.; NeurIPS 2022),
in its earlier version CDA2: Collaborative Defense Against Adversarial Attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensdef import combine
from ensdef.architecture import Network
from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense, require
from ensdef.losses import member_cross_entropy, soft_minimum
from ensdef.recipe import Recipe


@dataclass(frozen=True)
class SoeHyper:
    """Hyper-parameters of ``soe``.

    Args:
        variant: ``paper``: soft-min surrogate over members, confidence head alone selects. ``code``: the released
            rule, cross-entropies weighted by the detached softmax of max probability x sigmoid(head), which selects.
        sigma: temperature of the soft minimum (paper variant). Not given in the papers; 0.5 is ours. At 1 the
            surrogate is the cross-entropy of the averaged ensemble minus ln K, so the method vanishes.
        phases: paper variant, ``submodel``: examples of each member; ``collaboration``: examples of the selected
            member; ``both`` in every batch, averaged (the papers do not state an order).
        reselect: in the collaboration phase, choose the attacked member anew at every attack step (released code)
            instead of once on the clean image (CDA2, Algorithm 1).
        head_weight: of the confidence heads' binary cross-entropy; 1 in paper and code.
        detach_head: keep the heads' loss out of the backbone (paper); the code variant never does.
        attack: code variant, ``together``: against the collaboration (released default); ``one_by_one``: against each
            member.
    """

    variant: Literal["paper", "code"] = "paper"
    sigma: float = 0.5
    phases: Literal["both", "submodel", "collaboration"] = "both"
    reselect: bool = False
    head_weight: float = 1.0
    detach_head: bool = True
    attack: Literal["together", "one_by_one"] = "together"

    def __post_init__(self) -> None:
        require(self.sigma > 0, f"sigma is {self.sigma}; expected a temperature above 0")
        idle = {"attack": "together"} if self.variant == "paper" else {
            "sigma": 0.5, "phases": "both", "reselect": False, "detach_head": True}  # fmt: skip
        for name, default in idle.items():
            require(getattr(self, name) == default, f"{name} means nothing in variant={self.variant}; leave it out")
        require(self.head_weight >= 0, f"head_weight is {self.head_weight}; expected at least 0")


class ConfidentMember(nn.Module):
    """A network with one more linear output: the logit of its own confidence, in the true class's probability."""

    def __init__(self, network: Network, detach: bool) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.embedding_size, 1)
        self.detach = detach

    def forward(self, x: Tensor, with_confidence: bool = False) -> Any:
        """Logits (B, C), or (logits, confidence logits (B,))."""
        if not with_confidence:
            return self.network(x)
        logits, embedding = self.network(x, with_embedding=True)
        return logits, self.head(embedding.detach() if self.detach and self.training else embedding).squeeze(1)


@register_defense("soe")
class SynergyOfExperts(EnsembleDefense):
    """Each image is learned by the members that handle it best; the most confident member answers."""

    Hyper = SoeHyper
    recipe = Recipe(epochs=100)
    combiner = "select"
    deviations = ("sigma = 0.5, the training attack and the order of the two phases are ours: the papers give none.",)

    @classmethod
    def build_member(cls, network: nn.Module, hyper: SoeHyper) -> nn.Module:
        assert isinstance(network, Network)
        return ConfidentMember(network, detach=hyper.detach_head and hyper.variant == "paper")

    # -- inference ----------------------------------------------------------------------------------------------

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Member logits (K, B, C) and confidence logits (K, B)."""
        logits, confidence = zip(*(member(x, with_confidence=True) for member in self.members), strict=True)
        return torch.stack(logits), torch.stack(confidence)

    def log_selection(self, logits: Tensor, confidence: Tensor) -> Tensor:
        """log of the score that selects, (K, B, C) and (K, B) -> (B, K)."""
        score = F.logsigmoid(confidence)
        if self.hyper.variant == "code":
            score = score + combine.log_probs(logits).amax(dim=2)
        return score.transpose(0, 1)

    def predict(self, x: Tensor) -> Tensor:
        """Log-probabilities of the member with the highest score, (B, C); the choice has no gradient."""
        logits, confidence = self.outputs(x)
        return combine.select(logits, self.log_selection(logits, confidence))

    def selection(self, x: Tensor) -> Tensor:
        return self.log_selection(*self.outputs(x))

    def views(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        def soft(x: Tensor, temperature: float) -> Tensor:
            logits, confidence = self.outputs(x)
            return combine.mixture(logits, self.log_selection(logits, confidence) / temperature)

        return {**super().views(), "soft_selection": lambda x: soft(x, 1.0), "sharp_selection": lambda x: soft(x, 0.1)}

    # -- training -----------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, progress: float) -> Terms:
        """Terms: surrogate, confidence (paper variant); weighted_ce, confidence (code variant)."""
        if self.hyper.variant == "code":
            return self._released_loss(batch)
        crafted: list[tuple[Tensor, float]] = []
        share = 0.5 if self.hyper.phases == "both" else 1.0
        if self.hyper.phases != "collaboration":
            weight = share / len(self.members)
            crafted += [(self.adversary(member, batch.x, batch.y), weight) for member in self.members]
        if self.hyper.phases != "submodel":
            crafted.append((self._attack_selected(batch.x, batch.y), share))
        terms = {
            "surrogate": torch.zeros((), device=batch.x.device),
            "confidence": torch.zeros((), device=batch.x.device),
        }
        for x_adv, weight in crafted:
            logits, confidence = self.outputs(x_adv)
            losses = member_cross_entropy(logits, batch.y)
            terms["surrogate"] = terms["surrogate"] + weight * soft_minimum(losses, self.hyper.sigma).mean()
            head = confidence_loss(confidence, logits, batch.y)
            terms["confidence"] = terms["confidence"] + weight * self.hyper.head_weight * head.mean()
        return terms

    def _attack_selected(self, x: Tensor, y: Tensor) -> Tensor:
        """Examples against the member that answers (CDA2, Algorithm 1, phase 2)."""
        if self.hyper.reselect:
            return self.adversary(self, x, y)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        with torch.no_grad():
            selection = self.selection(x)
        for module, mode in modes.items():  # not self.train(): what the trainer froze must stay in eval mode
            module.training = mode
        chosen = selection.argmax(dim=1)
        x_adv = x.clone()
        for index, member in enumerate(self.members):  # each image is attacked through its own member alone
            rows = (chosen == index).nonzero().squeeze(1)
            if len(rows):
                x_adv[rows] = self.adversary(member, x[rows], y[rows])
        return x_adv

    def _released_loss(self, batch: Batch) -> Terms:
        """Loss on clean plus loss on adversarial images, as the released code has it."""
        if self.hyper.attack == "together":
            x_adv, y_adv = self.adversary(self, batch.x, batch.y), batch.y
        else:
            x_adv = torch.cat([self.adversary(member, batch.x, batch.y) for member in self.members])
            y_adv = batch.y.repeat(len(self.members))
        terms: Terms = {}
        for prefix, x, y in (("", batch.x, batch.y), ("adv_", x_adv, y_adv)):
            logits, confidence = self.outputs(x)
            weighted, head = released_terms(logits, confidence, y)
            terms |= {
                f"{prefix}weighted_ce": weighted.mean(),
                f"{prefix}confidence": self.hyper.head_weight * head.mean(),
            }
        return terms


def confidence_loss(confidence: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of every head against its member's true-class probability, summed over members, (B,).

    Args:
        confidence: head logits, (K, B).
        logits: (K, B, C); no gradient flows into them.
        y: (B,).
    """
    target = (-member_cross_entropy(logits.detach(), y)).exp()
    return F.binary_cross_entropy_with_logits(confidence, target, reduction="none").sum(dim=0)


def released_terms(logits: Tensor, confidence: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy and score loss of the released code, each (B,).

    Score d = max probability x sigmoid(head). Weights are softmax over members of d, detached. The max probability is
    detached for images the member gets right, and only for those, so the score loss also trains the classifier.
    """
    log_probs = combine.log_probs(logits)
    largest = log_probs.amax(dim=2).exp()
    right = logits.argmax(dim=2) == y
    score = torch.where(right, largest.detach(), largest) * confidence.sigmoid()
    weights = score.detach().softmax(dim=0)
    losses = member_cross_entropy(logits, y)
    target = (-losses.detach()).exp()
    with torch.autocast(score.device.type, enabled=False):
        head = F.binary_cross_entropy(score.float().clamp(0, 1), target.float(), reduction="none")
    return (weights * losses).sum(dim=0), head.mean(dim=0)

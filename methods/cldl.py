"""Adversarial Ensemble Training by Jointly Learning Label Dependencies and Member Models (Wang, Liu; 2022,
arXiv:2206.14477): conditional label dependency learning, CLDL ("LSD" in its code).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensdef.combine import log_probs
from ensdef.defense import Batch, EnsembleDefense, MakeNetwork, Terms, register_defense, require
from ensdef.gradients import input_gradients, pairwise_cosines
from ensdef.notation import at_least
from ensdef.recipe import Recipe

#: Width of the members' features and of the class embeddings, for every architecture (released code).
FEATURES = 64


@dataclass(frozen=True)
class CldlHyper:
    """Hyper-parameters of ``cldl``.

    Args:
        variant: ``code``: the released loss; diversity of the confusion vectors u, averaged over images and classes
            before the exponential, and absolute cosines, their sum divided by the number of members. ``paper``: as
            iGAT, Eq. (18), restates the paper; diversity of the soft labels, image by image, and mean signed cosines.
            Opposed gradients then earn up to beta/(K-1), with three members more than the 1.6 nats that guessing
            costs, and members do give up accuracy.
        diversity_weight: alpha, of the soft labels' diversity; 2.
        alignment_weight: beta, of the gradients' cosine; 4.
        one_hot_weight: rho, of the one-hot label against the learned confusion; 4, and 3 on MNIST.
        adversarial: add the divergence on examples crafted, with hard labels, against the averaged ensemble.
    """

    variant: Literal["code", "paper"] = "code"
    diversity_weight: float = 2.0
    alignment_weight: float = 4.0
    one_hot_weight: float = 4.0
    adversarial: bool = False

    def __post_init__(self) -> None:
        at_least("", diversity_weight=(self.diversity_weight, 0), alignment_weight=(self.alignment_weight, 0))
        require(
            self.one_hot_weight > 1,
            f"one_hot_weight is {self.one_hot_weight}; expected more than 1, below which a soft label may prefer a "
            "wrong class",
        )


class FeatureMember(nn.Module):
    """A network whose outputs are a feature, and the classifier that reads it."""

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.classifier = nn.Sequential(nn.LeakyReLU(0.1), nn.Linear(FEATURES, num_classes))

    def forward(self, x: Tensor, with_feature: bool = False) -> Any:
        """Logits (B, C), or (logits, feature (B, 64))."""
        feature = self.network(x)
        logits = self.classifier(feature)
        return (logits, feature) if with_feature else logits


class LabelConfusion(nn.Module):
    """How much each class resembles an image, by the image's feature: (B, 64) -> log-probabilities (B, C)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(num_classes, FEATURES)
        self.project = nn.Linear(FEATURES, FEATURES)
        self.mix = nn.Linear(num_classes, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        classes = torch.tanh(self.project(self.classes.weight))
        return log_probs(self.mix(feature @ classes.T).double())


@register_defense("cldl")
class ConditionalLabelDependencyLearning(EnsembleDefense):
    """Members learn soft labels of their own, from a shared label model, that differ; their gradients point apart."""

    Hyper = CldlHyper
    recipe = Recipe(optimizer="adam", lr=1e-3, augment="+noise")
    batch_coupled = True  # variant=code: the logarithm of an exponential of a batch mean
    deviations = (
        "The loss is that of the released code; the paper's, as restated by iGAT, is cldl[variant=paper].",
        "One pass gives logits and feature, where the released code runs the backbone twice.",
        "Logarithms are exact, without the offsets of 1e-6 and 1e-30; cosines have no floor under the lengths.",
    )

    def __init__(self, members: Sequence[nn.Module], hyper: Any, label_model: LabelConfusion) -> None:
        super().__init__(members, hyper)
        self.label_model = label_model

    @classmethod
    def build(cls, make_network: MakeNetwork, members: int, num_classes: int, hyper: Any) -> EnsembleDefense:
        require(members >= 2, f"cldl with {members} member has no two soft labels to compare; use at least 2 members")
        networks = [FeatureMember(make_network(FEATURES), num_classes) for _ in range(members)]
        return cls(networks, hyper, LabelConfusion(num_classes))

    @classmethod
    def network_params(cls, hyper: CldlHyper) -> Mapping[str, Any]:
        return {"activation": "leaky_relu"}

    @classmethod
    def trains_on_attacks(cls, hyper: CldlHyper) -> bool:
        return hyper.adversarial

    def loss(self, batch: Batch, progress: float) -> Terms:
        """mean KL(s || p) - alpha diversity + beta alignment [+ mean KL on examples].

        Terms: kl, diversity, alignment, adv_kl.
        """
        hyper, y = self.hyper, batch.y
        x = batch.x.detach().requires_grad_()
        divergences, confusion, soft = self.divergences(x, y)
        cosines = pairwise_cosines(input_gradients(divergences, x))
        if hyper.variant == "paper":
            diversity = log_mean_exp(pairwise_divergences(wrong_classes(soft, y))).mean()
            alignment = cosines.mean()
        else:
            per_entry = pairwise_divergences(wrong_classes(confusion, y)).mean(dim=1) / (soft.shape[2] - 1)
            diversity = log_mean_exp(per_entry)
            alignment = cosines.abs().mean(dim=1).sum() / len(self.members)
        terms = {
            "kl": torch.stack(divergences).mean(),
            "diversity": -hyper.diversity_weight * diversity,
            "alignment": hyper.alignment_weight * alignment,
        }
        if hyper.adversarial:
            terms["adv_kl"] = torch.stack(self.divergences(self.adversary(self, batch.x, y), y)[0]).mean()
        return terms

    def divergences(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """KL(s || p) of every member, K of (B,); logarithms of confusion u and of soft labels s, (K, B, C)."""
        divergences, confusion, soft = [], [], []
        for member in self.members:
            logits, feature = member(x, with_feature=True)
            confusion.append(self.label_model(feature))
            soft.append(soft_labels(confusion[-1], y, self.hyper.one_hot_weight))
            divergences.append((soft[-1].exp() * (soft[-1] - log_probs(logits.double()))).sum(dim=1))
        return divergences, torch.stack(confusion), torch.stack(soft)


def soft_labels(log_confusion: Tensor, y: Tensor, one_hot_weight: float) -> Tensor:
    """log s of s = softmax(u + rho onehot(y)), (B, C) and (B,) -> (B, C); u is a distribution, so s stays near y."""
    one_hot = F.one_hot(y, log_confusion.shape[1]).to(log_confusion)
    return log_probs(log_confusion.exp() + one_hot_weight * one_hot)


def wrong_classes(values: Tensor, y: Tensor) -> Tensor:
    """Entries of all classes but the true one, (K, B, C) and (B,) -> (K, B, C-1); of s, all but the largest."""
    members, batch, classes = values.shape
    return values[:, F.one_hot(y, classes) == 0].view(members, batch, classes - 1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits over the last dimension; what is compared need not sum to 1."""
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    both = log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)
    return both.sum(dim=-1) / (2 * math.log(2))


def pairwise_divergences(log_vectors: Tensor) -> Tensor:
    """Jensen-Shannon divergence of every two members, (K, B, n) -> (P, B)."""
    members = len(log_vectors)
    a, b = torch.triu_indices(members, members, offset=1, device=log_vectors.device)
    return jensen_shannon(log_vectors[a], log_vectors[b])


def log_mean_exp(values: Tensor) -> Tensor:
    """Smooth mean over pairs, nearer to the largest: (P, ...) -> (...)."""
    return torch.logsumexp(values, dim=0) - math.log(len(values))

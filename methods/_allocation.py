"""Who learns an adversarial example of the whole ensemble, and what a confident error costs: the terms of iGAT (Deng,
Mu; NeurIPS 2023, arXiv:2310.18477).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensdef import combine

#: The released code takes no probability in the penalty for more than 0.99.
LARGEST_PENALTY = -math.log(1 - 0.99)


def draw_probabilities(scores: Tensor, rule: str) -> Tensor:
    """Each member's chance to get an image, (K, B) -> (K, B); columns sum to 1.

    Args:
        scores: of the true class, on any monotone scale; of equal members the earlier ranks higher.
        rule: ``soft``: 2^(K - r) / (2^K - 1) for rank r = 1 (best), ..., K, Eq. (14); others see ``IgatHyper``.
    """
    members = len(scores)
    rank = 1 + scores.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    if rule == "soft":
        return torch.exp2(members - rank.to(scores.dtype)) / (2.0**members - 1)
    if rule == "random":
        return torch.full_like(scores, 1 / members)
    return (rank == (1 if rule == "hard" else members)).to(scores.dtype)


def misclassification_penalty(logits: Tensor, y: Tensor, wrong: Tensor, kind: str) -> Tensor:
    """-log(1 - p) of the members' most confident error where the ensemble is wrong, 0 elsewhere.

    Args:
        logits: (K, B, C).
        y: labels, (B,).
        wrong: whether the ensemble misclassifies, (B,) bool.
        kind: see ``IgatHyper``.
    Returns:
        (B,), at most -log 0.01 for each member that counts.
    Source:
        Deng and Mu 2023, Eq. (15); ``sum``, the left-out true class and the cap from the authors' code.
    """
    log_probs = combine.log_probs(logits)
    true = y.view(1, -1, 1).expand(len(logits), -1, 1)
    counted = log_probs if kind == "literal" else log_probs.scatter(2, true, -torch.inf)
    # log(1 - p) is the log-sum of the other classes: exact even where 1 - p has no digit left
    rest = log_probs.scatter(2, counted.argmax(dim=2, keepdim=True), -torch.inf).logsumexp(dim=2)
    penalty = -rest if kind == "sum" else -rest.min(dim=0, keepdim=True).values
    # the value alone is capped: a clamp would take the gradient from the worst errors
    penalty = penalty + (penalty.clamp(max=LARGEST_PENALTY) - penalty).detach()
    return penalty.sum(dim=0) * wrong

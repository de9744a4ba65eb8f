"""Per-example losses shared by defences and attacks: scores (B, C) and labels (B,) -> (B,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Keeps ratios of score differences finite where all scores are equal.
_TINY = 1e-12


def cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """-log softmax(scores)_y, natural log, (B,); scores may be logits or log-probabilities."""
    return F.cross_entropy(scores, y, reduction="none")


def member_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every member, (K, B, C) and (B,) -> (K, B)."""
    members, batch, classes = logits.shape
    return cross_entropy(logits.reshape(-1, classes), y.repeat(members)).view(members, batch)


def margin(scores: Tensor, y: Tensor) -> Tensor:
    """max over wrong classes minus the true class, (B,); positive = fooled.

    The true class is masked with -inf, not with 0: on log-probabilities 0 would always be the largest.
    """
    true = scores.gather(1, y[:, None]).squeeze(1)
    wrong = scores.scatter(1, y[:, None], -torch.inf)
    return wrong.amax(dim=1) - true


def targeted_margin(scores: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Target class minus true class, (B,)."""
    return (scores.gather(1, target[:, None]) - scores.gather(1, y[:, None])).squeeze(1)


def dlr(scores: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: margin over largest minus third largest score, (B,); positive = fooled.

    Shifting or scaling the scores leaves it unchanged. Needs three classes. Source: Croce and Hein, ICML 2020.
    """
    ordered = scores.topk(3, dim=1).values
    return margin(scores, y) / (ordered[:, 0] - ordered[:, 2] + _TINY)


def targeted_dlr(scores: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted margin over largest minus mean of third and fourth largest score, (B,).

    Needs four classes. Source: Croce and Hein, ICML 2020.
    """
    ordered = scores.topk(4, dim=1).values
    scale = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return targeted_margin(scores, y, target) / (scale + _TINY)


def entropy(log_probs: Tensor) -> Tensor:
    """Shannon entropy of log-probabilities over the last dimension, natural log; exact where a probability is 0."""
    return -(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(dim=-1)


def soft_minimum(losses: Tensor, sigma: float) -> Tensor:
    """-sigma log sum exp(-losses / sigma) over members, (K, B) -> (B,).

    Between min - sigma ln K and min; no 1/K inside, so it can be negative. Its gradient with respect to the losses is
    softmax(-losses / sigma). Source: CDA2, Eq. (8), with its sigma where the paper prints delta.
    """
    return -sigma * torch.logsumexp(-losses / sigma, dim=0)

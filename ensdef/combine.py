"""Inference rules of an ensemble, exact in log space: (K, B, C) member logits -> (B, C) log-scores.

No probability is ever formed and clamped: below 1e-38 float32 has nothing left to take the logarithm of, and a clamp
has no gradient where it bites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over classes, any leading shape."""
    return F.log_softmax(logits, dim=-1)


def mean_of_probabilities(logits: Tensor) -> Tensor:
    """log of the mean member probability: rows are normalised log-probabilities."""
    return torch.logsumexp(log_probs(logits), dim=0) - math.log(logits.shape[0])


def mean_of_logits(logits: Tensor) -> Tensor:
    """Mean member logit."""
    return logits.mean(dim=0)


def max_probability(logits: Tensor) -> Tensor:
    """log of the largest member probability of each class; rows are not normalised (iGAT's max combiner)."""
    return log_probs(logits).amax(dim=0)


def vote(logits: Tensor) -> Tensor:
    """Number of members that choose a class, ties broken by the mean probability (which is the only gradient)."""
    votes = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).sum(dim=0).to(logits.dtype)
    return votes + 0.5 * mean_of_probabilities(logits).exp()


def select(logits: Tensor, selection: Tensor) -> Tensor:
    """Log-probabilities of the member with the highest selection score.

    Args:
        logits: (K, B, C).
        selection: (B, K), any monotone score; the choice itself has no gradient.
    """
    chosen = selection.argmax(dim=1)
    return log_probs(logits)[chosen, torch.arange(logits.shape[1], device=logits.device)]


def mixture(logits: Tensor, log_weights: Tensor) -> Tensor:
    """log of the weighted mean member probability, with gradient to weights and members.

    Args:
        logits: (K, B, C).
        log_weights: (B, K), unnormalised; normalised over K here.
    """
    weights = F.log_softmax(log_weights, dim=1).transpose(0, 1)
    return torch.logsumexp(log_probs(logits) + weights[..., None], dim=0)


#: Rules that replace a defence's own at evaluation (``--combiner``).
COMBINERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "avg": mean_of_probabilities,
    "max": max_probability,
    "vote": vote,
}

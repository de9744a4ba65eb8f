"""What distributing adversarial images over members changes: iGAT's supplement, Tables 4 to 8.

Understanding and Improving Ensemble Adversarial Defense (Deng, Mu; NeurIPS 2023, arXiv:2310.18477). The paper's images
are PGD examples crafted on the averaging ensemble, CIFAR-10, 8 members. Every function takes member logits (K, N, C) on
them and labels (N,), and gives NaN where nothing is left to average over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensdef import combine
from ensdef.diagnostics.answers import right

#: Inner edges of Table 5's bins; a bin holds its lower edge.
EDGES = (0.5, 0.6, 0.7, 0.8, 0.9)


def member_accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of (member, image) pairs in which the member is right (Table 4)."""
    return float(right(logits, y).double().mean())


def true_probability_histogram(logits: Tensor, y: Tensor) -> Tensor:
    """How sure members are where they are right (Table 5).

    Returns:
        shares of the pairs with the member right, (6,), in bins of its true-class probability: below 0.5,
        [0.5, 0.6), [0.6, 0.7), [0.7, 0.8), [0.8, 0.9), [0.9, 1].
    """
    sure = _true(_probabilities(logits), y)[right(logits, y)]
    edges = torch.tensor(EDGES, dtype=sure.dtype, device=sure.device)
    counts = torch.bincount(torch.bucketize(sure, edges, right=True), minlength=len(EDGES) + 1)
    return counts.double() / len(sure)


def largest_wrong_probability(logits: Tensor, y: Tensor) -> float:
    """Mean over members and images of the largest wrong-class probability, in [0, 1] (Table 6)."""
    return float(_probabilities(logits).scatter(2, _index(logits, y), -1.0).amax(dim=2).mean())


def recoverable_share(logits: Tensor, y: Tensor) -> float:
    """Share of the pairs with the member wrong in which p_y >= (1 - p_top) / (C - 1) (Table 7).

    There the true class holds at least an even part of what the top class leaves. Conditioned on errors as the table's
    caption says; its formula averages over all pairs.
    """
    probabilities = _probabilities(logits)
    top = probabilities.argmax(dim=2, keepdim=True)
    # summed, not 1 - p_top: with two classes both sides are the same number and must compare as equal
    rest = probabilities.scatter(2, top, 0.0).sum(dim=2)
    enough = _true(probabilities, y) * (logits.shape[2] - 1) >= rest
    return float(enough[~right(logits, y)].double().mean())


def best_true_probability(logits: Tensor, scores: Tensor, y: Tensor) -> float:
    """Mean of the members' largest true-class probability over images that the ensemble gets wrong (Table 8).

    Args:
        logits: (K, N, C).
        scores: of the ensemble, (N, C); the paper's is ``ensdef.combine.mean_of_probabilities(logits)``.
        y: (N,).
    """
    return float(_true(_probabilities(logits), y).amax(dim=0)[~right(scores, y)].mean())


def _probabilities(logits: Tensor) -> Tensor:
    return combine.log_probs(logits.double()).exp()


def _true(probabilities: Tensor, y: Tensor) -> Tensor:
    """p_y of every member, (K, N)."""
    return probabilities.gather(2, _index(probabilities, y)).squeeze(2)


def _index(values: Tensor, y: Tensor) -> Tensor:
    """Positions of the labels for gather and scatter on (K, N, C), (K, N, 1)."""
    return y.view(1, -1, 1).expand(len(values), -1, 1)

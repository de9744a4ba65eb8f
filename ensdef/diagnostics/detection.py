"""Telling adversarial images from clean ones by how undecided the ensemble is.

CCE (Bui et al., AAAI 2021, arXiv:2009.09612), the detection experiment of its demoting mode: receiver operating
characteristic over all thresholds of an entropy; positives are the adversarial images.
"""

from __future__ import annotations

import torch
from sklearn import metrics
from torch import Tensor

from ensdef import combine
from ensdef.losses import entropy


def entropy_score(logits: Tensor) -> Tensor:
    """Entropy of the mean member probability in nats, (K, N, C) -> (N,), between 0 and ln C; high = suspicious.

    An attacker who also lowers this entropy is not part of the paper's experiment.
    """
    return entropy(combine.mean_of_probabilities(logits))


def detection_auc(clean: Tensor, adversarial: Tensor) -> float:
    """Area under the curve: P(adversarial score > clean score) + P(tie) / 2.

    Args:
        clean, adversarial: scores, (N,) and (M,), both at least 1.
    """
    return float(metrics.roc_auc_score(*_labelled(clean, adversarial)))


def detection_stderr(clean: Tensor, adversarial: Tensor) -> float:
    """Standard error of :func:`detection_auc` where row i of both is the same image, NaN below two images.

    Each image's contribution is the share of attacked scores above its clean one plus the share of clean scores below
    its attacked one (ties count half); images are independent, the two shares of one image are not.
    Source: DeLong, DeLong and Clarke-Pearson 1988, for one curve and paired samples.

    Args:
        clean, adversarial: scores, (N,) and (N,).
    """
    assert clean.shape == adversarial.shape, (clean.shape, adversarial.shape)
    clean, adversarial = clean.double(), adversarial.double()
    above = 1 - _share_below(clean, adversarial)
    below = _share_below(adversarial, clean)
    return float((above + below).std() / len(clean) ** 0.5) if len(clean) > 1 else float("nan")


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Share of ``others`` below every score, ties as half, (N,) and (M,) -> (N,)."""
    ordered = others.sort().values
    left, right = (torch.searchsorted(ordered, scores, right=flag) for flag in (False, True))
    return (left + right) / (2.0 * len(others))


def roc_points(clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False positive rates, true positive rates and thresholds, each (R,) float64, from (0, 0) to (1, 1).

    An image counts as adversarial when its score is at least the threshold; the first threshold is infinite.
    """
    rates = metrics.roc_curve(*_labelled(clean, adversarial), drop_intermediate=False)
    false_positive, true_positive, thresholds = (torch.from_numpy(part) for part in rates)
    return false_positive, true_positive, thresholds.double()


def _labelled(clean: Tensor, adversarial: Tensor) -> tuple[object, object]:
    positive = torch.cat([torch.zeros(len(clean)), torch.ones(len(adversarial))])
    return positive.numpy(), torch.cat([clean, adversarial]).detach().double().cpu().numpy()

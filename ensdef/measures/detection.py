"""CCE: Improving Ensemble Robustness by Collaboratively Promoting and Demoting Adversarial Robustness (Bui et al., AAAI
2021, arXiv:2009.09612), Figures 3 and 4 and the text on its demoting mode.

Attacked images told from clean ones by how undecided the ensemble is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensdef.diagnostics.answers import answer
from ensdef.diagnostics.detection import detection_auc, detection_stderr, entropy_score, roc_points
from ensdef.measure import Measured, Subject, register_measure
from ensdef.measures._crafting import OnView

#: Bins of the entropy histograms.
BINS = 30


@register_measure("detection")
class Detection(OnView):
    """Area under the curve of the entropy of the mean prediction, attacked images against clean ones.

    Values: ``auc`` (fraction), ``clean_entropy`` and ``attacked_entropy`` (means, nats). Series: the corners of the
    curve, ``false_positive_rate`` and ``true_positive_rate``; histograms ``clean`` and ``attacked`` (shares of images)
    of the entropy between ``edges`` (nats).
    """

    def measure(self, subject: Subject) -> Measured:
        x_adv = self.params.craft(subject, self.params.view)
        logits = [answer(subject.defense, images).logits for images in (subject.x, x_adv)]
        clean, attacked = (entropy_score(part).double().cpu() for part in logits)
        false_positive, true_positive, _ = roc_points(clean, attacked)
        corners = _corners(false_positive, true_positive)
        largest = math.log(logits[0].shape[-1])
        return Measured(
            {
                "auc": detection_auc(clean, attacked),
                "clean_entropy": float(clean.mean()),
                "attacked_entropy": float(attacked.mean()),
            },
            stderr={
                "auc": detection_stderr(clean, attacked),
                **{
                    f"{name}_entropy": float(scores.std() / len(scores) ** 0.5)
                    for name, scores in (("clean", clean), ("attacked", attacked))
                },
            },
            series={
                "false_positive_rate": false_positive[corners].tolist(),
                "true_positive_rate": true_positive[corners].tolist(),
                "edges": torch.linspace(0, largest, BINS + 1).tolist(),
                "clean": _histogram(clean, largest).tolist(),
                "attacked": _histogram(attacked, largest).tolist(),
            },
        )


def _corners(false_positive: Tensor, true_positive: Tensor) -> Tensor:
    """Points of a curve that do not lie on the line between their neighbours, ends included, (R,) bool."""
    keep = torch.ones(len(false_positive), dtype=torch.bool)
    across, up = false_positive.diff(), true_positive.diff()
    # rates are multiples of 1/N, so that a turn is at least 1/N^2
    keep[1:-1] = (across[:-1] * up[1:] - across[1:] * up[:-1]).abs() > 1e-12
    return keep


def _histogram(scores: Tensor, largest: float) -> Tensor:
    """Shares of scores in equal bins between 0 and ``largest``, (N,) -> (BINS,)."""
    bins = (scores / largest * BINS).long().clamp(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS).double() / len(scores)

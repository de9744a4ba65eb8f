"""Who does what in an ensemble: each member alone, the best of them, and the one that answers.

Synergy of experts (Cui et al., NeurIPS 2022), its table of sub-models and the oracle of its Proposition 1; the
selection histogram, the agreement and the alarm for dead members are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.diagnostics.answers import answer, right
from ensdef.losses import member_cross_entropy
from ensdef.metrics import binomial_stderr
from ensdef.training_health import SIGNIFICANT, UNUSED


@dataclass(frozen=True)
class Roles:
    """Roles on one set of images, all fractions in [0, 1].

    Args:
        accuracy: of the defence's own rule.
        members: accuracy of every member alone, (K,).
        oracle: share of images that at least one member gets right; no selection can do better.
        selected: share of images that each member answers, (K,), sums to 1; None without a selection.
        agreement: share of images answered by a member of least cross-entropy; None without a selection.
    """

    accuracy: float
    members: Tensor
    oracle: float
    selected: Tensor | None
    agreement: float | None


def member_roles(defense: EnsembleDefense, x: Tensor, y: Tensor) -> Roles:
    """Roles on clean images, or on crafted ones (:func:`ensdef.diagnostics.craft`) for robust accuracies.

    Args:
        x, y: images, (N, ...), and labels, (N,).
    """
    answers = answer(defense, x)
    hits = right(answers.logits, y)
    selected = agreement = None
    if answers.selection is not None:
        chosen = answers.selection.argmax(dim=1)
        selected = torch.bincount(chosen, minlength=len(hits)).double() / len(y)
        losses = member_cross_entropy(answers.logits, y)
        agreement = _share(losses.gather(0, chosen[None])[0] == losses.amin(dim=0))
    return Roles(
        _share(right(answers.scores, y)), hits.double().mean(dim=1), _share(hits.any(dim=0)), selected, agreement
    )


def dead_members(clean: Roles, count: int, num_classes: int) -> Tensor | None:
    """Members that neither answer nor know anything, (K,) bool; None without a selection.

    Dead: selected on fewer than 2 % of the images, and clean accuracy at most 3 standard errors above chance. Being
    selected seldom is not enough, nor is a low accuracy: members of a working ensemble may be specialised.

    Args:
        clean: roles on clean images.
        count: number of those images, N.
        num_classes: C; chance is 1 / C.
    """
    if clean.selected is None:
        return None
    chance = 1 / num_classes
    ignorant = clean.members <= chance + SIGNIFICANT * binomial_stderr(chance, count)
    return (clean.selected < UNUSED) & ignorant


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())

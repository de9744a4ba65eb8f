"""An evaluation as the health report sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensdef.attack_spec import AttackSpec
from ensdef.health.observer import Observer
from ensdef.target import Target, Traits


@dataclass
class Case:
    """One attack on one model that has ended.

    Args:
        model: as its owner handed it over; it is only looked at.
        judge: its frozen copy, without folding, on whose answers success was judged.
        traits: of the copy.
        x, y: all images, (N, ...), and labels, (N,).
        scores: clean scores, (N, C).
        clean, robust: right on the clean image; right after the attack too, (N,) bool.
        x_adv: the points the attack left, (N, ...).
        spec: the attack.
        batch_size: images a pass.
        forwards: member passes of the attack, summed over images.
        observer: what was seen on the way.
        warnings: of the attack.
    """

    model: nn.Module
    judge: Target
    traits: Traits
    x: Tensor
    y: Tensor
    scores: Tensor
    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    spec: AttackSpec
    batch_size: int
    forwards: int
    observer: Observer
    warnings: Sequence[str] = ()

    @property
    def n(self) -> int:
        return len(self.y)

    def answer(self, x: Tensor) -> Tensor:
        """Scores of the true model in a fresh pass over exactly this batch, without gradient."""
        self.judge.forget()
        with torch.no_grad():
            scores: Tensor = self.judge(x).detach().clone()
        self.judge.forget()
        return scores

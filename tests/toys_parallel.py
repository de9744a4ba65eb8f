"""A plug-in file: defences whose images do not all get the same treatment, for trainings on several devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense
from ensdef.losses import member_cross_entropy


class WithLuckyImage(EnsembleDefense):
    """A plain ensemble, in which training image 0 is special: in every batch but one a process does not have it."""

    epoch = 0

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        self.epoch = epoch

    def lucky(self, batch: Batch) -> bool:
        return self.epoch == 1 and bool((batch.ids == 0).any())

    def plain(self, batch: Batch) -> Terms:
        return {"ce": member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1).sum()}


@register_defense("toy_everything")
class Everything(WithLuckyImage):
    """Adversarial training in two steps a batch, with a second stream, and a weight that only image 0 moves."""

    streams = 2

    def __init__(self, members: Any, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.seldom = nn.Parameter(torch.ones(()))

    def loss(self, batch: Batch, progress: float) -> Iterator[Terms]:
        x_adv = self.adversary(self, batch.x, batch.y)
        terms = {"adv_ce": member_cross_entropy(self.member_logits(x_adv), batch.y).mean(dim=1).sum()}
        has = batch.ids == 0
        if bool(has.any()):  # elsewhere it has no gradient: momentum and weight decay must not move it either
            terms["adv_ce"] = terms["adv_ce"] + (self.seldom * has).mean()
        yield terms
        x, y = batch.streams[0]
        yield {"other_ce": 0.5 * member_cross_entropy(self.member_logits(x), y).mean()}


@register_defense("toy_breaking")
class Breaking(WithLuckyImage):
    """A term is no number where image 0 is, in the second epoch."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        terms = self.plain(batch)
        return {"ce": terms["ce"] * (float("nan") if self.lucky(batch) else 1.0)}


@register_defense("toy_parting")
class Parting(WithLuckyImage):
    """One optimiser step more where image 0 is, in the second epoch."""

    def loss(self, batch: Batch, progress: float) -> Iterator[Terms]:
        yield self.plain(batch)
        if self.lucky(batch):
            yield self.plain(batch)


@register_defense("toy_raising")
class Raising(WithLuckyImage):
    """Gives up where image 0 is, in the second epoch."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        if self.lucky(batch):
            raise ZeroDivisionError("image 0")
        return self.plain(batch)


@register_defense("toy_coupled")
class Coupled(WithLuckyImage):
    """A loss that is no mean over examples."""

    batch_coupled = True

    def loss(self, batch: Batch, progress: float) -> Terms:
        return {"ce": self.plain(batch)["ce"].exp()}

"""A trained defence whose members answer by another rule (``--combiner``), as a defence of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ensdef.combine import COMBINERS
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import UsageError


class Recombined(EnsembleDefense):
    """The members and views of ``inner``, with ``predict`` replaced; it cannot be trained.

    Args:
        inner: a trained defence.
        rule: a name of :data:`ensdef.combine.COMBINERS`.
    """

    def __init__(self, inner: EnsembleDefense, rule: str) -> None:
        super().__init__([])
        if rule not in COMBINERS:
            raise UsageError(f"unknown combiner {rule!r}; expected native, {', '.join(COMBINERS)}")
        self.inner = inner
        self.rule = rule
        self.spec = inner.spec

    @property
    def members(self) -> Any:
        return self.inner.members

    def member_logits(self, x: Tensor) -> Tensor:
        return self.inner.member_logits(x)

    def predict(self, x: Tensor) -> Tensor:
        return COMBINERS[self.rule](self.member_logits(x))

    def views(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {**self.inner.views(), "predict": self.predict}

    def loss(self, batch: Batch, progress: float) -> Terms | Iterator[Terms]:
        raise UsageError(f"a defence recombined by {self.rule} is for evaluation; train the one inside it")


def recombined(defense: EnsembleDefense, rule: str) -> EnsembleDefense:
    """The defence itself for ``"native"``, else with its members answering by ``rule``."""
    return defense if rule == "native" else Recombined(defense, rule).eval()

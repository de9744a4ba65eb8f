"""Synergy-of-Experts (Cui et al., NeurIPS 2022), appendix, Table 2.

Each member beside the ensemble.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ensdef.diagnostics.answers import answer, right
from ensdef.measure import ON_ATTACKED_IMAGES, Dependency, Measured, Subject, register_measure
from ensdef.measures._crafting import OnView, ViewCrafting
from ensdef.metrics import binomial_stderr


@register_measure("member_accuracy")
class MemberAccuracy(OnView):
    """Accuracy of the ensemble and of every member alone, clean or on images crafted on the ensemble.

    Values, fractions: ``ensemble``, ``member1``, ``member2``, ...
    """

    @dataclass(frozen=True)
    class Params(ViewCrafting):
        attack: Literal["none", "pgd", "bim", "mim"] = "none"  # type: ignore[assignment]

    @classmethod
    def depends_on(cls, params: Any) -> frozenset[Dependency]:
        return ON_ATTACKED_IMAGES if params.attack != "none" else frozenset({"defense", "combiner", "images"})

    def measure(self, subject: Subject) -> Measured:
        x = subject.x if self.params.attack == "none" else self.params.craft(subject, self.params.view)
        answers = answer(subject.defense, x)
        named = {"ensemble": right(answers.scores, subject.y)}
        named |= {f"member{number}": hits for number, hits in enumerate(right(answers.logits, subject.y), start=1)}
        values = {name: float(hits.double().mean()) for name, hits in named.items()}
        return Measured(values, stderr={name: binomial_stderr(share, len(x)) for name, share in values.items()})

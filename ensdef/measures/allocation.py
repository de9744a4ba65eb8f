"""iGAT: Understanding and Improving Ensemble Adversarial Defense (Deng, Mu; NeurIPS 2023, arXiv:2310.18477),
supplement, Tables 4 to 8.

What distributing adversarial images over members changes.
"""

from __future__ import annotations

from ensdef import combine
from ensdef.diagnostics.allocation import (
    EDGES,
    best_true_probability,
    largest_wrong_probability,
    member_accuracy,
    recoverable_share,
    true_probability_histogram,
)
from ensdef.diagnostics.answers import answer
from ensdef.measure import Dependency, Measure, Measured, Subject, register_measure
from ensdef.measures._crafting import Crafting

#: Table 5's intervals of the true-class probability.
BINS = (f"<{EDGES[0]}", *(f"{low}-{high}" for low, high in zip(EDGES, (*EDGES[1:], 1.0), strict=True)))


@register_measure("allocation")
class Allocation(Measure):
    """How sure and how wrong members are on images crafted on their average.

    Values, fractions: ``member_accuracy`` (Table 4), shares of right answers by their probability ``<0.5``,
    ``0.5-0.6``, ..., ``0.9-1.0`` (Table 5), ``largest_wrong`` (Table 6), ``recoverable`` (Table 7) and ``best_true``
    (Table 8). Undefined where no answer is right, or none wrong.
    """

    Params = Crafting

    @classmethod
    def depends_on(cls, params: Crafting) -> frozenset[Dependency]:
        # the papers' images are crafted on the mean probability, whatever the defence answers
        return frozenset({"defense", "images", "radius", "seed"})

    def measure(self, subject: Subject) -> Measured:
        x_adv = self.params.craft(subject, "mean_probability")
        logits, y = answer(subject.defense, x_adv).logits, subject.y
        histogram = true_probability_histogram(logits, y).tolist()
        return Measured(
            {
                "member_accuracy": member_accuracy(logits, y),
                **dict(zip(BINS, histogram, strict=True)),
                "largest_wrong": largest_wrong_probability(logits, y),
                "recoverable": recoverable_share(logits, y),
                "best_true": best_true_probability(logits, combine.mean_of_probabilities(logits), y),
            }
        )

"""Synergy-of-Experts (Cui et al., NeurIPS 2022), appendix, Table 1; CCE (Bui et al., AAAI 2021, arXiv:2009.09612),
Table 9; iGAT (Deng, Mu; NeurIPS 2023, arXiv:2310.18477), supplement, Table 3 and text.

What a defence costs to train and to keep.
"""

from __future__ import annotations

from typing import Any

from ensdef.measure import Dependency, Measure, Measured, Subject, register_measure

#: Bytes of a float32, and of a megabyte as file managers and the SI count it.
FLOAT32, MEGABYTE = 4, 10**6


@register_measure("training_cost")
class TrainingCost(Measure):
    """Seconds of training as they were, and the size of the weights.

    Values: ``seconds`` of this training, ``seconds_with_prerequisites`` (and of those it started from),
    ``seconds_per_epoch``, ``seconds_per_1000_images`` (of one pass through as many), ``epochs``, ``parameters`` (of all
    parts, frozen ones included), ``model_size_mb`` (parameters as float32, in 10^6 bytes).
    """

    @classmethod
    def depends_on(cls, params: Any) -> frozenset[Dependency]:
        return frozenset({"defense"})

    def measure(self, subject: Subject) -> Measured:
        report = subject.report
        seconds, epochs = float(report["seconds"]), len(report["history"])
        parameters = sum(parameter.numel() for parameter in subject.defense.parameters())
        earlier = subject.earlier
        before = float("nan") if earlier is None else sum(float(one["seconds"]) for one in earlier)
        return Measured(
            {
                "seconds": seconds,
                "seconds_with_prerequisites": seconds + before,
                "seconds_per_epoch": seconds / epochs,
                "seconds_per_1000_images": 1000 * seconds / report["images_seen"],
                "epochs": epochs,
                "parameters": parameters,
                "model_size_mb": FLOAT32 * parameters / MEGABYTE,
            }
        )

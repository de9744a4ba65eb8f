"""Synergy-of-Experts (Cui et al., NeurIPS 2022), appendix 3.1, and its earlier version CDA2, section 4.2; iGAT (Deng,
Mu; NeurIPS 2023, arXiv:2310.18477), supplement.

Experiments small enough to be solved on paper; no defence is measured.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ensdef.diagnostics.synthetic import (
    igat_risk_pair,
    igat_risk_single,
    igat_toy_risks,
    xor_bayes_accuracy,
    xor_oracle_mse,
    xor_run,
)
from ensdef.measure import Dependency, Measure, Measured, Subject, register_measure
from ensdef.notation import at_least

#: Of the map of decision regions: half its side, points a side, and data points shown in it.
HALF_SIDE, GRID, SHOWN = 2.5, 51, 300
#: Points of the curves of risk.
CURVE = 101


@register_measure("xor")
class Xor(Measure):
    """Two linear experts with a gate against one linear average, on noisy XOR.

    Values: ``oracle_mse`` and ``accuracy`` (fraction) of the experts on fresh points, ``averaged_mse`` and
    ``averaged_accuracy`` of the average; ``opposite_mse``, of two opposite experts that answer a half-plane each, and
    ``bayes_accuracy``, which nothing exceeds but by chance. Series: signs of the answers on a map (y by x, both
    ``axis``), ``experts``, ``average``, and ``chosen`` (which expert answers); some ``points`` with their ``labels``.
    """

    @dataclass(frozen=True)
    class Params:
        """See :func:`ensdef.diagnostics.synthetic.xor_run`; the papers name the variance 0.1 and no other setting."""

        variance: float = 0.1
        sigma: float = 0.1
        bias: Literal["none", "zero", "normal"] = "none"
        count: int = 2000
        steps: int = 1500
        lr: float = 0.1

        def __post_init__(self) -> None:
            at_least("", variance=(self.variance, 0), sigma=(self.sigma, 1e-9), count=(self.count, 2))
            at_least("", steps=(self.steps, 1), lr=(self.lr, 0))

    @classmethod
    def depends_on(cls, params: Any) -> frozenset[Dependency]:
        return frozenset({"seed"})

    def measure(self, subject: Subject) -> Measured:
        run, variance = xor_run(subject.seed, **dataclasses.asdict(self.params)), self.params.variance
        axis = torch.linspace(-HALF_SIDE, HALF_SIDE, GRID)
        map_ = torch.cartesian_prod(axis, axis).flip(1)  # rows are y, columns x

        def on_map(values: torch.Tensor) -> list[object]:
            signs: list[object] = values.long().view(GRID, GRID).tolist()
            return signs

        result = run.result()
        return Measured(
            {
                **dataclasses.asdict(result),
                "opposite_mse": xor_oracle_mse(variance),
                "bayes_accuracy": xor_bayes_accuracy(variance) if variance else 1.0,
            },
            series={
                "axis": axis.tolist(),
                "experts": on_map(run.answer(map_).sign()),
                "average": on_map(run.average(map_).sign()),
                "chosen": on_map(run.experts.choose(map_)),
                "points": run.x[:SHOWN].tolist(),
                "labels": run.y[:SHOWN].long().tolist(),
            },
            n=self.params.count,
        )


@register_measure("igat_toy")
class TwoPoints(Measure):
    """Risks of iGAT's two-point example, and its bounds for one model and for two.

    Values, fractions: ``single``, ``max``, ``avg`` (0-1 risks of the first model and of both combined), ``crossing``
    (the probability from which on two models have the lower bound). Series: ``probability``, ``bound_single``,
    ``bound_pair``.
    """

    @classmethod
    def depends_on(cls, params: Any) -> frozenset[Dependency]:
        return frozenset()

    def measure(self, subject: Subject) -> Measured:
        probability = [step / (CURVE - 1) for step in range(CURVE)]
        return Measured(
            {**igat_toy_risks(), "crossing": 1 - 1 / math.sqrt(3)},
            series={
                "probability": probability,
                "bound_single": [igat_risk_single(p) for p in probability],
                "bound_pair": [igat_risk_pair(p) for p in probability],
            },
            n=2,
        )

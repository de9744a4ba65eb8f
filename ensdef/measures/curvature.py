"""iGAT: Understanding and Improving Ensemble Adversarial Defense (Deng, Mu; NeurIPS 2023, arXiv:2310.18477),
supplement.

How fast the loss bends along adversarial perturbations: about 0.06 for the paper's ADP networks, perturbations not
stated.
"""

from __future__ import annotations

from ensdef.diagnostics.curvature import defense_curvature
from ensdef.measure import Measured, Subject, register_measure
from ensdef.measures._crafting import OnView


@register_measure("curvature")
class Curvature(OnView):
    """Mean curvature of the cross-entropy along the attack's perturbations: change of its gradient per length.

    Values: ``curvature`` (loss in nats per squared image unit, in l2), ``curvature_median`` and ``moved`` (fraction of
    the images that the attack moved at all; the others have no curvature). Undefined where it moved none.
    """

    def measure(self, subject: Subject) -> Measured:
        x, y, view = subject.x, subject.y, self.params.view
        delta = self.params.craft(subject, view) - x
        moved = delta.flatten(1).abs().amax(dim=1) > 0
        count = int(moved.sum())
        share = {"moved": count / len(x)}
        if not count:
            return Measured({"curvature": float("nan"), "curvature_median": float("nan"), **share}, n=0)
        found = defense_curvature(subject.defense, x[moved], y[moved], delta[moved], view=view).double()
        return Measured(
            {"curvature": float(found.mean()), "curvature_median": float(found.median()), **share},
            stderr={"curvature": float(found.std() / count**0.5)} if count > 1 else {},
            n=count,
        )

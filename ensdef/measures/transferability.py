"""CCE: Improving Ensemble Robustness by Collaboratively Promoting and Demoting Adversarial Robustness (Bui et al., AAAI
2021, arXiv:2009.09612), Table 6.

Adversarial images of one member, shown to the others.
"""

from __future__ import annotations

from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.diagnostics.crafting import craft_on_each
from ensdef.diagnostics.transfer import transferability
from ensdef.errors import UsageError
from ensdef.measure import Measured, Subject, register_measure
from ensdef.measures._crafting import OnView
from ensdef.metrics import binomial_stderr


@register_measure("transferability")
class TransferabilityTable(OnView):
    """How far adversarial images carry over between members: accuracies by source, common errors and summaries.

    Values, fractions: ``a_i_j`` is the accuracy of member j (1, 2, ... or ``en``) on images crafted on i; ``s11``,
    ``s10``, ``s01``, ``s00`` the shares of the ensemble's images that the first and the second member get right (1) or
    wrong (0); ``T``, ``nT``, ``a_single`` as the paper defines them. With more than two members the last seven are
    means over the pairs (ours), and ``s10`` and ``s01`` are then the same.
    """

    def fits(self, defense: EnsembleDefense) -> None:
        super().fits(defense)
        if len(defense.members) < 2:
            raise UsageError("transferability compares members, and the defence has 1; expected at least 2")

    def measure(self, subject: Subject) -> Measured:
        settings = {**self.params.settings(subject), "view": self.params.view}
        crafted = craft_on_each(subject.defense, subject.x, subject.y, **settings)
        found = transferability(subject.defense, subject.y, crafted)
        members, count = len(found.both), len(subject.y)
        names = [*(str(number) for number in range(1, members + 1)), "en"]
        shares = {
            f"a_{source}_{asked}": float(found.accuracy[row, column])
            for row, source in enumerate(names)
            for column, asked in enumerate(names)
        }
        pairs = {
            "s11": _of_pair(found.both),
            "s10": _of_pair(found.only),
            "s01": _of_pair(found.only.T),
            "s00": _of_pair(found.neither),
        }
        counted = {**shares, **pairs} if members == 2 else shares
        return Measured(
            {**shares, **pairs, "T": found.T, "nT": found.nT, "a_single": found.a_single},
            stderr={name: binomial_stderr(share, count) for name, share in counted.items()},
            series={"accuracy": found.accuracy.tolist()},
        )


def _of_pair(matrix: Tensor) -> float:
    """The entry of the first and the second member; the mean over ordered pairs where there are others, (K, K)."""
    members = len(matrix)
    if members == 2:
        return float(matrix[0, 1])
    return float((matrix.sum() - matrix.trace()) / (members * (members - 1)))

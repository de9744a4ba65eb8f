"""What the papers measure beside accuracy: transfer between members, detection, curvature, who does what, and the toy
experiments of their appendices.

Plain functions on tensors and trained defences, to be called from a notebook or a script; ``ensdef.measures`` keeps
what they give as files. All shares and accuracies are fractions in [0, 1], all entropies and losses in nats.

    from ensdef.diagnostics import craft_on_each, transferability

    crafted = craft_on_each(defense, x, y, eps="8/255", steps=20)
    found = transferability(defense, y, crafted)
    print(found.accuracy, found.T, found.nT, found.a_single)
"""

from ensdef.diagnostics.allocation import (
    best_true_probability,
    largest_wrong_probability,
    member_accuracy,
    recoverable_share,
    true_probability_histogram,
)
from ensdef.diagnostics.answers import Answers, answer, right
from ensdef.diagnostics.crafting import craft, craft_on_each, distill
from ensdef.diagnostics.curvature import defense_curvature, loss_curvature
from ensdef.diagnostics.detection import detection_auc, detection_stderr, entropy_score, roc_points
from ensdef.diagnostics.roles import Roles, dead_members, member_roles
from ensdef.diagnostics.synthetic import (
    XorResult,
    XorRun,
    igat_risk_pair,
    igat_risk_single,
    igat_toy_risks,
    xor_bayes_accuracy,
    xor_data,
    xor_experiment,
    xor_oracle_mse,
    xor_run,
)
from ensdef.diagnostics.transfer import (
    Transferability,
    diversity_matrix,
    right_for_all_members,
    transfer_matrix,
    transferability,
)

__all__ = [
    "Answers",
    "Roles",
    "Transferability",
    "XorResult",
    "XorRun",
    "answer",
    "best_true_probability",
    "craft",
    "craft_on_each",
    "dead_members",
    "defense_curvature",
    "detection_auc",
    "detection_stderr",
    "distill",
    "diversity_matrix",
    "entropy_score",
    "igat_risk_pair",
    "igat_risk_single",
    "igat_toy_risks",
    "largest_wrong_probability",
    "loss_curvature",
    "member_accuracy",
    "member_roles",
    "recoverable_share",
    "right",
    "right_for_all_members",
    "roc_points",
    "transfer_matrix",
    "transferability",
    "true_probability_histogram",
    "xor_bayes_accuracy",
    "xor_data",
    "xor_experiment",
    "xor_oracle_mse",
    "xor_run",
]

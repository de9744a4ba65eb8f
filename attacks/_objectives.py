"""What an adaptive attack on an ensemble raises, read off its members instead of its decision.

Every objective takes a :class:`Reading` of a batch of points and gives one value an image, (B,); larger is closer to a
wrong decision. The decision itself may be a vote, a maximum or a choice: its gradient then hides members, or is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ensdef import combine
from ensdef.losses import margin, member_cross_entropy, soft_minimum, targeted_margin
from ensdef.threat import TINY


@dataclass(frozen=True)
class Reading:
    """An ensemble at a batch of points, with gradient.

    Args:
        logits: of the members, (K, B, C).
        selection: log-weights of the members where it chooses among them, (B, K).
        y: true labels, (B,).
        wrong: the class aimed at, (B,); in untargeted runs without meaning.
        progress: share of the run's steps done, in [0, 1), (B,).
    """

    logits: Tensor
    selection: Tensor | None
    y: Tensor
    wrong: Tensor
    progress: Tensor

    @property
    def margins(self) -> Tensor:
        """Best wrong class minus the true one for every member, (K, B); positive: the member is fooled."""
        return torch.stack([margin(logits, self.y) for logits in self.logits])

    @property
    def targeted_margins(self) -> Tensor:
        """The class aimed at minus the best other one for every member, (K, B); positive: the member says it."""
        aimed = self.logits.gather(2, self.wrong[None, :, None].expand(len(self.logits), -1, 1)).squeeze(2)
        others = self.logits.scatter(2, self.wrong[None, :, None].expand(len(self.logits), -1, 1), -torch.inf)
        return aimed - others.amax(dim=2)

    @property
    def weights(self) -> Tensor:
        """``selection``, of an ensemble that has one."""
        assert self.selection is not None
        return self.selection


Objective = Callable[[Reading], Tensor]


# -- every ensemble -------------------------------------------------------------------------------------------------


def summed_cross_entropy(at: Reading) -> Tensor:
    """Sum of the members' cross-entropies: no member is hidden by another's confidence."""
    return member_cross_entropy(at.logits, at.y).sum(dim=0)


def summed_margins(at: Reading) -> Tensor:
    """Sum of the members' margins."""
    return at.margins.sum(dim=0)


def shared_class(at: Reading) -> Tensor:
    """All members towards the same wrong class: agreement matters more than depth."""
    return torch.stack([targeted_margin(logits, at.y, at.wrong) for logits in at.logits]).sum(dim=0)


def members_still_right(at: Reading) -> Tensor:
    """Margins of the members that still withstand, on a common scale (the idea of MORA, NeurIPS 2022)."""
    weights = (at.margins < 0).to(at.logits.dtype)
    weights = torch.where(weights.sum(dim=0) > 0, weights, torch.ones_like(weights))
    return (weights * _common_scale(at)).sum(dim=0)


def easiest_first(at: Reading) -> Tensor:
    """Margins weighted towards the member closest to falling."""
    scaled = _common_scale(at)
    return (_unfooled(scaled).detach().div(0.1).softmax(dim=0) * scaled).sum(dim=0)


def hardest_first(at: Reading) -> Tensor:
    """Margins weighted towards the member furthest from falling."""
    scaled = _common_scale(at)
    return (scaled.detach().div(-0.1).softmax(dim=0) * scaled).sum(dim=0)


def _common_scale(at: Reading) -> Tensor:
    """Margins in units of each member's spread of logits, (K, B): members of large scale must not drown the others.

    With two classes the spread is the margin itself, so there they stay as they are.
    """
    if at.logits.shape[2] == 2:
        return at.margins
    spread = (at.logits.amax(dim=2) - at.logits.amin(dim=2)).detach()
    return at.margins / spread.clamp_min(TINY)


def _unfooled(margins: Tensor) -> Tensor:
    """Margins with the fooled members pushed to the end of every order."""
    return torch.where(margins < 0, margins, margins - 2)


# -- votes and maxima -----------------------------------------------------------------------------------------------


def cheapest_majority(at: Reading) -> Tensor:
    """The members closest to falling, as many as a majority has, chosen anew at every step."""
    # wrong votes may split: where a majority is won and the vote is not, the others move on
    return _majority(at.margins) + 0.01 * at.margins.sum(dim=0)


def cheapest_majority_for_a_class(at: Reading) -> Tensor:
    """A majority for one wrong class."""
    return _majority(at.targeted_margins) + 0.01 * at.targeted_margins.sum(dim=0)


def soft_vote(temperature: float) -> Objective:
    """Margin of the members' softened votes."""

    def objective(at: Reading) -> Tensor:
        return margin(combine.mean_of_probabilities(at.logits / temperature), at.y)

    return objective


def _majority(margins: Tensor) -> Tensor:
    """Sum over the largest margins; one safely won earns no more."""
    return margins.clamp(max=1.0).topk(len(margins) // 2 + 1, dim=0).values.sum(dim=0)


def loudest_member(member: int) -> Objective:
    """This member more confident in a wrong class than any member in the true one: what a maximum listens to."""

    def objective(at: Reading) -> Tensor:
        log_probs = combine.log_probs(at.logits)
        aimed = log_probs[member].gather(1, at.wrong[:, None]).squeeze(1)
        return aimed - _of_class(log_probs, at.y).amax(dim=0)

    return objective


def smooth_maximum(temperature: float) -> Objective:
    """Margin of a soft maximum over members: gradient reaches those that are nearly the loudest."""

    def objective(at: Reading) -> Tensor:
        scaled = combine.log_probs(at.logits) / temperature
        return margin(temperature * torch.logsumexp(scaled, dim=0), at.y)

    return objective


def nobody_sure_of_the_truth(at: Reading) -> Tensor:
    """Lowers the largest confidence in the true class."""
    return -_of_class(combine.log_probs(at.logits), at.y).amax(dim=0)


def _of_class(scores: Tensor, label: Tensor) -> Tensor:
    """(K, B, C) and (B,) -> (K, B)."""
    return scores.gather(2, label[None, :, None].expand(len(scores), -1, 1)).squeeze(2)


# -- selectors and gates --------------------------------------------------------------------------------------------


def fool_and_select(member: int, weight: float, steer: float = 0.0, gate: bool = False) -> Objective:
    """Fool one member, and pay for its not being chosen as long as it is not.

    Args:
        weight: of the missing log-weight against the member's margin.
        steer: share of the run spent on the choice alone.
        gate: every member answers with its weight: being first is not enough, all weight is wanted.
    """

    def objective(at: Reading) -> Tensor:
        others = torch.cat([at.weights[:, :member], at.weights[:, member + 1 :]], dim=1)
        behind = (at.weights[:, member] - others.amax(dim=1)).clamp(max=0.0)
        if gate:
            behind = at.weights.log_softmax(dim=1)[:, member]
        # a member fooled beyond doubt need not be fooled further: what is left is to have it chosen
        fooled = margin(at.logits[member], at.y).clamp(max=1.0)
        return torch.where(at.progress < steer, behind, fooled + weight * behind)

    return objective


def sure_and_wrong(member: int) -> Objective:
    """A member's confidence in a wrong class and its weight at once: for a selector by confidence one direction."""

    def objective(at: Reading) -> Tensor:
        aimed = combine.log_probs(at.logits[member]).gather(1, at.wrong[:, None]).squeeze(1)
        return aimed + at.weights.log_softmax(dim=1)[:, member]

    return objective


def soft_choice(first: float, last: float) -> Objective:
    """Margin of a soft choice whose temperature falls geometrically over the run; ``last = first`` keeps it."""

    def objective(at: Reading) -> Tensor:
        temperature = first * (last / first) ** at.progress
        return margin(combine.mixture(at.logits, at.weights / temperature[:, None]), at.y)

    return objective


def all_wrong(at: Reading) -> Tensor:
    """The member furthest from falling, softly: once all are wrong the choice cannot help."""
    return soft_minimum(at.margins, 0.1)

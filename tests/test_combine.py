"""Inference rules of an ensemble: golden values, identities, and numbers that must not overflow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ensdef.combine import (
    COMBINERS,
    log_probs,
    max_probability,
    mean_of_logits,
    mean_of_probabilities,
    mixture,
    select,
    vote,
)
from ensdef.losses import cross_entropy, margin, member_cross_entropy

Rule = Callable[[Tensor], Tensor]


def pick_first(logits: Tensor) -> Tensor:
    """A selector that has learnt to trust the first member."""
    members, batch, _ = logits.shape
    return select(logits, -torch.arange(members).expand(batch, members))


def even_mixture(logits: Tensor) -> Tensor:
    """A gate that has learnt nothing."""
    members, batch, _ = logits.shape
    return mixture(logits, logits.new_zeros(batch, members))


SYMMETRIC: dict[str, Rule] = {
    "mean_of_probabilities": mean_of_probabilities,
    "mean_of_logits": mean_of_logits,
    "max_probability": max_probability,
    "vote": vote,
    "even_mixture": even_mixture,
}
ALL: dict[str, Rule] = {**SYMMETRIC, "pick_first": pick_first}
#: Rules that can be climbed everywhere; a vote cannot.
GRADED: dict[str, Rule] = {name: rule for name, rule in ALL.items() if name != "vote"}
every_rule = pytest.mark.parametrize("rule", ALL.values(), ids=ALL.keys())
symmetric_rule = pytest.mark.parametrize("rule", SYMMETRIC.values(), ids=SYMMETRIC.keys())


def random_logits(members: int = 3, batch: int = 500, classes: int = 5, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(members, batch, classes, generator=torch.Generator().manual_seed(seed))


# --- golden values --------------------------------------------------------------------------------

TWO_MEMBERS = torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]], dtype=torch.float64)
LABEL = torch.tensor([0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(mean_of_probabilities, 0.694220), (mean_of_logits, 0.680270), (max_probability, 0.693828)],
    ids=["mean_of_probabilities", "mean_of_logits", "max_probability"],
)
def test_cross_entropy_of_two_members_matches_the_value_worked_out_by_hand(rule: Rule, expected: float) -> None:
    assert cross_entropy(rule(TWO_MEMBERS), LABEL).item() == pytest.approx(expected, abs=1e-6)


def test_the_mean_cross_entropy_of_two_members_matches_the_value_worked_out_by_hand() -> None:
    assert member_cross_entropy(TWO_MEMBERS, LABEL).mean().item() == pytest.approx(0.895495, abs=1e-6)


def test_mean_of_probabilities_is_the_logarithm_of_the_mean_and_sums_to_one() -> None:
    logits = random_logits()
    combined = mean_of_probabilities(logits)
    torch.testing.assert_close(combined.exp(), logits.softmax(-1).mean(0))
    torch.testing.assert_close(combined.exp().sum(1), torch.ones(500))


# --- identities -----------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("members", [1, 2, 5])
def test_copies_of_one_member_decide_as_that_member(rule: Rule, members: int) -> None:
    single = random_logits(members=1)
    assert torch.equal(rule(single.expand(members, -1, -1)).argmax(-1), single[0].argmax(-1))


@pytest.mark.parametrize(
    "rule",
    [mean_of_probabilities, max_probability, pick_first, even_mixture],
    ids=["mean_of_probabilities", "max_probability", "pick_first", "even_mixture"],
)
def test_an_ensemble_of_one_gives_its_member_s_log_probabilities(rule: Rule) -> None:
    single = random_logits(members=1)
    torch.testing.assert_close(rule(single), single[0].log_softmax(-1))


def test_the_mean_logit_of_one_member_is_its_logit() -> None:
    single = random_logits(members=1)
    assert torch.equal(mean_of_logits(single), single[0])


@symmetric_rule
def test_the_order_of_the_members_does_not_matter(rule: Rule) -> None:
    logits = random_logits(members=4)
    torch.testing.assert_close(rule(logits[[2, 0, 3, 1]]), rule(logits))


@every_rule
def test_an_image_s_scores_do_not_depend_on_its_neighbours(rule: Rule) -> None:
    logits = random_logits(batch=20)
    torch.testing.assert_close(rule(logits)[7:9], rule(logits[:, 7:9]))


@every_rule
def test_adding_a_constant_to_a_member_s_logits_changes_no_decision(rule: Rule) -> None:
    logits = random_logits()
    shift = torch.tensor([5.0, -3.0, 0.5]).view(3, 1, 1)
    assert torch.equal(rule(logits + shift).argmax(-1), rule(logits).argmax(-1))


def naive(rule: str, logits: Tensor) -> np.ndarray:
    """The same rules on probabilities in double precision, as one would write them first."""
    z = logits.double().numpy()
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if rule == "avg":
        return p.mean(0)
    if rule == "max":
        return p.max(0)
    ballots = np.eye(z.shape[-1])[p.argmax(-1)].sum(0)
    return ballots + 0.5 * p.mean(0)


@pytest.mark.parametrize("name", ["avg", "max", "vote"])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_decisions_equal_those_of_plain_probabilities_in_double_precision(name: str, scale: float) -> None:
    logits = random_logits(batch=2000, scale=scale)
    reference = naive(name, logits)
    runner_up, best = np.sort(reference, axis=1)[:, -2:].T
    clear = best - runner_up > 1e-6  # saturated members that contradict each other tie, whatever the arithmetic
    assert clear.mean() > 0.1
    assert (COMBINERS[name](logits).argmax(1).numpy() == reference.argmax(1))[clear].all()


def test_the_max_rule_follows_the_most_confident_member() -> None:
    logits = random_logits()
    confidence, decision = logits.softmax(-1).max(-1)
    boldest = confidence.argmax(0)
    assert torch.equal(max_probability(logits).argmax(-1), decision[boldest, torch.arange(500)])


# --- votes ----------------------------------------------------------------------------------------


def certain(*probs: float) -> list[float]:
    return torch.tensor(probs).log().tolist()


def test_the_majority_wins_over_a_louder_minority() -> None:
    logits = torch.tensor([[certain(0.4, 0.3, 0.3)], [certain(0.4, 0.3, 0.3)], [certain(0.005, 0.99, 0.005)]])
    assert vote(logits).argmax().item() == 0
    assert mean_of_probabilities(logits).argmax().item() == 1


def test_a_tied_vote_goes_to_the_larger_mean_probability() -> None:
    logits = torch.tensor([[certain(0.5, 0.3, 0.2)], [certain(0.2, 0.7, 0.1)]])
    assert vote(logits).argmax().item() == 1


def test_a_class_without_votes_never_wins_a_tie() -> None:
    logits = torch.tensor([[certain(0.51, 0.001, 0.489)], [certain(0.001, 0.51, 0.489)]])
    assert mean_of_probabilities(logits).argmax().item() == 2
    assert vote(logits).argmax().item() in (0, 1)


def test_the_whole_part_of_a_vote_is_the_number_of_ballots() -> None:
    logits = random_logits(members=7)
    ballots = torch.stack([(logits.argmax(-1) == c).sum(0) for c in range(5)], dim=1)
    assert torch.equal(vote(logits).floor().long(), ballots)


# --- choosing and weighting members ---------------------------------------------------------------


def test_the_selected_member_s_log_probabilities_are_returned() -> None:
    logits = random_logits(batch=4)
    selection = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 2.0], [-3.0, -2.0, -1.0], [0.1, 0.3, 0.2]])
    expected = torch.stack([logits[member, image] for image, member in enumerate([1, 0, 2, 1])]).log_softmax(-1)
    torch.testing.assert_close(select(logits, selection), expected)


def test_a_selection_passes_gradient_to_the_chosen_member_alone() -> None:
    logits = random_logits(batch=1).requires_grad_()
    select(logits, torch.tensor([[0.0, 1.0, 0.0]]))[:, 0].sum().backward()
    assert [bool(member.abs().sum()) for member in logits.grad] == [False, True, False]


def test_a_mixture_with_one_overwhelming_weight_is_that_member() -> None:
    logits = random_logits()
    weights = torch.zeros(500, 3)
    weights[:, 1] = 1000
    torch.testing.assert_close(mixture(logits, weights), logits[1].log_softmax(-1))


def test_a_mixture_with_equal_weights_is_the_mean_of_probabilities() -> None:
    logits = random_logits()
    torch.testing.assert_close(mixture(logits, torch.full((500, 3), 7.0)), mean_of_probabilities(logits))


def test_a_mixture_weighs_probabilities_image_by_image() -> None:
    logits = random_logits(batch=2)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]])
    expected = torch.einsum("bk,kbc->bc", weights, logits.softmax(-1))
    torch.testing.assert_close(mixture(logits, weights.log() + 3).exp(), expected)


def test_a_mixture_passes_gradient_to_weights_and_members() -> None:
    logits, weights = random_logits(batch=1).requires_grad_(), torch.zeros(1, 3, requires_grad=True)
    mixture(logits, weights)[:, 0].sum().backward()
    assert (logits.grad.abs().sum((1, 2)) > 0).all()
    assert (weights.grad.abs() > 0).all()


# --- large logits ---------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("scale", [100.0, 1000.0, 1e6])
def test_scores_of_very_confident_members_are_finite(rule: Rule, scale: float) -> None:
    assert torch.isfinite(rule(random_logits(scale=scale))).all()


@every_rule
def test_gradients_through_very_confident_members_are_finite(rule: Rule) -> None:
    logits = random_logits(scale=1000.0).requires_grad_()
    cross_entropy(rule(logits), logits.detach()[0].argmin(-1)).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("rule", GRADED.values(), ids=GRADED.keys())
def test_very_confident_members_that_agree_still_give_the_margin_a_gradient(rule: Rule) -> None:
    logits = 1000 * random_logits(members=1) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    logits.requires_grad_()
    margin(rule(logits), logits.detach()[0].argmax(-1)).sum().backward()
    assert (logits.grad.abs().sum((0, 2)) > 0).all()


def test_log_probabilities_keep_classes_that_probabilities_lose() -> None:
    logits = torch.tensor([0.0, -500.0, -900.0])
    assert log_probs(logits).tolist() == [0.0, -500.0, -900.0]


# --- the rules by name ----------------------------------------------------------------------------


def test_the_rules_that_may_be_asked_for_by_name() -> None:
    assert dict(COMBINERS) == {"avg": mean_of_probabilities, "max": max_probability, "vote": vote}

"""Losses per example, against plain rewrites and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ensdef.losses import cross_entropy, entropy, margin, member_cross_entropy, targeted_margin


def scores(batch: int = 20, classes: int = 5, seed: int = 0) -> Tensor:
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(batch: int = 20, classes: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))


# --- cross-entropy --------------------------------------------------------------------------------


def test_cross_entropy_matches_a_plain_numpy_rewrite() -> None:
    z, y = scores().numpy(), labels().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = -np.log(p[np.arange(len(y)), y])
    np.testing.assert_allclose(cross_entropy(scores(), labels()).numpy(), expected, rtol=1e-10)


def test_cross_entropy_is_the_same_for_logits_and_their_log_probabilities() -> None:
    torch.testing.assert_close(cross_entropy(scores().log_softmax(1), labels()), cross_entropy(scores(), labels()))


def test_member_cross_entropy_matches_a_loop_over_members() -> None:
    logits = torch.stack([scores(seed=k) for k in range(3)])
    looped = torch.stack([cross_entropy(member, labels()) for member in logits])
    torch.testing.assert_close(member_cross_entropy(logits, labels()), looped)


def test_member_cross_entropy_of_members_laid_out_otherwise_in_memory_is_the_same() -> None:
    logits = torch.stack([scores(seed=k) for k in range(3)])
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(member_cross_entropy(strided, labels()), member_cross_entropy(logits, labels()))


# --- margin ---------------------------------------------------------------------------------------


def test_margin_is_the_best_wrong_score_minus_the_true_one() -> None:
    z, y = scores(), labels()
    expected = [
        max(v for c, v in enumerate(row) if c != t) - row[t] for row, t in zip(z.tolist(), y.tolist(), strict=True)
    ]
    assert margin(z, y).tolist() == pytest.approx(expected)


def test_margin_is_positive_exactly_where_the_decision_is_wrong() -> None:
    z, y = scores(batch=200), labels(batch=200)
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)


def test_margin_of_log_probabilities_has_its_closed_form() -> None:
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert margin(log_probs, torch.tensor([0])).item() == pytest.approx(math.log(0.3 / 0.5), abs=1e-6)


def test_margin_of_all_negative_scores_pulls_the_true_class_down_and_the_best_wrong_one_up() -> None:
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    margin(log_probs, torch.tensor([0])).sum().backward()
    assert log_probs.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_margin_has_a_gradient_at_the_logits_where_the_true_class_has_probability_one_half() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    margin(logits.log_softmax(1), torch.tensor([0])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_targeted_margin_is_the_target_score_minus_the_true_one() -> None:
    z = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, -1.0]])
    assert targeted_margin(z, torch.tensor([0, 1]), torch.tensor([1, 2])).tolist() == [1.0, -1.0]


def test_the_largest_targeted_margin_is_the_margin() -> None:
    z, y = scores(), labels()
    targeted = torch.stack([targeted_margin(z, y, (y + shift) % 5) for shift in range(1, 5)])
    torch.testing.assert_close(targeted.amax(0), margin(z, y))


# --- entropy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_entropy_at_uniform_is_the_logarithm_of_the_number_of_classes(classes: int) -> None:
    assert entropy(torch.zeros(classes).log_softmax(0)).item() == pytest.approx(math.log(classes), rel=1e-6)


def test_entropy_of_a_hand_made_distribution() -> None:
    assert entropy(torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()).item() == pytest.approx(1.279854, abs=1e-6)


def test_a_class_of_probability_zero_adds_nothing_to_the_entropy() -> None:
    assert entropy(torch.tensor([0.5, 0.0, 0.5]).log()).item() == pytest.approx(math.log(2), rel=1e-6)


def test_entropy_of_certainty_is_zero() -> None:
    assert entropy(torch.tensor([1.0, 0.0, 0.0]).log()).item() == 0


def test_entropy_has_a_finite_gradient_at_probability_zero() -> None:
    log_probs = torch.tensor([0.5, 0.0, 0.5]).log().requires_grad_()
    entropy(log_probs).backward()
    assert torch.isfinite(log_probs.grad).all()


def test_entropy_of_very_confident_logits_has_finite_value_and_gradient() -> None:
    logits = torch.tensor([[1e5, 0.0, -1e5], [0.0, 200.0, 0.0]]).requires_grad_()
    value = entropy(logits.log_softmax(1))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()


def test_entropy_is_taken_over_the_last_dimension() -> None:
    log_probs = scores(batch=6).view(2, 3, 5).log_softmax(-1)
    looped = torch.stack([-(row.exp() * row).sum() for row in log_probs.view(6, 5)]).view(2, 3)
    torch.testing.assert_close(entropy(log_probs), looped)


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [cross_entropy, margin], ids=["cross_entropy", "margin"])
def test_a_loss_is_one_number_an_image(loss) -> None:
    assert loss(scores(batch=1), labels(batch=1)).shape == (1,)

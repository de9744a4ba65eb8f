"""Entropy as a detector: score, curve, and the area under it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys_defense import generator

from ensdef.diagnostics import detection_auc, entropy_score, roc_points

quick = settings(deadline=None, max_examples=30, derandomize=True)
#: few different values, so that ties are frequent
scores = st.lists(st.integers(0, 4), min_size=1, max_size=8).map(lambda values: torch.tensor(values) / 4)


def pairwise_auc(clean: Tensor, adversarial: Tensor) -> float:
    wins = [float(a > c) + 0.5 * float(a == c) for a in adversarial for c in clean]
    return sum(wins) / len(wins)


# --- the score ------------------------------------------------------------------------------------


def test_the_score_is_the_entropy_of_the_mean_probability() -> None:
    probabilities = torch.tensor([[[0.7, 0.2, 0.1, 0.0]], [[0.7, 0.0, 0.1, 0.2]]])
    logits = probabilities.log().clamp_min(-1e4)
    assert entropy_score(logits).tolist() == pytest.approx([0.940448], abs=1e-6)


def test_members_sure_of_different_classes_are_as_suspicious_as_undecided_ones() -> None:
    """The mean of the members' own entropies would be 0."""
    sure = 1e3 * torch.eye(2)[:, None, :]
    assert entropy_score(sure).tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize(("height", "expected"), [(0.0, math.log(7)), (1e3, 0.0)])
def test_the_score_lies_between_zero_and_the_logarithm_of_the_classes(height: float, expected: float) -> None:
    logits = height * torch.eye(7)[None]
    assert entropy_score(logits).tolist() == pytest.approx([expected] * 7, abs=1e-6)


# --- the area -------------------------------------------------------------------------------------


@quick
@given(scores, scores)
def test_the_area_is_the_chance_of_ranking_a_pair_rightly_with_ties_as_half(clean: Tensor, crafted: Tensor) -> None:
    assert detection_auc(clean, crafted) == pytest.approx(pairwise_auc(clean, crafted))


@pytest.mark.parametrize(
    ("clean", "adversarial", "expected"),
    [
        ([0.1, 0.2], [0.3, 0.9], 1.0),
        ([0.3, 0.9], [0.1, 0.2], 0.0),
        ([0.5, 0.5], [0.5], 0.5),
        ([0.1, 0.4], [0.4, 0.2], 0.625),
    ],
)
def test_the_area_in_cases_counted_by_hand(clean: list[float], adversarial: list[float], expected: float) -> None:
    assert detection_auc(torch.tensor(clean), torch.tensor(adversarial)) == pytest.approx(expected)


def test_the_area_depends_on_ranks_alone() -> None:
    clean, adversarial = torch.randn(30, generator=generator()), 0.5 + torch.randn(20, generator=generator(1))
    assert detection_auc(clean, adversarial) == pytest.approx(detection_auc(clean.exp(), adversarial.exp()))


# --- the curve ------------------------------------------------------------------------------------


@quick
@given(scores, scores)
def test_every_point_of_the_curve_counts_the_scores_above_its_threshold(clean: Tensor, crafted: Tensor) -> None:
    false_positive, true_positive, thresholds = roc_points(clean, crafted)
    for false_rate, true_rate, threshold in zip(false_positive, true_positive, thresholds, strict=True):
        assert float(false_rate) == pytest.approx(float((clean >= threshold).double().mean()))
        assert float(true_rate) == pytest.approx(float((crafted >= threshold).double().mean()))
    assert (float(false_positive[0]), float(true_positive[0])) == (0.0, 0.0)
    assert (float(false_positive[-1]), float(true_positive[-1])) == (1.0, 1.0)
    assert len(thresholds) == 1 + len(torch.cat([clean, crafted]).unique())


@quick
@given(scores, scores)
def test_the_area_is_the_area_under_the_curve(clean: Tensor, crafted: Tensor) -> None:
    false_positive, true_positive, _ = roc_points(clean, crafted)
    assert float(torch.trapezoid(true_positive, false_positive)) == pytest.approx(detection_auc(clean, crafted))

"""iGAT's supplement, Tables 4 to 8: how members share adversarial images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys_defense import generator

from ensdef import combine
from ensdef.diagnostics import (
    best_true_probability,
    largest_wrong_probability,
    member_accuracy,
    recoverable_share,
    true_probability_histogram,
)

quick = settings(deadline=None, max_examples=40, derandomize=True)

#: Two members on three images of class 0, 1, 2.
PROBABILITIES = torch.tensor(
    [
        [[0.62, 0.28, 0.10], [0.50, 0.40, 0.10], [0.20, 0.25, 0.55]],
        [[0.10, 0.50, 0.40], [0.05, 0.92, 0.03], [0.70, 0.20, 0.10]],
    ]
)
LOGITS, LABELS = PROBABILITIES.double().log(), torch.arange(3)


def drawn(members: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = generator(seed)
    return 2 * torch.randn(members, 20, classes, generator=rng), torch.randint(classes, (20,), generator=rng)


def pairs(logits: Tensor, y: Tensor) -> list[tuple[np.ndarray, int]]:
    """(probabilities, label) of every member on every image."""
    p = logits.double().softmax(dim=2).numpy()
    return [(p[i, n], int(y[n])) for i in range(len(p)) for n in range(len(y))]


# --- by hand --------------------------------------------------------------------------------------


def test_the_worked_example() -> None:
    assert member_accuracy(LOGITS, LABELS) == pytest.approx(3 / 6)
    assert largest_wrong_probability(LOGITS, LABELS) == pytest.approx((0.28 + 0.5 + 0.25 + 0.5 + 0.05 + 0.7) / 6)
    # right with 0.62, 0.55 and 0.92
    assert true_probability_histogram(LOGITS, LABELS).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 0, 1 / 3])
    # wrong: 0.4 >= 0.25, 0.1 < 0.25, 0.1 < 0.15
    assert recoverable_share(LOGITS, LABELS) == pytest.approx(1 / 3)
    # the mean probability is right on the second image alone
    mean = combine.mean_of_probabilities(LOGITS)
    assert mean.argmax(dim=1).tolist() == [1, 1, 0]
    assert best_true_probability(LOGITS, mean, LABELS) == pytest.approx((0.62 + 0.55) / 2)


@pytest.mark.parametrize(
    ("probability", "index"), [(0.45, 0), (0.55, 1), (0.65, 2), (0.75, 3), (0.85, 4), (0.95, 5), (1.0, 5)]
)
def test_each_bin_holds_its_tenth(probability: float, index: int) -> None:
    rest = (1 - probability) / 2
    logits = torch.tensor([[[probability, rest, rest]]]).log().clamp_min(-1e4)
    assert true_probability_histogram(logits, torch.tensor([0])).nonzero().squeeze(1).tolist() == [index]


def test_a_bin_holds_its_lower_edge() -> None:
    """Two equal logits: exactly one half, and the lower class is the answer."""
    assert true_probability_histogram(torch.zeros(1, 1, 2), torch.tensor([0])).tolist() == [0, 1, 0, 0, 0, 0]


def test_with_two_classes_every_error_is_recoverable() -> None:
    logits, y = drawn(3, 2, seed=0)
    assert recoverable_share(logits, y) == 1.0


def test_an_error_that_leaves_nothing_for_the_true_class_is_not_recoverable() -> None:
    logits = torch.tensor([[[-50.0, 3.0, 2.0, 2.0]]])
    assert recoverable_share(logits, torch.tensor([0])) == 0.0


def test_certainty_of_a_wrong_class_costs_one() -> None:
    assert largest_wrong_probability(1e3 * torch.eye(3)[None], torch.tensor([1, 2, 0])) == pytest.approx(1.0)
    assert largest_wrong_probability(1e3 * torch.eye(3)[None], torch.arange(3)) == pytest.approx(0.0)


def test_where_nothing_is_left_to_average_over_the_answer_is_no_number() -> None:
    logits = 5 * torch.eye(3)[None]
    assert math.isnan(recoverable_share(logits, torch.arange(3)))
    assert math.isnan(best_true_probability(logits, logits[0], torch.arange(3)))
    assert bool(true_probability_histogram(logits, torch.tensor([1, 2, 0])).isnan().all())


# --- against plain rewrites -----------------------------------------------------------------------


@quick
@given(st.integers(1, 4), st.integers(3, 6), st.integers(0, 10**6))
def test_the_tables_are_those_of_a_plain_rewrite(members: int, classes: int, seed: int) -> None:
    logits, y = drawn(members, classes, seed)
    every = pairs(logits, y)
    right = [(p, t) for p, t in every if p.argmax() == t]
    wrong = [(p, t) for p, t in every if p.argmax() != t]

    def share(rows: list[tuple[np.ndarray, int]], holds: Callable[[np.ndarray, int], bool]) -> float:
        return sum(holds(p, t) for p, t in rows) / len(rows) if rows else math.nan

    assert member_accuracy(logits, y) == pytest.approx(len(right) / len(every))
    edges = [0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1]
    for index, found in enumerate(true_probability_histogram(logits, y).tolist()):
        low, high = edges[index], edges[index + 1]
        assert found == pytest.approx(share(right, lambda p, t, a=low, b=high: a <= p[t] < b), nan_ok=True)  # type: ignore[misc]
    assert largest_wrong_probability(logits, y) == pytest.approx(np.mean([np.delete(p, t).max() for p, t in every]))
    assert recoverable_share(logits, y) == pytest.approx(
        share(wrong, lambda p, t: p[t] >= (1 - p.max()) / (classes - 1)), nan_ok=True
    )
    scores = combine.mean_of_probabilities(logits)
    p = logits.double().softmax(dim=2).numpy()
    best = [max(p[i, n, int(y[n])] for i in range(members)) for n in range(20) if int(scores[n].argmax()) != int(y[n])]
    assert best_true_probability(logits, scores, y) == pytest.approx(np.mean(best) if best else math.nan, nan_ok=True)


@quick
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6))
def test_the_bounds_of_the_tables_hold(members: int, classes: int, seed: int) -> None:
    logits, y = drawn(members, classes, seed)
    own = [member_accuracy(member[None], y) for member in logits]
    assert member_accuracy(logits, y) == pytest.approx(sum(own) / members)
    assert 0 <= largest_wrong_probability(logits, y) <= 1
    assert float(true_probability_histogram(logits, y).sum()) == pytest.approx(1.0, nan_ok=True)
    scores = combine.mean_of_probabilities(logits)
    if bool((scores.argmax(dim=1) != y).any()):
        best = best_true_probability(logits, scores, y)
        assert all(best_true_probability(member[None], scores, y) <= best for member in logits)

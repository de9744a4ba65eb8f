"""What counts may claim: exact tests against scipy, and values known from elsewhere."""

from __future__ import annotations

import pytest
from scipy import stats

from ensdef.health.statistics import ENOUGH, better, exceeds, judged, sign_test, tail
from ensdef.metrics import wilson


@pytest.mark.parametrize("wins", [0, 1, 3, 8, 40, 700])
@pytest.mark.parametrize("losses", [0, 2, 9, 35, 900])
def test_the_sign_test_is_the_two_sided_binomial_test_at_one_half(wins: int, losses: int) -> None:
    expected = 1.0 if wins + losses == 0 else stats.binomtest(wins, wins + losses).pvalue
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_of_even_outcomes_is_one_and_of_eight_against_none_below_one_percent() -> None:
    assert sign_test(5, 5) == 1.0
    assert sign_test(7, 0) == 2 / 128
    assert sign_test(8, 0) == 2 / 256


def test_eight_images_more_are_a_stronger_attack_and_seven_are_not() -> None:
    assert better(8, 0)
    assert not better(7, 0)
    assert not better(0, 8)
    assert not better(60, 50)


@pytest.mark.parametrize("n", [1, 12, 64, 2000])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 1.0])
def test_the_tail_is_that_of_the_binomial_distribution(n: int, share: float, part: float) -> None:
    count = round(part * n)
    assert tail(count, n, share) == pytest.approx(stats.binom.sf(count - 1, n, share), abs=1e-9)


def test_a_share_is_exceeded_when_chance_would_rarely_show_as_many() -> None:
    assert not exceeds(1, 64, 0.001)
    assert exceeds(2, 64, 0.001)
    assert not exceeds(13, 64, 0.2)
    assert exceeds(32, 64, 0.2)
    assert not exceeds(0, 0, 0.2)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 20), (400, 1000)])
def test_the_interval_is_wilson_s(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_of_a_thousand_images_at_forty_percent_is_plus_minus_three_points() -> None:
    low, high = wilson(400, 1000)
    assert (high - low) / 2 == pytest.approx(0.030, abs=0.0005)


def test_fewer_than_two_hundred_images_are_not_judged() -> None:
    assert ENOUGH == 200
    assert judged(200)
    assert not judged(199)

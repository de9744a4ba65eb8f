"""What may be claimed of rows that met the same images: paired tests, ranks, errors. Closed forms and simulations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ensdef.metrics import binomial_stderr
from ensdef.statistics import Outcomes, PairedTests, estimate, paired_p, rank_ranges, wins_and_losses

quick = settings(deadline=None, max_examples=80, derandomize=True)


def row(right: int, n: int = 40) -> list[list[int]]:
    """One seed, right on the first images."""
    return [[1] * right + [0] * (n - right)]


@st.composite
def tables(draw: st.DrawFn) -> list[list[list[int]]]:
    """Rows over the same images, of one to three seeds each, some of them close to each other."""
    n = draw(st.integers(1, 30))
    rng = random.Random(draw(st.integers(0, 10**6)))
    hard = [rng.random() for _ in range(n)]
    strengths = draw(st.lists(st.sampled_from([0.1, 0.4, 0.5, 0.9]), min_size=1, max_size=6))
    return [
        [[int(rng.random() < 0.7 * strength + 0.3 * h) for h in hard] for _ in range(rng.randint(1, 3))]
        for strength in strengths
    ]


# --- one pair -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        (row(10), row(10), 1.0),
        (row(11), row(10), 1.0),
        (row(15), row(10), 2 / 2**5),
        (row(20), row(10), 2 / 2**10),
        ([[1, 1, 1, 0]], [[0, 0, 0, 1]], 2 * (1 + 4) / 2**4),
    ],
)
def test_with_one_seed_the_paired_test_is_mcnemars_exact_one(a: Outcomes, b: Outcomes, p: float) -> None:
    assert paired_p(a, b) == pytest.approx(p)
    assert paired_p(b, a) == paired_p(a, b)


@quick
@given(tables())
def test_the_paired_test_is_the_binomial_one_over_images_that_differ(rows: list[list[list[int]]]) -> None:
    wins, losses = wins_and_losses(rows[0], rows[-1])
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert paired_p(rows[0], rows[-1]) == pytest.approx(expected)


def test_more_seeds_of_the_same_networks_are_no_more_evidence() -> None:
    assert paired_p(row(15) * 3, row(10) * 3) == paired_p(row(15), row(10))
    assert paired_p(row(15) * 3, row(10)) == paired_p(row(15), row(10)), "shares of seeds are compared, not numbers"


def test_an_image_on_which_the_seeds_balance_out_speaks_for_nobody() -> None:
    assert wins_and_losses([[1, 0, 1], [0, 1, 1]], [[0, 1, 0], [1, 0, 1]]) == (1, 0)


@pytest.mark.parametrize(
    ("a", "b"),
    [(row(1, 3), row(1, 4)), ([[1, 0], [1]], [[1, 0]]), ([], row(1)), ([[]], [[]])],
    ids=["other images", "ragged seeds", "no seed", "no image"],
)
def test_rows_over_different_images_are_refused(a: Outcomes, b: Outcomes) -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_p(a, b)


def test_equal_rows_are_told_apart_no_more_often_than_claimed() -> None:
    rng = random.Random(0)
    told = 0
    for _ in range(400):
        hard = [rng.random() for _ in range(60)]
        a, b = ([[int(rng.random() < h) for h in hard]] for _ in range(2))
        told += paired_p(a, b) < 0.05
    assert told / 400 <= 0.05


# --- an accuracy ----------------------------------------------------------------------------------


def test_with_one_seed_the_standard_error_is_the_binomial_one_and_no_spread_is_known() -> None:
    found = estimate(row(10, 40))
    assert (found.mean, found.n, found.seeds, found.seed_std) == (0.25, 40, 1, None)
    assert found.stderr == pytest.approx(binomial_stderr(0.25, 40))


def test_seeds_that_agree_leave_the_standard_error_as_it_is_and_have_no_spread() -> None:
    one, three = estimate(row(10)), estimate(row(10) * 3)
    assert three.stderr == pytest.approx(one.stderr)
    assert (three.mean, three.seed_std, three.seeds, three.n) == (one.mean, 0.0, 3, 40)


def test_seeds_that_fail_on_other_images_average_out_over_images() -> None:
    found = estimate([[1, 0] * 20, [0, 1] * 20])
    assert (found.mean, found.stderr, found.seed_std) == (0.5, 0.0, 0.0)


def test_the_spread_is_the_standard_deviation_of_the_seeds_accuracies() -> None:
    found = estimate([*row(10), *row(20), *row(30)])
    assert found.mean == 0.5
    assert found.seed_std == pytest.approx(0.25)


def test_the_interval_covers_the_accuracy_over_all_images_as_often_as_it_claims() -> None:
    """Three networks that find the same images hard: counting every outcome as independent is far too sure."""
    rng, z = random.Random(1), NormalDist().inv_cdf(0.975)
    covered = {"by image": 0, "all outcomes": 0}
    trials, n = 600, 100
    for _ in range(trials):
        # a hard image is right with 0.05, an easy one with 0.95; half are hard
        hard = [rng.choice((0.05, 0.95)) for _ in range(n)]
        found = estimate([[int(rng.random() < h) for h in hard] for _ in range(3)])
        naive = binomial_stderr(found.mean, 3 * n)
        covered["by image"] += abs(found.mean - 0.5) <= z * found.stderr
        covered["all outcomes"] += abs(found.mean - 0.5) <= z * naive
    assert covered["by image"] / trials == pytest.approx(0.95, abs=4 * sqrt(0.95 * 0.05 / trials))
    assert covered["all outcomes"] / trials < 0.85


# --- ranks ----------------------------------------------------------------------------------------


def test_rows_that_are_equal_share_all_ranks() -> None:
    assert rank_ranges([row(10)] * 4) == [(1, 4)] * 4
    assert PairedTests([row(10)] * 4).best() == [True] * 4


def test_rows_far_apart_have_a_rank_each() -> None:
    rows = [row(40), row(0), row(20)]
    assert rank_ranges(rows) == [(1, 1), (3, 3), (2, 2)]
    assert PairedTests(rows).best() == [True, False, False]


def test_two_that_are_close_share_the_ranks_that_a_third_leaves() -> None:
    assert rank_ranges([row(30), row(32), row(0)]) == [(1, 2), (1, 2), (3, 3)]


def test_the_correction_for_many_pairs_makes_claims_rarer() -> None:
    """Seven images to none: 0.016 for one pair alone, which is too much for one of ten."""
    assert PairedTests([row(17), row(10)]).better(0, 1)
    assert not PairedTests([row(17), row(10), row(10), row(10), row(10)]).better(0, 1)


def test_claims_are_corrected_step_by_step() -> None:
    """Holm: what is certain leaves the others with a smaller correction than Bonferroni's."""
    rows = [row(40), row(39), row(7), row(0)]
    # the last pair has 2 / 2^7 = 0.0156: more than 0.05 / 6, less than 0.05 / 2 when four pairs are decided
    assert PairedTests(rows).better(2, 3)


def test_a_row_is_not_better_where_most_images_say_so_but_the_mean_does_not() -> None:
    """More images speak for the first, each by one seed of nine; a few speak for the second by all."""
    many = [[1] * 30 + [0] * 12] + [[0] * 42] * 8
    few = [[0] * 30 + [1] * 12] * 9
    assert paired_p(many, few) < 0.05
    assert not PairedTests([many, few]).told_apart(0, 1)


def test_rows_not_told_apart_share_a_rank_even_where_others_stand_between_them() -> None:
    """Majorities over images may go in a circle: a over k, k over j, and a and j even."""
    kinds = [((6, 3, 0), 50), ((3, 5, 4), 25), ((4, 3, 5), 25)]

    def seeds(which: int) -> list[list[int]]:
        counts = [values[which] for values, times in kinds for _ in range(times)]
        return [[int(seed < count) for count in counts] for seed in range(6)]

    a, k, j = (seeds(which) for which in range(3))
    rows = [a, k, k, j]
    compared = PairedTests(rows)
    assert compared.better(0, 1)
    assert compared.better(1, 3)
    assert not compared.told_apart(0, 3)
    (_, last), *_, (first, _) = compared.rank_ranges()
    assert last >= first


@quick
@given(tables())
def test_rows_not_told_apart_always_share_a_rank(rows: list[list[list[int]]]) -> None:
    compared, ranges = PairedTests(rows), rank_ranges(rows)
    for i, (first, last) in enumerate(ranges):
        assert 1 <= first <= last <= len(rows)
        for j, (other_first, other_last) in enumerate(ranges):
            if i != j and not compared.told_apart(i, j):
                assert max(first, other_first) <= min(last, other_last)


@quick
@given(tables(), st.randoms(use_true_random=False))
def test_ranks_do_not_depend_on_the_order_of_the_rows(rows: list[list[list[int]]], rng: random.Random) -> None:
    order = list(range(len(rows)))
    rng.shuffle(order)
    ranges = rank_ranges(rows)
    assert rank_ranges([rows[i] for i in order]) == [ranges[i] for i in order]


@quick
@given(tables())
def test_a_better_row_has_a_higher_mean_and_no_worse_a_rank(rows: list[list[list[int]]]) -> None:
    compared, ranges = PairedTests(rows), rank_ranges(rows)
    means = [estimate(one).mean for one in rows]
    for i, j in ((i, j) for i in range(len(rows)) for j in range(len(rows)) if compared.better(i, j)):
        assert means[i] > means[j]
        assert not compared.better(j, i)
        assert ranges[i][0] <= ranges[j][1]


def test_no_rows_have_no_ranks() -> None:
    nobody: Sequence[Outcomes] = []
    assert rank_ranges(nobody) == []
    assert PairedTests(nobody).best() == []

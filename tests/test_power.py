"""The planner: exact powers against sums and simulations written out, and `ensdef power`."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy.stats import binom, binomtest, chi2_contingency, ttest_ind

from ensdef.cli import cli
from ensdef.cli import compare as commands  # noqa: F401 - adds the commands
from ensdef.errors import UsageError
from ensdef.power import LARGE, check_pair, paired_power, smallest, trainings_power, unpaired_power


def test_the_paired_power_is_the_sum_over_every_table_that_mcnemar_rejects() -> None:
    n, difference, discordance = 60, 0.15, 0.25
    worse = (discordance - difference) / 2 / discordance
    expected = 0.0
    for differing in range(n + 1):
        for losses in range(differing // 2 + 1):
            if differing and 2 * losses < differing and binomtest(losses, differing).pvalue < 0.05:
                expected += binom.pmf(differing, n, discordance) * binom.pmf(losses, differing, worse)
    assert paired_power(n, difference, discordance) == pytest.approx(expected, abs=1e-9)


def test_the_unpaired_power_is_the_sum_over_every_table_that_chi_squared_rejects() -> None:
    n, accuracy, difference = 25, 0.4, 0.3
    expected = 0.0
    for worse in range(n + 1):
        for better in range(worse + 1, n + 1):
            table = [[worse, n - worse], [better, n - better]]
            if 0 < worse + better < 2 * n and chi2_contingency(table, correction=False).pvalue < 0.05:
                expected += binom.pmf(worse, n, accuracy) * binom.pmf(better, n, accuracy + difference)
    assert unpaired_power(n, accuracy, difference) == pytest.approx(expected, abs=1e-9)


def test_above_the_largest_sum_the_normal_formula_goes_on_where_the_sum_ends() -> None:
    assert unpaired_power(LARGE, 0.5, 0.02) == pytest.approx(unpaired_power(LARGE + 1, 0.5, 0.02), abs=0.005)


@pytest.mark.parametrize(("k", "difference", "spread"), [(3, 0.03, 0.01), (5, 0.01, 0.006), (10, 0.01, 0.02)])
def test_the_power_of_trainings_is_that_of_students_test(k: int, difference: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    better = rng.normal(0.5 + difference, spread, (k, 4000))
    worse = rng.normal(0.5, spread, (k, 4000))
    test = ttest_ind(better, worse)
    seen = float(np.mean((test.pvalue < 0.05) & (test.statistic > 0)))
    assert trainings_power(k, difference, spread) == pytest.approx(seen, abs=0.03)


def test_one_training_shows_nothing_and_a_spread_of_next_to_nothing_hides_nothing() -> None:
    assert trainings_power(1, 0.1, 0.01) == 0.0
    assert trainings_power(2, 0.5, 1e-9) == 1.0


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95])
def test_the_smallest_number_reaches_the_power_and_so_do_the_next_ones(target: float) -> None:
    def power(n: int) -> float:
        return paired_power(n, 0.1, 0.2)

    n = smallest(power, target, 10_000)
    assert n is not None
    assert power(n - 1) < target
    assert all(power(more) >= target for more in range(n, n + 8))


def test_what_no_allowed_number_reaches_is_none() -> None:
    assert smallest(lambda n: paired_power(n, 0.001, 0.5), 0.8, 1000) is None


@pytest.mark.parametrize(
    ("accuracy", "difference", "discordance"),
    [(0.5, 0.1, 0.05), (0.95, 0.1, 0.2), (0.0, 0.1, 0.2), (0.01, 0.01, 0.5), (0.5, 0.0, 0.2)],
)
def test_pairs_that_cannot_be_are_refused(accuracy: float, difference: float, discordance: float) -> None:
    with pytest.raises(UsageError, match=r"expected an accuracy|differ on between"):
        check_pair(accuracy, difference, discordance)


def asked(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["power", *arguments])


def test_half_a_point_takes_tens_of_thousands_of_images_and_fewer_if_they_are_the_same_for_both() -> None:
    found = asked("--difference", "0.5", "--spread", "0.5", "--images", "1000", "--trainings", "3")
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    assert (
        lines[0] == "0.5 points between rows of 50 and 50.5 %, at 5 %, two-sided; the rows differ on 13 % of the images"
    )
    paired, unpaired, trainings = (int(line.split(": ")[1].split()[0].replace(",", "")) for line in lines[1::2])
    assert (paired, unpaired) == (41_200, 156_973)
    assert trainings == 17
    assert all(line.startswith("    with ") and line.endswith(" %") for line in lines[2::2])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--difference", "0"), "0"),
        (("--difference", "60"), "at most 100 %"),
        (("--difference", "5", "--discordance", "1"), "differ on between 5 and 95 %"),
        (("--difference", "5", "--trainings", "3"), "--spread"),
        (("--difference", "nan"), "nan"),
        ((), "--difference"),
    ],
)
def test_questions_without_an_answer_are_refused(arguments: tuple[str, ...], told: str) -> None:
    found = asked(*arguments)
    assert found.exit_code == 2, found.output
    assert told in found.output

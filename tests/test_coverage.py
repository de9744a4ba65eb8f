"""`benchmarks/reliability/coverage.py`: its sums are coverage, its simulations are our tests, its failures are told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from ensdef.health.statistics import sign_test
from ensdef.metrics import wilson

# not by its name, which is that of a package that measures test coverage
SPEC = importlib.util.spec_from_file_location(
    "interval_coverage", Path(__file__).parent.parent / "benchmarks" / "reliability" / "coverage.py"
)
assert SPEC is not None
assert SPEC.loader is not None
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.mark.parametrize("n", [200, 333])
def test_coverage_is_the_chance_of_the_counts_whose_interval_holds_the_accuracy(n: int) -> None:
    accuracies = np.array([0.0137, 0.1, 0.42, 0.973])
    bounds = [wilson(right, n) for right in range(n + 1)]
    expected = [
        sum(binom.pmf(right, n, p) for right, (low, high) in enumerate(bounds) if low <= p <= high) for p in accuracies
    ]
    assert script.coverage(n, accuracies) == pytest.approx(expected, abs=1e-9)


def test_the_simulated_test_is_the_one_that_tables_make() -> None:
    rng = np.random.default_rng(0)
    for wins, losses in rng.integers(0, 40, (60, 2)):
        p = 2 * binom.cdf(min(wins, losses), wins + losses, 0.5)
        assert min(1.0, p) == pytest.approx(sign_test(int(wins), int(losses)))


def test_the_quick_form_reaches_the_figures_and_prints_its_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--quick"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 of 2 sizes: coverage 95.0")


def test_an_interval_that_is_too_narrow_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wald(right: int, n: int) -> tuple[float, float]:
        p = right / n
        return p - 1.96 * (p * (1 - p) / n) ** 0.5, p + 1.96 * (p * (1 - p) / n) ** 0.5

    monkeypatch.setattr(script, "wilson", wald)
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--quick"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1

"""Whether intervals cover what they say, and whether the planner's power is the power that simulated tests have.

    python benchmarks/reliability/coverage.py
    python benchmarks/reliability/coverage.py --quick

- Coverage of the tables' 95 % interval (Wilson's) is a sum over the binomial distribution, without simulation, at
  1,961 accuracies from 0.01 to 0.99.
- Power is simulated with the tests that `ensdef compare` makes (McNemar's exact test, Student's t test over trainings),
  and with the chi-squared test for rows that met other images.

Exit status 1 if mean coverage is outside 94.5 to 95.5 %, if it is below 93 % anywhere between accuracies of 0.1 and
0.9, or if a power is off by more than 3 points.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm, ttest_ind
from tabulate import tabulate

from ensdef.metrics import wilson
from ensdef.power import paired_power, trainings_power, unpaired_power
from ensdef.statistics import SIGNIFICANT

IMAGES = (200, 250, 300, 500, 1000, 2000, 5000, 10_000)
#: (images, accuracy of the worse row, difference, discordance)
PAIRS = (
    (100, 0.5, 0.1, 0.15),
    (200, 0.3, 0.06, 0.13),
    (500, 0.5, 0.03, 0.13),
    (500, 0.8, 0.05, 0.1),
    (1000, 0.5, 0.02, 0.05),
    (1000, 0.6, 0.04, 0.2),
    (10_000, 0.5, 0.01, 0.13),
)
#: (trainings a method, difference, spread)
TRAININGS = (
    (2, 0.03, 0.01),
    (3, 0.02, 0.01),
    (3, 0.005, 0.006),
    (5, 0.01, 0.006),
    (10, 0.01, 0.01),
    (20, 0.005, 0.006),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Fewer numbers of images, fewer draws.")
    quick = parser.parse_args().quick
    covered = coverages(IMAGES[:2] if quick else IMAGES)
    powers = simulated(10_000 if quick else 40_000, np.random.default_rng(0))
    print(tabulate(covered, headers="keys", tablefmt="github", floatfmt=".2f"), "\n")
    print(tabulate(powers, headers="keys", tablefmt="github", floatfmt=("", "", "g", "g", ".1f", ".1f")), "\n")
    fits = sum(94.5 <= row["mean %"] <= 95.5 and row["least % in [0.1, 0.9]"] >= 93 for row in covered)
    close = sum(abs(row["planned %"] - row["simulated %"]) <= 3 for row in powers)
    lowest = min(row["least % in [0.1, 0.9]"] for row in covered)
    means = [row["mean %"] for row in covered]
    furthest = max(abs(row["planned %"] - row["simulated %"]) for row in powers)
    print(
        f"{fits} of {len(covered)} sizes: coverage {min(means):.2f} to {max(means):.2f} % on average, at "
        f"least {lowest:.2f} %; {close} of {len(powers)} powers within 3 points of simulation ({furthest:.2f})"
    )
    sys.exit(0 if fits == len(covered) and close == len(powers) else 1)


def coverages(images: Sequence[int]) -> list[dict[str, float]]:
    """A row a number of images: exact coverage of Wilson's interval, in percent."""
    accuracies = np.linspace(0.01, 0.99, 1961)
    middle = (accuracies >= 0.1 - 1e-9) & (accuracies <= 0.9 + 1e-9)
    rows = []
    for n in images:
        covered = 100 * coverage(n, accuracies)
        rows.append(
            {
                "images": n,
                "mean %": float(covered.mean()),
                "least % in [0.1, 0.9]": float(covered[middle].min()),
                "least %": float(covered.min()),
            }
        )
    return rows


def coverage(n: int, accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chance, for each accuracy, that the interval of a sample of n images holds it."""
    bounds = np.array([wilson(right, n) for right in range(n + 1)])
    # intervals move upwards with the count, so those that hold an accuracy have neighbouring counts
    first = np.searchsorted(bounds[:, 1], accuracies, side="left")
    last = np.searchsorted(bounds[:, 0], accuracies, side="right") - 1
    return np.asarray(binom.cdf(last, n, accuracies) - binom.cdf(first - 1, n, accuracies))


def simulated(draws: int, rng: np.random.Generator) -> list[dict[str, object]]:
    """A row a plan: its power in percent, planned and simulated."""
    rows: list[dict[str, object]] = []
    for n, accuracy, difference, discordance in PAIRS:
        named = {"n": n, "accuracy": accuracy, "difference": difference}
        planned = paired_power(n, difference, discordance)
        rows.append(_row("same images", named, planned, paired_rejections(n, difference, discordance, draws, rng)))
        planned = unpaired_power(n, accuracy, difference)
        rows.append(_row("other images", named, planned, unpaired_rejections(n, accuracy, difference, draws, rng)))
    for k, difference, spread in TRAININGS:
        named = {"n": k, "accuracy": None, "difference": difference}
        planned = trainings_power(k, difference, spread)
        rows.append(_row("trainings", named, planned, training_rejections(k, difference, spread, draws, rng)))
    return rows


def _row(test: str, named: dict[str, object], planned: float, seen: float) -> dict[str, object]:
    return {"test": test, **named, "planned %": 100 * planned, "simulated %": 100 * seen}


def paired_rejections(n: int, difference: float, discordance: float, draws: int, rng: np.random.Generator) -> float:
    """Share of draws in which McNemar's exact test finds the better row."""
    shares = ((discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance)
    counts = rng.multinomial(n, shares, draws)[:, :2]
    wins, losses = counts[:, 0], counts[:, 1]
    p = 2 * binom.cdf(np.minimum(wins, losses), wins + losses, 0.5)
    return float(np.mean((wins > losses) & (p < SIGNIFICANT)))


def unpaired_rejections(n: int, accuracy: float, difference: float, draws: int, rng: np.random.Generator) -> float:
    """Share of draws in which the chi-squared test without correction finds the better row."""
    worse, better = rng.binomial(n, accuracy, draws), rng.binomial(n, accuracy + difference, draws)
    pooled = (worse + better) / (2 * n)
    return float(np.mean(better - worse > norm.isf(SIGNIFICANT / 2) * np.sqrt(2 * n * pooled * (1 - pooled))))


def training_rejections(k: int, difference: float, spread: float, draws: int, rng: np.random.Generator) -> float:
    """Share of draws in which Student's t test over k trainings of each method finds the better one."""
    test = ttest_ind(rng.normal(difference, spread, (k, draws)), rng.normal(0.0, spread, (k, draws)))
    return float(np.mean((test.pvalue < SIGNIFICANT) & (test.statistic > 0)))


if __name__ == "__main__":
    main()

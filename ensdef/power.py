"""How many images, and how many trainings, a difference takes to be seen. Exact where scipy has the distribution.

Power is the chance that a two-sided test finds the better row to be better. Accuracies, differences and shares are
fractions in [0, 1]. ``benchmarks/reliability/coverage.py`` holds every function against simulation.
"""

from __future__ import annotations

from collections.abc import Callable

from ensdef.errors import UsageError
from ensdef.statistics import SIGNIFICANT

#: Share of images on which two rows differ, where nobody says: the median over pairs of rows of `digits_all` that are
#: within five points of each other, between 20 and 80 % robust under PGD in l-infinity.
DISCORDANCE = 0.13
#: Above this many images the sums over two binomial distributions take long; the normal formula is within half a point
#: of them there.
LARGE = 5_000


def check_pair(accuracy: float, difference: float, discordance: float) -> None:
    """Refuse what no pair of rows can do.

    Raises:
        UsageError: a better row above 1, or a discordance that the difference or the accuracies rule out.
    """
    if not 0 < accuracy < 1 or not 0 < difference <= 1 - accuracy:
        raise UsageError(
            f"an accuracy of {100 * accuracy:g} % and a difference of {100 * difference:g} points: expected an "
            "accuracy between 0 and 100 %, and a better row of at most 100 %"
        )
    most = min(2 * accuracy + difference, 2 * (1 - accuracy) - difference)
    if not difference <= discordance <= most:
        raise UsageError(
            f"rows of {100 * accuracy:g} and {100 * (accuracy + difference):g} % differ on between "
            f"{100 * difference:g} and {100 * most:g} % of the images, got a discordance of {100 * discordance:g} %"
        )


def paired_power(n: int, difference: float, discordance: float) -> float:
    """Of McNemar's exact test over ``n`` images that both rows met.

    Args:
        discordance: share of images that exactly one of the rows gets right.
    """
    import numpy as np
    from scipy.stats import binom

    # the number of images that differ, and how they are split if it is that number
    low, high = binom.ppf((1e-12, 1 - 1e-12), n, discordance)
    differing = np.arange(low, high + 1)
    most_losses = binom.ppf(SIGNIFICANT / 2, differing, 0.5) - 1
    worse = (discordance - difference) / (2 * discordance)
    return float(np.sum(binom.pmf(differing, n, discordance) * binom.cdf(most_losses, differing, worse)))


def unpaired_power(n: int, accuracy: float, difference: float) -> float:
    """Of the chi-squared test over ``n`` images a row, other images for each row."""
    import numpy as np
    from scipy.stats import binom, norm

    z, better = norm.isf(SIGNIFICANT / 2), accuracy + difference
    if n > LARGE:
        middle = accuracy + difference / 2
        under_null = np.sqrt(2 * middle * (1 - middle))
        spread = np.sqrt(accuracy * (1 - accuracy) + better * (1 - better))
        return float(norm.cdf((difference * np.sqrt(n) - z * under_null) / spread))
    ranges = [binom.ppf((1e-12, 1 - 1e-12), n, p) for p in (accuracy, better)]
    counts = [np.arange(low, high + 1) for low, high in ranges]
    worse, more = counts[0][:, None], counts[1][None, :]
    pooled = (worse + more) / (2 * n)
    rejects = more - worse > z * np.sqrt(2 * n * pooled * (1 - pooled))
    chances = binom.pmf(counts[0], n, accuracy)[:, None] * binom.pmf(counts[1], n, better)[None, :]
    return float(np.sum(chances[rejects]))


def trainings_power(k: int, difference: float, spread: float) -> float:
    """Of Student's t test over ``k`` trainings a method.

    Args:
        spread: standard deviation of the accuracy from one training to another, the same for both methods; positive.
    """
    import math

    from scipy.stats import nct, t

    if k < 2:
        return 0.0
    freedom = 2 * k - 2
    shift = difference / (spread * math.sqrt(2 / k))
    # far out scipy's series gives NaN, where the power is 1 to all digits
    return 1.0 if shift > 30 else float(nct.sf(t.isf(SIGNIFICANT / 2, freedom), freedom, shift))


def smallest(power: Callable[[int], float], target: float, limit: int) -> int | None:
    """The number from which on ``target`` is reached; None: none up to ``limit`` reaches it.

    Power grows with the number but for the teeth that whole numbers give it: of the numbers around which it crosses
    the target the last is taken, so that a few more cannot do worse.
    """
    high = 2
    while power(high) < target:
        if high >= limit:
            return None
        high = min(limit, 2 * high)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= target else (middle, high)
    window = max(8, high // 50)
    short = [number for number in range(high, high + window) if power(number) < target] if high < 2000 else []
    return short[-1] + 1 if short else high

"""Fractions and how sure one may be of them; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Standard errors of a 95 % interval.
NINETY_FIVE = 1.959963984540054


def fraction_of(flags: Sequence[int]) -> float:
    """Share of ones, in [0, 1].

    Raises:
        ValueError: nothing to count.
    """
    if not flags:
        raise ValueError("an accuracy over no images is undefined")
    return sum(flags) / len(flags)


def binomial_stderr(accuracy: float, n: int) -> float:
    """Standard error of a fraction over n independent images, sqrt(p (1 - p) / n)."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / n)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction, within [0, 1].

    Equal to scipy's ``binomtest(successes, n).proportion_ci(method="wilson")`` up to rounding, and without its import.
    Covers 94 % or more for every p in [0.1, 0.9] from 200 images on, 95 % on average
    (``benchmarks/reliability/coverage.py``).

    Source: Wilson, JASA 1927; unlike p +- z stderr it is not empty at 0 and 1.
    """
    p, z = successes / n, NINETY_FIVE
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)

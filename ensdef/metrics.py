"""Fractions and how sure one may be of them; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence


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

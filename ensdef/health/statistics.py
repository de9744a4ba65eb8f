"""What may be claimed from counts over images; no torch."""

from __future__ import annotations

import math

#: A finding that rests on counts needs a p-value below this one.
SIGNIFICANT = 0.01
#: Fewer evaluated images than these are not judged by counts.
ENOUGH = 200


def judged(n: int) -> bool:
    """Whether n images are enough for findings that rest on counts."""
    return n >= ENOUGH


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of McNemar's exact test: images on which only one of two attacks succeeded.

    Args:
        wins: images that the first attack alone fooled; ``losses``: that the second alone fooled.
    Returns:
        chance of a split at least as uneven if both were equally strong, in (0, 1].
    """
    n, least = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, k) for k in range(least + 1))
    return min(1.0, float(2 * tail / 2**n))


def better(wins: int, losses: int) -> bool:
    """Whether the first attack is significantly the stronger one."""
    return wins > losses and sign_test(wins, losses) < SIGNIFICANT


def tail(count: int, n: int, share: float) -> float:
    """Chance of ``count`` or more of n images if each had probability ``share``, in (0, 1); in [0, 1]."""
    if count <= 0:
        return 1.0
    terms = (_log_choose(n, k) + k * math.log(share) + (n - k) * math.log1p(-share) for k in range(count))
    below = math.fsum(map(math.exp, terms))
    return max(0.0, 1.0 - below)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def exceeds(count: int, n: int, share: float) -> bool:
    """Whether the share of images is significantly above ``share``."""
    return n > 0 and count / n > share and tail(count, n, share) < SIGNIFICANT

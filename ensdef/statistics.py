"""What tables may claim: means with their errors, paired tests, and ranks no finer than those allow. No torch.

An outcome is 1 where an image stayed right, else 0. The unit of every test and standard error is the image: the same
image under several training seeds is no new evidence about images. Training seeds are told apart from that, as the
spread of a method over them; a paired test compares the networks that were trained, averaged over their seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean, stdev, variance

from ensdef.health.statistics import sign_test

#: One list a training seed, each with one outcome an image; images in the same order everywhere.
Outcomes = Sequence[Sequence[int]]

#: Chance, over all pairs of rows together, of claiming any difference that is none.
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Estimate:
    """An accuracy and how sure one may be of it.

    Args:
        mean: over seeds and images, in [0, 1].
        stderr: standard error over images, of the mean over these seeds' networks; with one seed the binomial one.
        seed_std: standard deviation of the accuracy from one training seed to another; None: a single seed.
        n: images.
        seeds: training seeds.
    """

    mean: float
    stderr: float
    seed_std: float | None
    n: int
    seeds: int


def estimate(outcomes: Outcomes) -> Estimate:
    """Mean, standard error clustered by image, and spread over seeds.

    Raises:
        ValueError: no seeds, no images, or seeds with different numbers of images.
    """
    n = _images(outcomes)
    seeds = len(outcomes)
    by_image = [right / seeds for right in _right_seeds(outcomes)]
    mean = sum(map(sum, outcomes)) / (seeds * n)
    stderr = math.sqrt(fmean((share - mean) ** 2 for share in by_image) / n)
    by_seed = [sum(images) / n for images in outcomes]
    return Estimate(mean, stderr, stdev(by_seed) if seeds > 1 else None, n, seeds)


def wins_and_losses(a: Outcomes, b: Outcomes) -> tuple[int, int]:
    """Images on which ``a`` is right in a larger share of its seeds than ``b``, and the other way round.

    Raises:
        ValueError: other numbers of images.
    """
    if _images(a) != _images(b):
        raise ValueError(f"a paired test needs the same images on both sides, got {_images(a)} and {_images(b)}")
    differences = [
        ours * len(b) - theirs * len(a) for ours, theirs in zip(_right_seeds(a), _right_seeds(b), strict=True)
    ]
    return sum(one > 0 for one in differences), sum(one < 0 for one in differences)


def paired_p(a: Outcomes, b: Outcomes) -> float:
    """Two-sided p-value of the exact sign test over images; with one seed each, McNemar's exact test.

    Args:
        a, b: outcomes of two rows on the same images in the same order; numbers of seeds may differ.
    Returns:
        chance of images split at least as unevenly if neither row were better, in (0, 1]; 1.0 where none differs.
    Raises:
        ValueError: other numbers of images.
    """
    return sign_test(*wins_and_losses(a, b))


def paired_interval(a: Outcomes, b: Outcomes, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the difference of two means, ``a`` minus ``b``: percentiles of a paired bootstrap over images.

    An image is drawn with everything that happened to it: in both rows, under all seeds. Where no image differs, a
    resample cannot either; then the largest share of differing images that such a sample leaves possible bounds the
    difference (Clopper and Pearson's interval of 0 out of N).

    Args:
        a, b: outcomes of two rows on the same images in the same order; numbers of seeds may differ.
        seed: of the resampling.
    Returns:
        low and high, in [-1, 1].
    Raises:
        ValueError: other numbers of images.
    """
    import numpy as np
    from scipy.stats import binomtest, bootstrap

    wins, losses = wins_and_losses(a, b)
    n = _images(a)
    if not wins + losses:
        bound = float(binomtest(0, n).proportion_ci(method="exact").high)
        return -bound, bound
    found = bootstrap(
        (np.mean(a, axis=0), np.mean(b, axis=0)),
        lambda first, second, axis: np.mean(first - second, axis=axis),
        paired=True,
        method="percentile",
        batch=max(1, 10**6 // n),
        random_state=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@dataclass(frozen=True)
class Components:
    """Where the uncertainty of one row comes from; nothing of one is counted in another.

    Args:
        images: standard error of the row's mean over these networks and attack seeds.
        training_seeds: standard deviation from one training to another; None: a single one.
        attack_seeds: standard deviation from one attack seed to another on the same network; None: a single one.
    """

    images: float
    training_seeds: float | None
    attack_seeds: float | None


def components(outcomes: Mapping[tuple[Hashable, Hashable], Sequence[int]]) -> Components:
    """Spreads of nested seeds, by the method of moments (one-way analysis of variance).

    Args:
        outcomes: by training seed and attack seed, each with one outcome an image, in the same order everywhere.
    Raises:
        ValueError: nothing, or different numbers of images.
    """
    n = _images(list(outcomes.values()))
    trainings: dict[Hashable, list[float]] = {}
    for (training, _), images in outcomes.items():
        trainings.setdefault(training, []).append(sum(images) / n)
    freedom = sum(len(attacked) - 1 for attacked in trainings.values())
    within = sum((one - fmean(attacked)) ** 2 for attacked in trainings.values() for one in attacked)
    attack_variance = within / freedom if freedom else None
    training_std = None
    if len(trainings) > 1:
        # means of a training over its attack seeds still carry a share of their spread
        share = fmean(1 / len(attacked) for attacked in trainings.values())
        between = variance([fmean(attacked) for attacked in trainings.values()])
        training_std = math.sqrt(max(0.0, between - share * (attack_variance or 0.0)))
    return Components(
        estimate(list(outcomes.values())).stderr,
        training_std,
        None if attack_variance is None else math.sqrt(attack_variance),
    )


class PairedTests:
    """All pairs of rows, with Holm's correction for their number (Holm, Scandinavian Journal of Statistics 1979).

    Args:
        rows: outcomes by row, on the same images in the same order.

    A row counts as better only where the test is significant and the means agree with it: with several seeds, more
    images may speak for one row and the mean for the other, and then neither is better.
    """

    def __init__(self, rows: Sequence[Outcomes]) -> None:
        self.means = [Fraction(sum(map(sum, row)), len(row) * _images(row)) for row in rows]
        pairs = list(itertools.combinations(range(len(rows)), 2))
        counts = {pair: wins_and_losses(rows[pair[0]], rows[pair[1]]) for pair in pairs}
        chances = {pair: sign_test(*counts[pair]) for pair in pairs}
        self._better = [[False] * len(rows) for _ in rows]
        for rank, (i, j) in enumerate(sorted(pairs, key=lambda pair: chances[pair])):
            if chances[i, j] >= SIGNIFICANT / (len(pairs) - rank):
                break
            wins, losses = counts[i, j]
            self._better[i][j] = wins > losses and self.means[i] > self.means[j]
            self._better[j][i] = losses > wins and self.means[j] > self.means[i]

    def better(self, i: int, j: int) -> bool:
        """Whether row ``i`` is significantly better than row ``j``."""
        return self._better[i][j]

    def told_apart(self, i: int, j: int) -> bool:
        """Whether one of two rows is significantly better than the other."""
        return self._better[i][j] or self._better[j][i]

    def best(self) -> list[bool]:
        """The row with the highest mean, and all that are not told apart from it."""
        top = max(range(len(self.means)), key=self.means.__getitem__, default=0)
        return [not self.better(top, j) for j in range(len(self.means))]

    def rank_ranges(self) -> list[tuple[int, int]]:
        """Best and worst rank that each row may have, from 1; two rows not told apart always share a rank."""
        count = len(self.means)
        first = [1 + sum(self._better[j][i] for j in range(count)) for i in range(count)]
        last = [count - sum(self._better[i]) for i in range(count)]
        widened = list(zip(first, last, strict=True))
        # being told apart is not transitive: two rows that are not may still have rows between them
        for i, j in itertools.permutations(range(count), 2):
            if not self.told_apart(i, j) and last[i] < first[j]:
                widened[i] = (widened[i][0], max(widened[i][1], first[j]))
                widened[j] = (min(widened[j][0], last[i]), widened[j][1])
        return widened


def rank_ranges(rows: Sequence[Outcomes]) -> list[tuple[int, int]]:
    """Best and worst rank of every row: 1 + the number of significantly better rows, and all but the number of
    significantly worse ones, widened where needed so that two rows not told apart share a rank.

    Raises:
        ValueError: rows over different numbers of images.
    """
    return PairedTests(rows).rank_ranges()


def _images(outcomes: Outcomes) -> int:
    sizes = {len(images) for images in outcomes}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"expected one list of outcomes a seed, all over the same images, got lengths {sorted(sizes)}")
    return sizes.pop()


def _right_seeds(outcomes: Outcomes) -> list[int]:
    """In how many seeds each image is right, (N,)."""
    return [sum(images) for images in zip(*outcomes, strict=True)]

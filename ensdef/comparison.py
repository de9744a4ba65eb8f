"""Two rows side by side: how far apart, how sure one may be of it, and of what. From records alone; no torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ensdef.errors import UsageError
from ensdef.records import Record
from ensdef.statistics import SIGNIFICANT, Components, Outcomes, components, paired_interval, paired_p, wins_and_losses


@dataclass(frozen=True)
class TrainingsTest:
    """Student's t test with the training as the unit: whether the methods differ, not only these networks.

    ``difference``, ``low``, ``high``: of the means over trainings, and its 95 % interval, as fractions.
    """

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Two rows that met the same attack on the same images.

    Args:
        names: of the rows, as they are told apart in print.
        condition: what both met, by field.
        accuracies: robust, means over seeds.
        spreads: of each row, by where they come from.
        difference: first minus second, a fraction; ``low`` and ``high``: its paired bootstrap interval.
        wins, losses: images on which the first, or the second, is right in more of its seeds.
        p: of the exact sign test over images; with one seed each McNemar's exact test.
        better: the row that is significantly better, None for a tie.
        trainings: None: fewer than two trainings on a side, or no spread at all.
    """

    names: tuple[str, str]
    condition: Mapping[str, Any]
    accuracies: tuple[float, float]
    spreads: tuple[Components, Components]
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    p: float
    better: Literal["first", "second"] | None
    trainings: TrainingsTest | None


def condition(record: Record) -> dict[str, Any]:
    """What two records must share for their difference to be one of the rows, by the names that messages use."""
    return {
        "dataset": record.dataset,
        "n": record.n,
        "subset": record.provenance.get("subset_checksum"),
        "ids": tuple(record.outcomes.get("ids", ())),
        "attack": record.attack,
        "attack_params": dict(record.attack_params),
        "norm": record.norm,
        "eps": record.eps_value,
        "success": record.success,
        "search": record.provenance.get("search"),
    }


def row_of(record: Record) -> dict[str, Any]:
    """What the records of one row share; they differ in seeds alone."""
    training = {f"training {name}": value for name, value in record.training.items() if name != "key"}
    return {
        "method": record.label,
        "architecture": record.architecture,
        "members": record.members,
        "combiner": record.combiner,
        **training,
    }


def compare(first: Sequence[Record], second: Sequence[Record], seed: int = 0) -> Comparison:
    """Compare two rows, each given by its records: one, or one a training seed and attack seed.

    Args:
        seed: of the bootstrap.
    Raises:
        UsageError: a failed record, records of a row that differ in more than seeds, or rows that did not meet the
            same attack on the same images; the field that differs is named.
    """
    everything = [*first, *second]
    for record in everything:
        if record.error is not None:
            raise UsageError(f"{_where(record)} failed ({record.error}); run it again before it is compared")
        refuse_difference(everything[0], record, condition, "a comparison needs the same attack on the same images")
    for side in (first, second):
        for record in side:
            refuse_difference(side[0], record, row_of, "records of one row may differ in their seeds alone")
    outcomes = _by_seeds(first), _by_seeds(second)
    a, b = (list(one.values()) for one in outcomes)
    means = _mean(a), _mean(b)
    (low, high), p = paired_interval(a, b, seed), paired_p(a, b)
    wins, losses = wins_and_losses(a, b)
    better: Literal["first", "second"] | None = None
    if p < SIGNIFICANT and (wins - losses) * (means[0] - means[1]) > 0:
        better = "first" if wins > losses else "second"
    return Comparison(
        names=_names(first[0], second[0]),
        condition={**condition(first[0]), "attack": first[0].attack_label, "eps": first[0].eps},
        accuracies=means,
        spreads=(components(outcomes[0]), components(outcomes[1])),
        difference=means[0] - means[1],
        low=low,
        high=high,
        wins=wins,
        losses=losses,
        p=p,
        better=better,
        trainings=_trainings_test(*outcomes),
    )


def refuse_difference(first: Record, other: Record, fields: Any, why: str) -> None:
    """Refuse two records whose ``fields`` differ.

    Raises:
        UsageError: names the first field that differs, and both values.
    """
    told, expected = fields(other), fields(first)
    for name in dict.fromkeys([*expected, *told]):
        if expected.get(name) != told.get(name):
            values = f": {expected.get(name)!r} and {told.get(name)!r}" if name != "ids" else ""
            raise UsageError(f"{_where(first)} and {_where(other)} differ in {name}{values}; {why}")


def _by_seeds(records: Sequence[Record]) -> dict[tuple[Any, Any], list[int]]:
    found: dict[tuple[Any, Any], list[int]] = {}
    for record in records:
        seeds = record.train_seed, record.provenance.get("attack_seed", 0)
        if seeds in found:
            raise UsageError(
                f"{record.label} is there twice with training seed {seeds[0]} and attack seed {seeds[1]} "
                f"({_where(record)}); name each record once"
            )
        found[seeds] = record.outcomes["robust"]
    return found


def _trainings_test(
    first: Mapping[tuple[Any, Any], Sequence[int]], second: Mapping[tuple[Any, Any], Sequence[int]]
) -> TrainingsTest | None:
    from scipy.stats import ttest_ind

    means = [_training_means(side) for side in (first, second)]
    if min(map(len, means)) < 2 or all(len(set(side)) == 1 for side in means):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the trainings of one side agree to the last digit
        found = ttest_ind(*means)
    interval = found.confidence_interval(0.95)
    return TrainingsTest(
        fmean(means[0]) - fmean(means[1]), float(interval.low), float(interval.high), float(found.pvalue)
    )


def _training_means(outcomes: Mapping[tuple[Any, Any], Sequence[int]]) -> list[float]:
    by_training: dict[Any, list[float]] = {}
    for (training, _), images in outcomes.items():
        by_training.setdefault(training, []).append(sum(images) / len(images))
    return [fmean(one) for one in by_training.values()]


def _mean(outcomes: Outcomes) -> float:
    return sum(map(sum, outcomes)) / (len(outcomes) * len(outcomes[0]))


def _names(first: Record, second: Record) -> tuple[str, str]:
    """Labels, with the fields that tell two rows of one method apart."""
    if first.label != second.label:
        return first.label, second.label
    rows = row_of(first), row_of(second)
    apart = [name for name in rows[0] if name in rows[1] and rows[0][name] != rows[1][name]]
    if not apart:
        return f"{first.label} seed {first.train_seed}", f"{second.label} seed {second.train_seed}"
    told = [", ".join(f"{name} {row[name]}" for name in apart) for row in rows]
    return f"{first.label} ({told[0]})", f"{second.label} ({told[1]})"


def _where(record: Record) -> str:
    return record.path or f"{record.label} under {record.attack_label}"

"""``ensdef compare`` and ``ensdef power``: what records tell of two rows, and what it takes to tell them apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensdef.cli import cli
from ensdef.errors import UsageError, suggest
from ensdef.notation import split_list

if TYPE_CHECKING:
    from ensdef.comparison import Comparison
    from ensdef.records import Record
    from ensdef.statistics import Components


@cli.command()
@click.argument("first")
@click.argument("second")
@click.option(
    "--attack", metavar="CALL", help="Under this attack alone, as tables write it [default: each that both met]."
)
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Comparisons as JSON on stdout.")
def compare(first: str, second: str, attack: str | None, results: Path, seed: int, as_json: bool) -> None:
    """Whether two rows can be told apart: paired tests on the images that both met.

    FIRST and SECOND are methods as tables write them (all their seeds in RESULTS are taken), or record files,
    comma separated if a row has several seeds.

    \b
    ensdef compare soe adv_en
    ensdef compare "gal[adversarial=true]" adp --attack pgd
    ensdef compare results/records/digits/soe/pgd-691968eb9bf5d4e6.json other/pgd-2f08c1.json
    """
    from ensdef.comparison import compare as compare_rows

    sides = [_records(text, results, attack) for text in (first, second)]
    if all(one[0] for one in sides):  # files on both sides: whatever differs is to be told, not passed over
        pairs = [(sides[0][1], sides[1][1])]
    else:
        pairs = _met_by_both(sides[0][1], sides[1][1])
    compared = [compare_rows(ours, theirs, seed) for ours, theirs in pairs]
    if as_json:
        click.echo(json.dumps([_plain(one) for one in compared], indent=1))
        return
    for number, one in enumerate(compared):
        click.echo("\n" * bool(number) + "\n".join(told(one)))


def _records(text: str, results: Path, attack: str | None) -> tuple[bool, list[Record]]:
    """Whether files were named, and the finished records of one side."""
    from ensdef.records import Store, read_record

    names = split_list(text)
    if all(name.endswith(".json") for name in names):
        found = [read_record(Path(name)) for name in names]
        return True, _under(found, attack, text)
    finished = [record for record in Store(results).all() if record.error is None]
    labels = {record.label for record in finished}
    if text not in labels:
        raise UsageError(f"{suggest('row', text, labels)} (finished records in {results}; a file name ends in .json)")
    return False, _under([record for record in finished if record.label == text], attack, text)


def _under(records: list[Record], attack: str | None, text: str) -> list[Record]:
    found = [record for record in records if attack in (None, record.attack_label)]
    if not found:
        met = ", ".join(sorted({record.attack_label for record in records}))
        raise UsageError(f"{text} has no record under {attack}; it met: {met}")
    return found


def _met_by_both(first: list[Record], second: list[Record]) -> list[tuple[list[Record], list[Record]]]:
    """The records of two rows, by what both met."""
    from ensdef.comparison import condition, refuse_difference

    def groups(records: Iterable[Record]) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = {}
        for record in records:
            found.setdefault(json.dumps(condition(record), sort_keys=True, default=str), []).append(record)
        return found

    ours, theirs = groups(first), groups(second)
    shared = [name for name in ours if name in theirs]
    if not shared:
        refuse_difference(first[0], second[0], condition, "the rows have not met the same attack on the same images")
    return [(ours[name], theirs[name]) for name in shared]


def told(one: Comparison) -> list[str]:
    """A comparison in sentences; numbers in percent and points."""
    first, second = one.names
    met = one.condition
    budget = f" {met['norm']} {met['eps']}" if met["norm"] else ""
    verdict = {"first": f"{first} is better", "second": f"{second} is better", None: "tie: not told apart at 5 %"}
    several = any(_several(spread) for spread in one.spreads)
    lines = [
        f"{first} against {second} under {met['attack']}{budget}, {met['n']} images of {met['dataset']}",
        *(
            f"  {name}: {100 * accuracy:.1f} %, {_spread(spread)}"
            for name, accuracy, spread in zip(one.names, one.accuracies, one.spreads, strict=True)
        ),
        f"  difference {_points(one.difference, one.low, one.high)} (paired bootstrap over images, 95 %)",
        f"  {'right in more seeds' if several else 'right alone'}: {first} on {one.wins} images, {second} on "
        f"{one.losses}; p = {one.p:.2g} ({'exact sign test over images' if several else 'McNemar, exact'})",
        f"  {verdict[one.better]}" + (", as the networks that were trained" if one.better else ""),
    ]
    if one.trainings is not None:
        of = one.trainings
        lines.append(
            f"  as methods, a training being the unit: {_points(of.difference, of.low, of.high)}, p = {of.p:.2g} "
            f"(Student's t): {'told apart' if of.p < 0.05 else 'tie'}"
        )
    return lines


def _several(spread: Components) -> bool:
    return spread.training_seeds is not None or spread.attack_seeds is not None


def _spread(spread: Components) -> str:
    parts = [f"± {100 * spread.images:.1f} over images"]
    for name, value in (("training seeds", spread.training_seeds), ("attack seeds", spread.attack_seeds)):
        parts.append(f"one of the {name}" if value is None else f"{100 * value:.2f} between {name}")
    return ", ".join(parts)


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _plain(one: Comparison) -> dict[str, object]:
    return {**dataclasses.asdict(one), "condition": {k: v for k, v in one.condition.items() if k != "ids"}}


@cli.command()
@click.option("--difference", type=click.FloatRange(0, 100, min_open=True), required=True, help="Points to resolve.")
@click.option("--accuracy", type=float, default=50.0, show_default=True, help="Of the worse row, in percent.")
@click.option(
    "--discordance",
    type=float,
    help="Percent of the images on which exactly one row is right; `ensdef compare` counts them  [default: 13, or the "
    "difference if that is more].",
)
@click.option(
    "--spread",
    type=click.FloatRange(0, 100, min_open=True),
    help="Standard deviation between training seeds, in points; without it trainings are not planned.",
)
@click.option(
    "--power",
    "target",
    type=click.FloatRange(0, 100, min_open=True, max_open=True),
    default=80.0,
    show_default=True,
    help="Chance, in percent, of seeing the difference.",
)
@click.option("--images", type=click.IntRange(2, 10**7), help="Tell the power of this number of images.")
@click.option("--trainings", type=click.IntRange(2, 10**5), help="Tell the power of this number of trainings a method.")
def power(
    difference: float,
    accuracy: float,
    discordance: float | None,
    spread: float | None,
    target: float,
    images: int | None,
    trainings: int | None,
) -> None:
    """Images and trainings that it takes to tell two rows apart at 5 %.

    \b
    ensdef power --difference 0.5
    ensdef power --difference 2 --discordance 8 --spread 0.9 --images 1000
    """
    from ensdef import power as planner

    if trainings is not None and spread is None:
        raise UsageError("--trainings needs --spread, the standard deviation between training seeds in points")
    p, d = accuracy / 100, difference / 100
    share = max(planner.DISCORDANCE, d) if discordance is None else discordance / 100
    planner.check_pair(p, d, share)
    goal = target / 100
    click.echo(
        f"{difference:g} points between rows of {accuracy:g} and {accuracy + difference:g} %, at 5 %, two-sided; the "
        f"rows differ on {100 * share:g} % of the images"
    )
    tests: dict[str, Callable[[int], float]] = {
        "the same images for both rows (McNemar, exact)": lambda n: planner.paired_power(n, d, share),
        "other images for each row (chi-squared)": lambda n: planner.unpaired_power(n, p, d),
    }
    for name, of in tests.items():
        needed = planner.smallest(of, goal, 10**7)
        click.echo(f"  {name}: {_number(needed, 10**7)} images for a power of {target:g} %")
        if images is not None:
            click.echo(f"    with {images:,} images: {100 * of(images):.1f} %")
    if spread is not None:

        def of_trainings(k: int) -> float:
            return planner.trainings_power(k, d, spread / 100)

        needed = planner.smallest(of_trainings, goal, 10**5)
        click.echo(
            f"  trainings that spread by {spread:g} points (Student's t): {_number(needed, 10**5)} of each method "
            f"for a power of {target:g} %"
        )
        if trainings is not None:
            click.echo(f"    with {trainings:,} trainings of each: {100 * of_trainings(trainings):.1f} %")


def _number(needed: int | None, limit: int) -> str:
    return f"more than {limit:,}" if needed is None else f"{needed:,}"

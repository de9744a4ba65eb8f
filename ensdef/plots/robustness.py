"""Accuracy against the attacker's radius, from records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ensdef.errors import UsageError
from ensdef.metrics import binomial_stderr
from ensdef.notation import fraction
from ensdef.plots.choice import Choice, listed, radius, telling
from ensdef.plots.kinds import KINDS
from ensdef.plots.style import HEIGHT, caption, line_style, new_figure, styled
from ensdef.records import Record

#: Inches of a panel's width, of a letter in the legend, and of a line there.
PANEL, LETTER, ENTRY = 4.2, 0.065, 0.17
#: Radii up to this many are written at the axis as the user wrote them.
TICKS = 9


@dataclass(frozen=True)
class Point:
    """Accuracy at one radius, a fraction, over so many training seeds; ``stderr`` is its standard error."""

    eps: float
    accuracy: float
    stderr: float
    seeds: int


@dataclass(frozen=True)
class Line:
    """One method under one attack, points in the order of their radii; the first one at 0 is clean accuracy."""

    label: str
    points: tuple[Point, ...]


def draw(results: Path, choice: Choice) -> Figure:
    """One panel for each data set and norm, one line for each method (and attack, and whatever else differs)."""
    records = choice.records(results, KINDS["robustness"].command)
    records = [record for record in records if record.eps is not None]
    if not records:
        raise UsageError(f"no record in {results} has a radius; run `{KINDS['robustness'].command}`")
    panels: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        panels[record.dataset, str(record.norm)].append(record)
    found = {panel: lines(group) for panel, group in panels.items()}
    # a method looks the same in every panel
    labels = list(dict.fromkeys(line.label for drawn in found.values() for line in drawn))
    styles = {label: line_style(index) for index, label in enumerate(labels)}
    with styled():
        longest = max(map(len, labels))
        figure = new_figure(PANEL * len(panels) + LETTER * longest + 0.6, max(HEIGHT, ENTRY * len(labels) + 0.8))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, ((dataset, norm), group) in zip(axes, panels.items(), strict=True):
            _panel(axis, found[dataset, norm], styles, group, norm)
            if len(panels) > 1:
                axis.set_title(f"{dataset}, {norm}", loc="left", fontsize=9)
        handles = {handle.get_label(): handle for axis in axes for handle in axis.get_lines()}
        figure.legend([handles[label] for label in labels], labels, loc="outside right upper", fontsize=8)
        caption(figure, _told(records))
    return figure


def lines(records: Sequence[Record]) -> list[Line]:
    """The lines that records of one data set and norm give, named by what tells them apart.

    Raises:
        UsageError: two records are one point of one line.
    """
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    traits = [_traits(record, _versions(records)) for record in records]
    told = telling(traits)
    for record, trait in zip(records, traits, strict=True):
        groups[tuple(trait[name] for name in told)].append(record)
    found = []
    for names, group in groups.items():
        label = ", ".join(name for name in names if name)
        radii = {str(record.training.get("eps")) for record in group}
        if len(radii) > 1 and not all(_trained_as_attacked(record) for record in group):
            for train_eps in sorted(radii):
                part = [record for record in group if str(record.training.get("eps")) == train_eps]
                found.append(_line(f"{label}, trained at {train_eps}", part))
        else:
            found.append(_line(label + (", trained at each radius" if len(radii) > 1 else ""), group))
    return found


def _line(label: str, records: Sequence[Record]) -> Line:
    """Records of one line, by radius and training seed."""
    at: dict[Fraction, dict[int | None, Record]] = defaultdict(dict)
    for record in records:
        eps = radius(record)
        assert eps is not None
        if (other := at[eps].setdefault(record.train_seed, record)) is not record:
            raise UsageError(
                f"{other.path} and {record.path} are both {label} at {record.eps}, seed {record.train_seed}; choose "
                "the records of one table with --table, or delete one"
            )
    points = [_point(float(eps), [record.robust_accuracy for record in at[eps].values()], records) for eps in at]
    models: dict[int | None, set[float | None]] = defaultdict(set)
    for record in records:
        models[record.train_seed].add(record.clean_accuracy)
    # a line of several models a seed (one for each radius) has no one clean accuracy
    if 0 not in at and all(len(accuracies) == 1 for accuracies in models.values()) and _one_model(records):
        points.append(_point(0.0, [accuracy for (accuracy,) in models.values()], records))
    return Line(label, tuple(sorted(points, key=lambda point: point.eps)))


def _one_model(records: Sequence[Record]) -> bool:
    keys = {(record.train_seed, record.training.get("key")) for record in records}
    return len(keys) == len({seed for seed, _ in keys})


def _point(eps: float, accuracies: Iterable[float | None], records: Sequence[Record]) -> Point:
    values = [float(accuracy) for accuracy in accuracies if accuracy is not None]
    mean = sum(values) / len(values)
    variance = binomial_stderr(mean, records[0].n) ** 2
    if len(values) > 1:  # seeds see the same test images: both spreads count
        variance += sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
    return Point(eps, mean, math.sqrt(variance), len(values))


def _traits(record: Record, versions: Mapping[str, set[str]]) -> dict[str, str]:
    """What may tell two lines apart, as it is written in the legend."""
    protocol = str(record.provenance.get("protocol") or "")
    several = len(versions.get(protocol.rpartition("-v")[0], ())) > 1
    recipe = record.training.get("recipe", {})
    return {
        "method": record.label,
        "attack": record.attack_label,
        "combiner": "" if record.combiner == "native" else f"on {record.combiner}",
        "members": f"{record.members} members",
        "architecture": record.architecture,
        "epochs": f"{recipe.get('epochs')} epochs",
        "limit": f"{record.training.get('limit') or 'all'} training images",
        "precision": str(record.training.get("precision") or ""),
        "search": f"{record.provenance.get('search')} search",
        "n": f"{record.n} images",
        "attack_seed": f"attack seed {record.provenance.get('attack_seed')}",
        # records of two versions of a protocol are not merged; which protocol asked for them otherwise does not matter
        "protocol": protocol if several else "",
    }


def _versions(records: Sequence[Record]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if protocol := record.provenance.get("protocol"):
            found[str(protocol).rpartition("-v")[0]].add(str(protocol))
    return found


def _trained_as_attacked(record: Record) -> bool:
    trained = record.training.get("eps")
    try:
        return trained is not None and fraction(str(trained), "train_eps") == radius(record)
    except UsageError:  # uniform(a, b)
        return False


def _panel(
    axis: Axes, found: Sequence[Line], styles: Mapping[str, Mapping[str, str]], records: Sequence[Record], norm: str
) -> None:
    for line in found:
        eps = [point.eps for point in line.points]
        percent = [100 * point.accuracy for point in line.points]
        style = styles[line.label]
        axis.plot(eps, percent, label=line.label, clip_on=False, **style)  # type: ignore[arg-type]
        low, high = ([100 * (p.accuracy + sign * p.stderr) for p in line.points] for sign in (-1, 1))
        axis.fill_between(eps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    written = {float(fraction(str(record.eps), "eps")): str(record.eps) for record in records}
    if len(written) <= TICKS:
        ticks = sorted({0.0, *written})
        axis.set_xticks(ticks, [written.get(tick, "0") for tick in ticks])
    axis.set_xlim(left=0)
    axis.set_ylim(0, 100)
    axis.set_xlabel(f"radius of the attack ({norm}, images in [0, 1])")
    axis.set_ylabel("accuracy in percent")


def _told(records: Sequence[Record]) -> str:
    seeds = {record.train_seed for record in records}
    datasets, attacks = (listed(getattr(record, name) for record in records) for name in ("dataset", "attack_label"))
    counts = listed(sorted({record.n for record in records}))
    return (
        f"{datasets}; attacks: {attacks}; n = {counts} test images"
        f"{f', {len(seeds)} training seeds' if len(seeds) > 1 else ''}; at radius 0 clean accuracy; bands: one "
        "standard error to each side."
    )

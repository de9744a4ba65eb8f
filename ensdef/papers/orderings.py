"""Which of two rows the paper puts first, and whether ours does: counted as far as tests can tell. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ensdef.papers.comparison import Entry
from ensdef.papers.layout import column_of
from ensdef.statistics import SIGNIFICANT, paired_p

#: Standard errors that two numbers without outcomes must lie apart.
APART = 1.96


@dataclass(frozen=True)
class Orderings:
    """Pairs of rows in one column that the paper gives different numbers.

    Args:
        same, opposite: ours differ too, significantly, in the paper's direction or the other one.
        undecided: ours are not told apart.
    """

    same: int
    opposite: int
    undecided: int

    @property
    def pairs(self) -> int:
        return self.same + self.opposite + self.undecided


def orderings(entries: Sequence[Entry]) -> Orderings:
    """Compare every two rows of every column.

    Accuracies on the same images by the exact paired test, at 5 % for each pair; other shares by their standard errors.
    Numbers that have neither (seconds, sizes, gains) are left out.
    """
    columns: dict[tuple[str, ...], list[Entry]] = {}
    cells = [entry.cell for entry in entries]
    for entry in entries:
        if entry.difference is not None and entry.stderr is not None:
            columns.setdefault(column_of(entry.cell, cells), []).append(entry)
    counts = {"same": 0, "opposite": 0, "undecided": 0}
    for column in columns.values():
        for one, other in itertools.combinations(column, 2):
            if one.cell.number != other.cell.number:
                counts[_verdict(one, other)] += 1
    return Orderings(**counts)


def _verdict(one: Entry, other: Entry) -> str:
    assert one.ours is not None
    assert other.ours is not None
    if one.ours == other.ours or not _told_apart(one, other):
        return "undecided"
    theirs = float(one.cell.value) > float(other.cell.value)
    return "same" if (one.ours > other.ours) == theirs else "opposite"


def _told_apart(one: Entry, other: Entry) -> bool:
    ours, others = one.outcomes, other.outcomes
    if ours and others and len(ours[0]) == len(others[0]):
        return paired_p(ours, others) < SIGNIFICANT
    assert one.ours is not None
    assert other.ours is not None
    error = math.hypot(one.stderr or 0.0, other.stderr or 0.0)
    return abs(one.ours - other.ours) > APART * error

"""Which of two rows the paper puts first, and whether ours does: counted as far as tests can tell. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ensdef.papers.comparison import Entry
from ensdef.papers.layout import column_of
from ensdef.statistics import PairedTests

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


def best(entries: Sequence[Entry]) -> list[bool]:
    """Which accuracies are not told apart from the best of their column (5 % over all its pairs, Holm's correction)."""
    columns: dict[tuple[str, ...], list[int]] = {}
    cells = [entry.cell for entry in entries]
    for index, entry in enumerate(entries):
        if entry.outcomes:
            columns.setdefault(column_of(entry.cell, cells), []).append(index)
    found = [False] * len(entries)
    for column in columns.values():
        if len({len(entries[index].outcomes[0]) for index in column}) == 1 and len(column) > 1:
            for index, is_best in zip(column, PairedTests([entries[i].outcomes for i in column]).best(), strict=True):
                found[index] = is_best
    return found


def _verdict(one: Entry, other: Entry) -> str:
    """Ours against the paper's order of two rows."""
    theirs = float(one.cell.value) > float(other.cell.value)
    above, below = _above(one, other), _above(other, one)
    if not above and not below:
        return "undecided"
    return "same" if above == theirs else "opposite"


def _above(one: Entry, other: Entry) -> bool:
    """Whether ours is significantly larger for the first row."""
    ours, others = one.outcomes, other.outcomes
    if ours and others and len(ours[0]) == len(others[0]):
        return PairedTests([ours, others]).better(0, 1)
    assert one.ours is not None
    assert other.ours is not None
    return one.ours - other.ours > APART * math.hypot(one.stderr or 0.0, other.stderr or 0.0)

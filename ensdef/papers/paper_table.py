"""A paper's table as a protocol: which of our defences, attacks and measurements answer its rows and columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ensdef.papers.published import PublishedCell, published_table
from ensdef.protocol import Protocol
from ensdef.protocol_file import Refusal
from ensdef.scale import Scale

#: How a number follows from two: in points, or in percent of the second.
Derivation = Literal["difference", "relative"]


@dataclass(frozen=True)
class Row:
    """Our model for a row of the paper.

    Args:
        method: a call.
        against: the row that gains are counted from.
        arch, members, norm, train_eps, recipe: of its training, where they are not the table's. ``train_eps`` is in the
            paper's units, for ``norm``.
        measure, value: what is read instead of the column's, for rows that are parts of a model.
    """

    method: str
    against: str | None = None
    arch: str | None = None
    members: int | None = None
    norm: Literal["linf", "l2"] = "linf"
    train_eps: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    measure: str | None = None
    value: str | None = None


@dataclass(frozen=True)
class Column:
    """Our question for some of a paper's cells: those with this attack, metric, architecture and these conditions.

    Args:
        attack, metric, architecture: as printed; None: any.
        where: conditions, a part of the cell's.
        call: our attack.
        measure: our measurement, where the number is no accuracy.
        value: what is read of the measurement; None: the metric's name.
        derive: how the number follows from the row's and that of ``against``.
        eps: radius in the paper's units, where the paper does not print one.
        train_eps: of the training, in the paper's units.
    """

    attack: str | None = None
    metric: str | None = None
    architecture: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    call: str | None = None
    measure: str | None = None
    value: str | None = None
    derive: Derivation | None = None
    eps: str | None = None
    train_eps: str | None = None

    def answers(self, cell: PublishedCell) -> bool:
        """Whether a cell is one of these."""
        fits = (
            self.attack in (None, cell.attack)
            and self.metric in (None, cell.metric)
            and self.architecture in (None, cell.architecture)
        )
        return fits and self.where.items() <= cell.conditions.items()


@dataclass(frozen=True)
class Asked:
    """One thing to train and attack or measure.

    Args:
        train_eps: in the units of our data; ``"eps"``: the attack's radius; None: the data set's default.
        attack: a call; for a measurement ``none``, as it has its own.
        recipe: overrides, as JSON.
    """

    method: str
    dataset: str
    arch: str | None
    members: int | None
    combiner: str
    norm: str
    eps: str | None
    train_norm: str
    train_eps: str | None
    attack: str
    measure: str | None = None
    recipe: str = "{}"


@dataclass(frozen=True)
class Question:
    """A published cell and what answers it.

    Args:
        index: of the cell in its table.
        value: what to read of a record or a measurement.
        against: what gains are counted from, where ``derive`` is set.
    """

    index: int
    cell: PublishedCell
    asked: Asked
    value: str
    derive: Derivation | None = None
    against: Asked | None = None


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper at one scale.

    Args:
        published: ``paper/table``.
        base: the settings of the scale: samples, seeds, recipe, ...
        train_eps: ``"eps"`` for one training per radius, or a radius in the paper's units; None: the scale's, or the
            data set's default.
        combiners: our combiner for the printed one; the defence's own where it is not named.
        deviations: what differs from the paper at every scale, in sentences.
        notes: on the printed numbers themselves.
        changes: of a user, to the base; they give the table another name.
    """

    name: str
    title: str
    published: str
    scale: Scale
    base: Protocol
    rows: Mapping[str, Row]
    columns: Sequence[Column]
    version: int = 1
    train_eps: str | None = None
    combiners: Mapping[str, str] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def id(self) -> str | None:
        """Written into the records of its run; None: a user changed it."""
        return None if self.changes else f"{self.name}-v{self.version}-{self.scale.name}"

    @property
    def table(self) -> str:
        """Name of its table."""
        return f"{self.name}-{self.scale.name}" + ("-changed" if self.changes else "")

    def row_of(self, cell: PublishedCell) -> Row | None:
        return self.rows.get(cell.label) or self.rows.get(cell.method)

    def questions(self) -> list[Question]:
        """One for every published cell, empty ones included.

        Raises:
            Refusal: no row or no column of ours for a cell.
        """
        return [self._question(index, cell) for index, cell in enumerate(published_table(self.published))]

    def _question(self, index: int, cell: PublishedCell) -> Question:
        row = self.row_of(cell)
        if row is None:
            raise Refusal("rows", f"rows has nothing for {cell.label!r}, a row of {self.published}")
        column = next((column for column in self.columns if column.answers(cell)), None)
        if column is None:
            raise Refusal(
                "columns",
                f"columns has nothing for attack {cell.attack!r}, metric {cell.metric!r} ({cell.attack_params}), a "
                f"column of {self.published}",
            )
        asked, against = self._asked(cell, row, column), None
        if column.derive:
            if row.against not in self.rows:
                raise Refusal(
                    "against" if row.against else "rows",
                    f"row {cell.label!r} has against = {row.against!r}, which derive = {column.derive!r} needs to be "
                    f"one of the rows: {', '.join(self.rows)}",
                )
            against = self._asked(cell, self.rows[str(row.against)], column)
        usual = "robust_accuracy" if asked.measure is None else cell.metric
        return Question(index, cell, asked, row.value or column.value or usual, column.derive, against)

    def _asked(self, cell: PublishedCell, row: Row, column: Column) -> Asked:
        stand_in = self.scale.dataset(cell.dataset)
        norm = cell.norm or "linf"
        printed = cell.eps or column.eps
        measure = row.measure or column.measure
        return Asked(
            method=row.method,
            dataset=stand_in.name,
            arch=row.arch or self.scale.architecture(cell.architecture),
            members=row.members or self.scale.members_of(cell.members),
            combiner=self.combiners.get(cell.combiner, "native"),
            norm=norm,
            eps=None if not printed else stand_in.radius(printed, norm),
            train_norm=row.norm,
            train_eps=self._train_eps(row, column, cell),
            attack="none" if measure else column.call or "none",
            measure=measure,
            recipe=json.dumps(row.recipe, sort_keys=True),
        )

    def _train_eps(self, row: Row, column: Column, cell: PublishedCell) -> str | None:
        printed = row.train_eps or column.train_eps or self.train_eps or self.base.train_eps
        return None if printed is None else self.scale.dataset(cell.dataset).radius(printed, row.norm)

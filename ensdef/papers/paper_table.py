"""A paper's table as a protocol: which of our defences, attacks and measurements answer its rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ensdef.errors import UsageError
from ensdef.papers.published import PublishedCell, published_table
from ensdef.protocol import Protocol, chosen_scale, parse_protocol
from ensdef.protocol_file import ProtocolFile, Refusal, only_keys, table_of_texts
from ensdef.scale import Scale, load_scale

#: How a number follows from two: in points, or in percent of the second.
Derivation = Literal["difference", "relative"]


@dataclass(frozen=True)
class Row:
    """Our model for a row of the paper.

    Args:
        method: a call.
        against: the call that gains are counted from.
        arch, members, norm, train_eps, recipe: of its training, where they are not the table's. ``train_eps`` is in the
            paper's units, for ``norm``.
        measure, value: what is read instead of the column's, for rows that are parts of a model.
    """

    method: str
    against: str | None = None
    arch: str | None = None
    members: int | None = None
    norm: str = "linf"
    train_eps: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    measure: str | None = None
    value: str | None = None


@dataclass(frozen=True)
class Column:
    """Our question for some of a paper's cells: those with this attack, this metric and these conditions.

    Args:
        attack, metric: as printed; None: any.
        where: conditions, a part of the cell's.
        call: our attack.
        measure: our measurement, where the number is no accuracy.
        value: what is read of the record or measurement; None: the robust accuracy, or the metric's name.
        derive: how the number follows from the row's and that of ``against``.
        eps: radius in the paper's units, where the paper does not print one.
        train_eps: of the training, in the paper's units.
    """

    attack: str | None = None
    metric: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    call: str | None = None
    measure: str | None = None
    value: str | None = None
    derive: Derivation | None = None
    eps: str | None = None
    train_eps: str | None = None

    def answers(self, cell: PublishedCell) -> bool:
        """Whether a cell is one of these."""
        fits = self.attack in (None, cell.attack) and self.metric in (None, cell.metric)
        return fits and self.where.items() <= cell.conditions.items()


@dataclass(frozen=True)
class Asked:
    """One thing to train and attack or measure.

    Args:
        attack: a call; for a measurement ``none``, as it has its own.
        train_eps: in the units of our data; ``"eps"``: the attack's radius; None: the data set's default.
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
    recipe: tuple[tuple[str, Any], ...] = ()


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
        train_eps: ``"eps"`` for one training per radius; None: the scale's, or the data set's default.
        combiners: our combiner for the printed one; the defence's own where it is not named.
        deviations: what differs from the paper at every scale, in sentences.
        notes: on the printed numbers themselves.
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

    @property
    def id(self) -> str:
        """Written into the records of its run."""
        return f"{self.name}-v{self.version}-{self.scale.name}"

    @property
    def table(self) -> str:
        """Name of its table."""
        return f"{self.name}-{self.scale.name}"

    def questions(self) -> list[Question]:
        """One for every published cell, empty ones included.

        Raises:
            UsageError: no row or no column of ours for a cell.
        """
        return [self._question(index, cell) for index, cell in enumerate(published_table(self.published))]

    def _question(self, index: int, cell: PublishedCell) -> Question:
        row = self.rows.get(cell.label) or self.rows.get(cell.method)
        if row is None:
            raise Refusal("rows", f"rows has nothing for {cell.label!r}, a row of {self.published}")
        column = next((column for column in self.columns if column.answers(cell)), None)
        if column is None:
            raise Refusal(
                "columns",
                f"columns has nothing for attack {cell.attack!r}, metric {cell.metric!r} ({cell.attack_params}), a "
                f"column of {self.published}",
            )
        if column.derive and row.against is None:
            raise Refusal("rows", f"rows: {cell.label!r} has no 'against', which derive = {column.derive!r} needs")
        asked = self._asked(cell, row, column)
        against = None if row.against is None or not column.derive else replace(asked, method=row.against)
        usual = "robust_accuracy" if asked.measure is None else cell.metric
        return Question(index, cell, asked, row.value or column.value or usual, column.derive, against)

    def _asked(self, cell: PublishedCell, row: Row, column: Column) -> Asked:
        stand_in = self.scale.dataset(cell.dataset)
        norm = cell.norm or "linf"
        printed = cell.eps or column.eps
        eps = None if not printed else stand_in.radius(printed, norm)
        measure = row.measure or column.measure
        return Asked(
            method=row.method,
            dataset=stand_in.name,
            arch=row.arch or self.scale.architecture(cell.architecture),
            members=row.members or self.scale.members_of(cell.members),
            combiner=self.combiners.get(cell.combiner, "native"),
            norm=norm,
            eps=eps,
            train_norm=row.norm,
            train_eps=self._train_eps(row, column, cell),
            attack="none" if measure else column.call or "none",
            measure=measure,
            recipe=tuple(sorted(row.recipe.items())),
        )

    def _train_eps(self, row: Row, column: Column, cell: PublishedCell) -> str | None:
        printed = row.train_eps or column.train_eps
        if printed is not None:
            return self.scale.dataset(cell.dataset).radius(printed, row.norm)
        return self.train_eps or self.base.train_eps


def is_paper_table(file: ProtocolFile) -> bool:
    """Whether a protocol file is about a published table."""
    return "published" in file.content


def paper_table_of(file: ProtocolFile, scale: str | None = None) -> PaperTable:
    """The table that a file describes, at one scale.

    Args:
        scale: None: the smallest that the file has.
    Raises:
        UsageError: with file, line and key.
    """
    try:
        return parse_paper_table(file.content, file.name, scale)
    except Refusal as refusal:
        raise file.refuse(refusal) from refusal


def parse_paper_table(content: Mapping[str, Any], name: str, scale: str | None = None) -> PaperTable:
    """A table from its parsed TOML. Rows and columns of a scale go before the table's own."""
    owner = f"protocol {name}"
    known = ("version", "title", "published", "train_eps", "combiners", "deviations", "notes", "rows", "columns")
    only_keys(content, (*known, "scales"), owner)
    for key in ("title", "published", "rows", "columns"):
        if key not in content:
            raise Refusal(key, f"{owner} has no {key}; expected one")
    scales = content.get("scales", {})
    chosen = chosen_scale(scales, scale, name)
    if chosen is None:
        raise Refusal("scales", f"{owner} has no scales; expected tables such as [scales.smoke]")
    if not isinstance(content["rows"], Mapping) or not isinstance(content["columns"], list):
        raise Refusal("rows", f"{owner}: rows is a table by the paper's rows, columns a list of tables")
    changes = dict(scales[chosen])
    rows = {**content["rows"], **changes.pop("rows", {})}
    columns = [*changes.pop("columns", []), *content["columns"]]
    size = load_scale(chosen, changes)
    table = PaperTable(
        name=name,
        title=str(content["title"]),
        published=str(content["published"]),
        scale=size,
        base=parse_protocol(size.settings, name),
        rows={label: _row(label, entry) for label, entry in rows.items()},
        columns=[_column(entry) for entry in columns],
        version=_whole(content.get("version", 1), "version"),
        train_eps=content.get("train_eps"),
        combiners=table_of_texts(content.get("combiners", {}), "combiners"),
        deviations=_sentences(content, "deviations"),
        notes=_sentences(content, "notes"),
    )
    try:
        published_table(table.published)
    except UsageError as error:
        raise Refusal("published", str(error)) from error
    table.questions()
    return table


def _row(label: str, given: Any) -> Row:
    entry = {"method": given} if isinstance(given, str) else given
    if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
        raise Refusal(label, f"row {label!r} is {given!r}; expected a method, or a table with one")
    only_keys(entry, Row.__dataclass_fields__, f"row {label!r}")
    if "members" in entry:
        _whole(entry["members"], "members")
    return Row(**entry)


def _column(given: Any) -> Column:
    if not isinstance(given, Mapping):
        raise Refusal("columns", f"a column is {given!r}; expected a table, such as [[columns]]")
    only_keys(given, Column.__dataclass_fields__, "a column")
    column = Column(**given)
    table_of_texts(column.where, "where")
    if column.call is not None and column.measure is not None:
        raise Refusal("measure", f"a column has both call = {column.call!r} and measure = {column.measure!r}; keep one")
    if column.derive is not None and column.derive not in get_args(Derivation):
        raise Refusal("derive", f"derive is {column.derive!r}; expected one of {', '.join(get_args(Derivation))}")
    return column


def _whole(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refusal(key, f"{key} is {value!r}; expected a whole number of at least 1")
    return value


def _sentences(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = content.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Refusal(key, f"{key} is {value!r}; expected a list of sentences")
    return tuple(value)

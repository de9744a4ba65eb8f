"""Protocol files of papers' tables, from TOML to checked values. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ensdef.errors import UsageError
from ensdef.notation import fill
from ensdef.papers.paper_table import Column, PaperTable, Row
from ensdef.papers.published import published_table
from ensdef.protocol import chosen_scale, parse_protocol
from ensdef.protocol_file import ProtocolFile, Refusal, only_keys, table_of_texts
from ensdef.scale import OWN_KEYS, load_scale

T = TypeVar("T")

KEYS = ("version", "title", "published", "train_eps", "combiners", "deviations", "notes", "rows", "columns", "scales")
#: Settings of a run that a scale of a paper's table may have; the rest is asked for cell by cell.
SETTINGS = (
    *("samples", "limit", "seeds", "attack_seed", "epochs", "precision", "search", "train_eps"),
    *("recipe", "recipes", "method_recipes", "data_dir", "image_size"),
)
COMBINERS = ("native", "avg", "max", "vote")


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
        raise file.refuse(refusal, scale) from refusal


def parse_paper_table(content: Mapping[str, Any], name: str, scale: str | None = None) -> PaperTable:
    """A table from its parsed TOML. Rows and columns of a scale go before the table's own."""
    owner = f"protocol {name}"
    only_keys(content, KEYS, owner)
    for key in ("title", "published", "rows", "columns"):
        if key not in content:
            raise Refusal(key, f"{owner} has no {key}; expected one")
    scales = content.get("scales", {})
    chosen = chosen_scale(scales, scale, name)
    if chosen is None:
        raise Refusal("scales", f"{owner} has no scales; expected tables such as [scales.smoke]")
    changes = dict(scales[chosen])
    rows = {**_rows(content["rows"]), **_rows(changes.pop("rows", {}))}
    columns = [*_columns(changes.pop("columns", [])), *_columns(content["columns"])]
    only_keys(changes, (*OWN_KEYS, *SETTINGS), f"[scales.{chosen}]")
    size = load_scale(chosen, changes)
    train_eps = content.get("train_eps")
    if not isinstance(train_eps, str | None):
        raise Refusal("train_eps", f"train_eps is {train_eps!r}; expected a text, such as '8/255' or 'eps'")
    table = PaperTable(
        name=name,
        title=str(content["title"]),
        published=str(content["published"]),
        scale=size,
        base=parse_protocol(size.settings, name),
        rows=rows,
        columns=columns,
        version=_whole(content.get("version", 1), "version"),
        train_eps=train_eps,
        combiners=_combiners(content.get("combiners", {})),
        deviations=_sentences(content, "deviations"),
        notes=_sentences(content, "notes"),
    )
    _check(table)
    return table


def _check(table: PaperTable) -> None:
    """Every cell has a row and a column, and every row and column a cell."""
    try:
        cells = published_table(table.published)
    except UsageError as error:
        raise Refusal("published", str(error)) from error
    try:
        table.questions()
    except UsageError as error:
        raise error if isinstance(error, Refusal) else Refusal("train_eps", str(error)) from error
    used = [table.row_of(cell) for cell in cells]
    bases = {row.against for row in table.rows.values()}
    for label, row in table.rows.items():
        if label not in bases and not any(row is one for one in used):
            raise Refusal(label, f"row {label!r} is none of {table.published}; take it out, or correct its name")
    for column in table.columns:
        if not any(column.answers(cell) for cell in cells):
            raise Refusal("columns", f"a column answers no cell of {table.published}: {column}")


def _rows(given: Any) -> dict[str, Row]:
    if not isinstance(given, Mapping):
        raise Refusal("rows", f"rows is {given!r}; expected a table by the paper's rows")
    return {label: _row(label, entry) for label, entry in given.items()}


def _row(label: str, given: Any) -> Row:
    entry = {"method": given} if isinstance(given, str) else given
    if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
        raise Refusal(label, f"row {label!r} is {given!r}; expected a method, or a table with one")
    recipe = entry.get("recipe", {})
    if not isinstance(recipe, Mapping):
        raise Refusal("recipe", f"row {label!r}: recipe is {recipe!r}; expected a table of training settings")
    row = _filled(Row, entry, f"row {label!r}", {"recipe": dict(recipe)})
    if row.members is not None:
        _whole(row.members, "members")
    return row


def _columns(given: Any) -> list[Column]:
    if not isinstance(given, list) or not all(isinstance(entry, Mapping) for entry in given):
        raise Refusal("columns", f"columns is {given!r}; expected a list of tables, such as [[columns]]")
    return [_column(entry) for entry in given]


def _column(given: Mapping[str, Any]) -> Column:
    column = _filled(Column, given, "a column", {"where": table_of_texts(given.get("where", {}), "where")})
    if column.call is not None and column.measure is not None:
        raise Refusal("measure", f"a column has both call = {column.call!r} and measure = {column.measure!r}; keep one")
    if column.value is not None and column.measure is None:
        raise Refusal("value", f"a column has value = {column.value!r} and no measure to read it from")
    return column


def _filled(cls: Callable[..., T], given: Mapping[str, Any], owner: str, ready: Mapping[str, Any]) -> T:
    """A dataclass from texts and plain values; a refusal names the key. ``ready`` are values that need no check."""
    only_keys(given, cls.__dataclass_fields__, owner)  # type: ignore[attr-defined]
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in ready:
            if not isinstance(value, str) and key != "members":
                raise Refusal(key, f"{owner}: {key} is {value!r}; expected a text")
            values[key] = value
    known = {key: values[key] for key in values if key in ("norm", "derive", "members")}
    needed = {"method": ""} if "method" in values else {}
    try:
        checked = fill(cls, {**needed, **known}, owner)  # type: ignore[arg-type]
    except UsageError as error:
        raise Refusal(next(iter(known), owner), str(error)) from error
    return cls(**{**values, **{key: getattr(checked, key) for key in known}, **ready})


def _combiners(given: Any) -> dict[str, str]:
    combiners = table_of_texts(given, "combiners")
    for ours in combiners.values():
        if ours not in COMBINERS:
            raise Refusal("combiners", f"combiners has {ours!r}; expected one of {', '.join(COMBINERS)}")
    return combiners


def _whole(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refusal(key, f"{key} is {value!r}; expected a whole number of at least 1")
    return value


def _sentences(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = content.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Refusal(key, f"{key} is {value!r}; expected a list of sentences")
    return tuple(value)

"""What a results folder holds that the report shows; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ensdef.errors import UsageError
from ensdef.manifests import Manifests
from ensdef.records import Record

if TYPE_CHECKING:
    from ensdef.measurement import Measurement
    from ensdef.papers.comparison import Comparison


@dataclass(frozen=True)
class ResultsTable:
    """The records that belong together because one protocol, or one command, asked for them.

    Args:
        kind: ``"grid"`` or ``"leaderboard"``.
    """

    name: str
    title: str
    kind: str
    records: tuple[Record, ...]

    @property
    def protocols(self) -> tuple[str, ...]:
        """Ids (name and version) that the records carry, that of the run that made each."""
        ids = {record.provenance.get("protocol") for record in self.records}
        return tuple(sorted(str(name) for name in ids if name))


@dataclass(frozen=True)
class Gathered:
    """Everything the page is made of.

    Args:
        measurements: of how far examples carry over between members.
    """

    tables: tuple[ResultsTable, ...]
    comparisons: tuple[Comparison, ...] = ()
    measurements: tuple[Measurement, ...] = ()

    @property
    def records(self) -> list[Record]:
        """Every record once, though several tables may share it."""
        tabled = [record for table in self.tables for record in table.records]
        compared = [record for item in self.comparisons for entry in item.entries for record in entry.records]
        return list({record.key: record for record in [*tabled, *compared]}.values())

    @property
    def compared_measurements(self) -> list[Measurement]:
        """Those that answer a published number, every one once."""
        found = [one for item in self.comparisons for entry in item.entries for one in entry.measurements]
        return list({one.key: one for one in found}.values())


def gather(results: Path) -> Gathered:
    """Every table of a folder, leaderboards first, then by name.

    Raises:
        UsageError: no tables, a record that is missing or damaged, or records of two versions of one protocol.
    """
    manifests = Manifests(results)
    names = manifests.names()
    if not names:
        published = results / "published"
        there = f", or pass --results {published}" if Manifests(published).names() else ""
        raise UsageError(f"no results in {results}; `ensdef run digits_all` or `ensdef bench` makes some{there}")
    kinds = {name: manifests.kind(name) for name in names}
    tables = [_table(manifests, name, kind) for name, kind in kinds.items() if kind in ("grid", "leaderboard")]
    tables.sort(key=lambda table: (table.kind != "leaderboard", table.name))
    papers = [name for name, kind in kinds.items() if kind == "paper"]
    return Gathered(tuple(tables), _comparisons(papers, results), _measurements(results))


def _table(manifests: Manifests, name: str, kind: str) -> ResultsTable:
    title, records = manifests.read(name)
    table = ResultsTable(name, title, kind, tuple(records))
    _refuse_two_versions(table)
    return table


def _comparisons(names: list[str], results: Path) -> tuple[Comparison, ...]:
    if not names:
        return ()
    from ensdef.papers.comparison import compare

    return tuple(compare(name, results) for name in names)


def _measurements(results: Path) -> tuple[Measurement, ...]:
    if not (results / "measurements").is_dir():
        return ()
    from ensdef.measurement import Measurements

    return tuple(Measurements(results).all("transferability"))


def _refuse_two_versions(table: ResultsTable) -> None:
    """A record may be a cell of several protocols; one version of each must be common to all that are of it."""
    common: dict[str, set[str]] = {}
    for record in table.records:
        ids: dict[str, set[str]] = {}
        for name in (record.provenance.get("protocol"), *record.provenance.get("also_in", ())):
            if name:
                ids.setdefault(str(name).rpartition("-v")[0], set()).add(str(name))
        for stem, versions in ids.items():
            before = common.setdefault(stem, versions)
            common[stem] = before & versions
            if not common[stem]:
                raise UsageError(
                    f"table {table.name} has records of {' and of '.join(sorted(before | versions))}, whose numbers "
                    f"cannot stand side by side; run `ensdef run {stem}` again"
                )

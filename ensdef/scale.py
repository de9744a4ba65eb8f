"""How large a replication is: what stands for the papers' data, networks and training."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any

from ensdef.errors import UsageError, suggest
from ensdef.notation import fraction
from ensdef.protocol_file import Refusal, only_keys, table_of_texts

#: Keys of a scale that are no settings of a run.
OWN_KEYS = ("title", "deviations", "datasets", "architectures", "members")


@dataclass(frozen=True)
class StandIn:
    """The data set that stands for one of a paper's.

    Args:
        name: registered data set.
        linf, l2: factors on the paper's radii.
    """

    name: str
    linf: Fraction = Fraction(1)
    l2: Fraction = Fraction(1)

    def radius(self, printed: str, norm: str) -> str:
        """A paper's radius on this data set: ``8/255`` times 51/8 is ``0.2``; ``eps`` and ``uniform(a,b)`` as well."""
        factor = self.l2 if norm == "l2" else self.linf
        if factor == 1 or printed == "eps":
            return printed
        drawn = re.fullmatch(r"uniform\(([^,]+),([^,]+)\)", printed.replace(" ", ""))
        if drawn:
            return f"uniform({','.join(decimal(fraction(end, 'eps') * factor) for end in drawn.groups())})"
        return decimal(fraction(printed, "eps") * factor)


@dataclass(frozen=True)
class Scale:
    """One size of a table's replication.

    Args:
        datasets, architectures, members: what stands for the paper's; what is not named stays as it is. The empty
            name stands for what the paper does not tell.
        settings: fields of :class:`ensdef.protocol.Protocol`: samples, seeds, recipe, ...
        deviations: what differs from the papers in all tables, in sentences.
    """

    name: str
    title: str
    datasets: Mapping[str, StandIn] = field(default_factory=dict)
    architectures: Mapping[str, str] = field(default_factory=dict)
    members: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()

    def dataset(self, printed: str) -> StandIn:
        return self.datasets.get(printed) or StandIn(printed)

    def architecture(self, printed: str) -> str | None:
        """None: the data set's own."""
        return self.architectures.get(printed) or printed or None

    def members_of(self, printed: str) -> int | None:
        """None: the protocol's default."""
        return self.members.get(printed, int(printed) if printed else None)


def scale_names() -> list[str]:
    """From small to large."""
    order = ("smoke", "mini", "paper")
    names = {path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml")}
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def load_scale(name: str, changes: Mapping[str, Any]) -> Scale:
    """A scale, with the changes that one protocol makes to it.

    Raises:
        UsageError: no such scale.
        Refusal: the changes have a wrong type.
    """
    if name not in scale_names():
        raise UsageError(suggest("scale", name, scale_names()))
    return parse_scale(merged(_content(name), changes), name)


def parse_scale(content: Mapping[str, Any], name: str) -> Scale:
    """A scale from its TOML. Keys that are settings of a run are checked where they are used."""
    for key in ("datasets", "architectures", "members"):
        if not isinstance(content.get(key, {}), Mapping):
            raise Refusal(key, f"{key} is {content[key]!r}; expected a table by what the papers print")
    members = {}
    for printed, count in content.get("members", {}).items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise Refusal("members", f"members has {count!r} for {printed!r}; expected a whole number of at least 1")
        members[str(printed)] = count
    return Scale(
        name,
        str(content.get("title", name)),
        {key: _stand_in(key, value) for key, value in content.get("datasets", {}).items()},
        table_of_texts(content.get("architectures", {}), "architectures"),
        members,
        {key: value for key, value in content.items() if key not in OWN_KEYS},
        tuple(map(str, content.get("deviations", ()))),
    )


def _stand_in(printed: str, given: Any) -> StandIn:
    entry = {"name": given} if isinstance(given, str) else given
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise Refusal(printed, f"{printed} is {given!r}; expected a data set, or a table with name, linf and l2")
    only_keys(entry, ("name", "linf", "l2"), printed)
    factors = {}
    for norm in ("linf", "l2"):
        try:
            factors[norm] = fraction(entry.get(norm, 1), norm)
        except UsageError as error:
            raise Refusal(norm, str(error)) from error
        if factors[norm] <= 0:
            raise Refusal(norm, f"{norm} is {entry[norm]}; expected a factor above 0")
    return StandIn(str(entry["name"]), **factors)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables joined key by key, everything else replaced; deviations are added up."""
    joined = dict(base)
    for key, value in changes.items():
        if key == "deviations":
            joined[key] = [*base.get(key, ()), *(value if isinstance(value, list) else [value])]
        elif isinstance(value, Mapping) and isinstance(joined.get(key), Mapping):
            joined[key] = merged(joined[key], value)
        else:
            joined[key] = value
    return joined


def decimal(number: Fraction) -> str:
    """``0.2`` where a short decimal is exact, else ``1/15``."""
    text = f"{float(number):.6f}".rstrip("0").rstrip(".")
    return text if Fraction(text) == number else str(number)


@cache
def _content(name: str) -> dict[str, Any]:
    return tomllib.loads(_folder().joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def _folder() -> Any:
    return files("ensdef.benchmarks").joinpath("scales")

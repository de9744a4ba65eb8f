"""A protocol: which defences meet which attacks on which images. TOML in, training specifications and cells out."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ensdef.errors import UsageError
from ensdef.notation import NORMS, convert, fill, fraction, split_list
from ensdef.protocol_file import ProtocolFile, Refusal, protocol_paths, read_protocol_file
from ensdef.scale import Scale, load_scale

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class AttackColumn:
    """One attack of a protocol; what is None comes from the protocol or the data set."""

    call: str
    eps: tuple[str, ...] | None = None
    norm: str | None = None


@dataclass(frozen=True)
class MethodRow:
    """One defence of a protocol that has an architecture or a number of members of its own; None: the protocol's."""

    call: str
    arch: str | None = None
    members: int | None = None


@dataclass(frozen=True)
class Protocol:
    """Everything a run needs to know, before anything is loaded.

    Args:
        kind: what is made of the records: ``grid``, a row each, or ``leaderboard``, a row a defence, with ranks.
        methods: calls such as ``adp[entropy_weight=1]``, or rows with an architecture of their own.
        attacks: columns; their own eps and norm prevail.
        measures: in the place of attacks: measurements of every method at every radius.
        eps, norm: for columns that do not say; eps None: the data set's default.
        train_eps: radius of training; None: the data set's default; ``"eps"``: one training for each attack radius.
        recipe: overrides of every method's recipe; ``recipes`` the same for one data set, ``method_recipes`` for one
            method (and prevailing).
    """

    name: str
    version: int = 1
    kind: Literal["grid", "leaderboard"] = "grid"
    scale: str | None = None
    title: str = ""
    methods: tuple[str | MethodRow, ...] = ()
    attacks: tuple[AttackColumn, ...] = ()
    measures: tuple[str, ...] = ()
    dataset: str = "digits"
    data_dir: str | None = None
    image_size: int | None = None
    limit: int | None = None
    samples: int | None = None
    arch: str | None = None
    members: int = 3
    epochs: int | None = None
    norm: str = "linf"
    eps: tuple[str, ...] | None = None
    train_eps: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seeds: tuple[int, ...] = (0,)
    attack_seed: int = 0
    combiner: str = "native"
    search: str = "fp32"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    method_recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Name, version and scale, written into the records of a run that changes nothing of the protocol."""
        return f"{self.name}-v{self.version}" + (f"-{self.scale}" if self.scale else "")

    @property
    def table(self) -> str:
        """Name of its table."""
        return f"{self.name}-{self.scale}" if self.scale else self.name

    @property
    def rows(self) -> tuple[MethodRow, ...]:
        """The methods, each as a row."""
        return tuple(one if isinstance(one, MethodRow) else MethodRow(one) for one in self.methods)


def protocol_names() -> list[str]:
    """The protocols that ship with the package."""
    return sorted(protocol_paths())


def load_protocol(name: str, scale: str | None = None) -> Protocol:
    """A shipped protocol by name, or a TOML file by path, that is a grid of defences and attacks.

    Args:
        scale: one of the protocol's scales; None: its first, if it has any.
    Raises:
        UsageError: no such protocol or scale, no TOML, or a key that protocols do not have: with file, line and key.
    """
    return grid_of(read_protocol_file(name), scale)


def grid_of(file: ProtocolFile, scale: str | None = None) -> Protocol:
    """The protocol that a file holds."""
    try:
        return parse_protocol(file.content, file.name, scale)
    except Refusal as refusal:
        raise file.refuse(refusal, scale) from refusal


def parse_protocol(content: Mapping[str, Any], name: str, scale: str | None = None) -> Protocol:
    """A protocol from its parsed TOML."""
    content = dict(content)
    scales = content.pop("scales", {})
    scale = chosen_scale(scales, scale, name)
    if scale is not None:
        content = _at_scale(content, load_scale(scale, scales[scale]))
    elif "scale" in content:
        raise Refusal("scale", f"protocol {name} has no key 'scale'; scales are tables, such as [scales.smoke]")
    known = {item.name for item in dataclasses.fields(Protocol)} - {"name"}
    if unknown := sorted(set(content) - known):
        known = known - {"scale"} | {"scales"}
        raise Refusal(unknown[0], f"protocol {name} has no key {unknown[0]!r}; it has: {', '.join(sorted(known))}")
    _check_types(content, f"protocol {name}")
    columns = []
    for column in content.pop("attacks", ()):
        entry = {"call": column} if isinstance(column, str) else column
        if not isinstance(entry, Mapping) or not {"call"} <= set(entry) <= {"call", "eps", "norm"}:
            raise Refusal(
                "attacks", f"protocol {name}: an attack is a text or a table with call, eps and norm, got {entry}"
            )
        owner = f"protocol {name}: {entry['call']}"
        _check_norm(entry.get("norm", "linf"), owner)
        columns.append(AttackColumn(str(entry["call"]), _radii(entry.get("eps"), owner), entry.get("norm")))
    content["eps"] = _radii(content.get("eps"), f"protocol {name}")
    if columns and content.get("measures"):
        raise Refusal("measures", f"protocol {name} has both attacks and measures; make it two protocols")
    content["methods"] = tuple(_method(entry, f"protocol {name}") for entry in content.get("methods", ()))
    return Protocol(name=name, attacks=tuple(columns), **content)


def _at_scale(content: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """A grid that is written for a paper's data set, network and radii, on what the scale puts in their place.

    What the protocol says under ``[scales.<name>]`` is in the paper's terms too; its own recipe prevails.
    """
    for key, recipe in (("recipe", content.get("recipe", {})), ("recipe", scale.settings.get("recipe", {}))):
        if not isinstance(recipe, Mapping):
            raise Refusal(key, f"recipe is {recipe!r}; expected a table of training settings")
    joined = {**content, **scale.settings}
    joined["recipe"] = layered(scale.settings.get("recipe", {}), content.get("recipe", {}))
    stand_in = scale.dataset(str(joined.get("dataset", "cifar10")))
    norm = str(joined.get("norm", "linf"))

    def radii(value: Any, norm: str = norm) -> list[str]:
        return [stand_in.radius(text, norm) for text in _radii(value, "a radius") or ()]

    joined |= {"dataset": stand_in.name, "scale": scale.name}
    if (architecture := scale.architecture(str(joined.get("arch", "")))) is not None:
        joined["arch"] = architecture
    if "eps" in joined:
        joined["eps"] = radii(joined["eps"])
    if "train_eps" in joined:
        try:
            joined["train_eps"] = stand_in.radius(str(joined["train_eps"]), norm)
        except UsageError as error:
            raise Refusal("train_eps", f"train_eps: {error}") from error
    if isinstance(joined.get("attacks"), list):
        joined["attacks"] = [
            {**column, "eps": radii(column["eps"], str(column.get("norm", norm)))}
            if isinstance(column, Mapping) and "eps" in column
            else column
            for column in joined["attacks"]
        ]
    return joined


def chosen_scale(scales: Any, asked: str | None, name: str) -> str | None:
    """The scale to run a protocol at: the one asked for, else its first.

    Raises:
        UsageError: it has no such scale.
        Refusal: ``scales`` is no table of tables.
    """
    if not isinstance(scales, Mapping) or not all(isinstance(one, Mapping) for one in scales.values()):
        raise Refusal("scales", f"protocol {name}: scales is no table of tables, such as [scales.smoke]")
    if asked is not None and asked not in scales:
        has = f"it has: {', '.join(scales)}" if scales else "it has one size only; leave --scale out"
        raise UsageError(f"protocol {name} has no scale {asked!r}; {has}")
    return asked if asked is not None else next(iter(scales), None)


def _method(entry: Any, owner: str) -> str | MethodRow:
    """A call, or a table with a call."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("call"), str):
        raise Refusal(
            "methods",
            f"{owner}: a method is a text, or a table such as {{ call = 'adv', arch = 'resnet20', members = 1 }}, "
            f"got {entry!r}",
        )
    try:
        return fill(MethodRow, entry, f"{owner}: method {entry['call']}")
    except UsageError as error:
        raise Refusal("methods", str(error)) from error


def layered(*recipes: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe settings of which later ones win, those of the inner attack one by one."""
    joined: dict[str, Any] = {}
    for recipe in recipes:
        attacks = joined.get("attack"), recipe.get("attack")
        joined |= recipe
        if all(isinstance(attack, Mapping) for attack in attacks):
            joined["attack"] = {**attacks[0], **attacks[1]}  # type: ignore[dict-item]
    return joined


def without(recipes: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Named recipes without the settings that are given elsewhere, those of the inner attack one by one."""
    left = {}
    for name, recipe in recipes.items():
        left[name] = {key: value for key, value in recipe.items() if key not in given}
        attacks = recipe.get("attack"), given.get("attack")
        if all(isinstance(attack, Mapping) for attack in attacks):
            left[name]["attack"] = {k: v for k, v in attacks[0].items() if k not in attacks[1]}  # type: ignore
    return left


def _check_types(content: dict[str, Any], owner: str) -> None:
    """Read every value as its field's type, in place; lists must be lists and tables tables."""
    hints = typing.get_type_hints(Protocol)
    for key, value in content.items():
        what = f"{owner}: {key}"
        if key in ("methods", "attacks", "measures", "seeds") and not isinstance(value, list):
            raise Refusal(key, f"{what} is {value!r}; expected a list")
        if key in ("recipe", "recipes", "method_recipes"):
            tables = value.values() if key != "recipe" and isinstance(value, Mapping) else [value]
            if not all(isinstance(table, Mapping) for table in tables):
                raise Refusal(key, f"{what} is {value!r}; expected a table of training settings")
        elif key not in ("methods", "attacks", "eps"):
            try:
                content[key] = convert(value, hints[key], what)
            except UsageError as error:
                raise Refusal(key, str(error)) from error
    for key, numbers in (("seeds", content.get("seeds", ())), ("attack_seed", (content.get("attack_seed", 0),))):
        if any(number < 0 for number in numbers):
            raise Refusal(key, f"{owner}: {key} has {min(numbers)}; expected whole numbers of at least 0")
    _check_norm(content.get("norm", "linf"), owner)


def _check_norm(norm: Any, owner: str) -> None:
    if norm not in NORMS:
        raise Refusal("norm", f"{owner}: unknown norm {norm!r}; expected one of {', '.join(NORMS)}")


def _radii(value: Any, owner: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = tuple(str(item) for item in (value if isinstance(value, list | tuple) else [value]))
    for text in texts:
        try:
            fraction(text, "eps")
        except UsageError as error:
            raise Refusal("eps", f"{owner}: {error}") from error
    return texts


def with_methods(protocol: Protocol, text: str) -> Protocol:
    """The protocol with the methods of a ``--method`` list."""
    return dataclasses.replace(protocol, methods=tuple(split_list(text)))


def with_attacks(protocol: Protocol, text: str) -> Protocol:
    """The protocol with the attacks of an ``--attack`` list."""
    return dataclasses.replace(protocol, attacks=tuple(AttackColumn(call) for call in split_list(text)))

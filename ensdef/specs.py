"""What is to be trained and attacked, as frozen values with content keys.

A key is the SHA-256 of canonical JSON of everything that may change the result. Device, batch size, number of
workers and library versions are provenance, not key.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ensdef.attack_spec import AttackSpec
from ensdef.codehash import NUMERICS, code_hash
from ensdef.errors import UsageError
from ensdef.keys import content_key, non_default
from ensdef.notation import convert, fill, format_call, parse_call
from ensdef.recipe import InnerAttack, Recipe, check_augmentation, joined, parse_train_eps
from ensdef.registry import ARCHITECTURES, ATTACKS, DATASETS, METHODS

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class DataSpec:
    """A data set as it was found: where to load it again, and what it must then be.

    ``folder`` is not part of any key; the checksums are.
    """

    name: str
    folder: str | None
    image_size: int | None
    limit: int | None
    train_checksum: str
    test_checksum: str
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def dimensions(self) -> int:
        """Values per image."""
        channels, height, width = self.image_shape
        return channels * height * width


@dataclass(frozen=True)
class Setting:
    """Everything about a training that is not the method's own choice; prerequisites inherit it.

    Args:
        architecture: a call such as ``resnet20`` or ``resnet[depth=26]``.
        members: for defences that do not fix their number.
        recipe: overrides of the method's recipe by field name; ``attack`` may be a mapping.
        method_recipes: further overrides for single methods (fine-tuning wants another learning rate), by name.
    """

    data: DataSpec
    architecture: str
    members: int
    norm: str
    train_eps: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "fp32"
    seed: int = 0
    method_recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a defence again and load its weights."""

    method: str
    hyper: Mapping[str, Any]
    architecture: str
    architecture_params: Mapping[str, Any]
    members: int
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def create(
        cls,
        method: str,
        hyper: Mapping[str, Any],
        architecture: str,
        members: int,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> ModelSpec:
        """Fill in defaults and check names and parameters.

        Raises:
            UsageError: unknown method, architecture or parameter, or fewer than one member.
        """
        defense = METHODS.get(method)
        resolved = fill(defense.Hyper, hyper, method)
        name, params = parse_call(architecture)
        network = ARCHITECTURES.get(name)
        fixed = defense.member_count(resolved)
        count = fixed or members
        if count < 1:
            raise UsageError(f"members is {count}; expected at least 1")
        if members == 1 and fixed and fixed > 1:
            raise UsageError(f"members is 1, but {method} always has {fixed}; leave --members out")
        known = {item.name for item in dataclasses.fields(network.Params)}
        params = {**{key: value for key, value in defense.network_params(resolved).items() if key in known}, **params}
        return cls(
            method,
            dataclasses.asdict(resolved),
            name,
            dataclasses.asdict(fill(network.Params, params, name)),
            count,
            num_classes,
            image_shape,
            tuple(mean),
            tuple(std),
        )

    @property
    def architecture_call(self) -> str:
        """The architecture as a user writes it: parameters that differ from the defaults in brackets."""
        return format_call(
            self.architecture, non_default(ARCHITECTURES.get(self.architecture).Params, self.architecture_params)
        )

    @property
    def method_call(self) -> str:
        """The method as a user writes it: hyper-parameters that differ from the defaults in brackets."""
        return format_call(self.method, non_default(METHODS.get(self.method).Hyper, self.hyper))


@dataclass(frozen=True)
class TrainSpec:
    """One training; ``key`` names its checkpoint."""

    model: ModelSpec
    setting: Setting
    recipe: Recipe
    prerequisites: Mapping[str, TrainSpec]

    @classmethod
    def create(cls, method: str, hyper: Mapping[str, Any], setting: Setting) -> TrainSpec:
        """Resolve a method in a setting: defaults, recipe, prerequisites.

        Raises:
            UsageError: anything unknown or impossible.
        """
        data = setting.data
        model = ModelSpec.create(
            method,
            hyper,
            setting.architecture,
            setting.members,
            data.num_classes,
            data.image_shape,
            data.mean,
            data.std,
        )
        defense = METHODS.get(method)
        try:
            parse_train_eps(setting.train_eps, setting.norm, data.dimensions)
        except UsageError as error:
            raise UsageError(f"train-eps is {setting.train_eps!r}: {error}") from None
        recipe = override(override(defense.recipe, setting.recipe), setting.method_recipes.get(method, {}))
        if recipe.augment is None or recipe.augment.startswith("+"):
            own = DATASETS.get(data.name).augment
            recipe = dataclasses.replace(recipe, augment=joined(own, (recipe.augment or "none").lstrip("+")))
        check_augmentation(str(recipe.augment))
        spec = cls(model, setting, recipe, {})
        return dataclasses.replace(spec, prerequisites=dict(defense.prerequisites(spec)))

    def derive(self, method: str, hyper: Mapping[str, Any] | None = None, **changes: Any) -> TrainSpec:
        """Another method in the same setting (fields of :class:`Setting` may be changed): a prerequisite."""
        return TrainSpec.create(method, hyper or {}, dataclasses.replace(self.setting, **changes))

    @property
    def method(self) -> str:
        return self.model.method

    @property
    def hyper(self) -> Any:
        """The hyper-parameters as the method's own dataclass."""
        return METHODS.get(self.method).Hyper(**self.model.hyper)

    @property
    def attacked(self) -> bool:
        """Whether this training crafts adversarial examples: for the loss, or to tell which epoch is best."""
        return self.recipe.keep == "best" or bool(METHODS.get(self.method).trains_on_attacks(self.hyper))

    @cached_property
    def key(self) -> str:
        """64 hex digits; same key, same weights (on one machine and torch build)."""
        recipe = dataclasses.asdict(self.recipe)
        recipe["attack"] = recipe["attack"] if self.attacked else None
        low, high = parse_train_eps(self.setting.train_eps, self.setting.norm)
        return content_key(
            {
                "numerics": NUMERICS,
                "method": self.method,
                "code": code_hash(METHODS.get(self.method)),
                "hyper": self.model.hyper,
                "data": [self.setting.data.name, self.setting.data.train_checksum],
                "architecture": [
                    self.model.architecture,
                    self.model.architecture_params,
                    code_hash(ARCHITECTURES.get(self.model.architecture)),
                ],
                "image": [self.model.image_shape, self.model.num_classes, self.model.mean, self.model.std],
                "members": self.model.members,
                "recipe": recipe,
                "threat": [self.setting.norm, str(low), str(high)] if self.attacked else None,
                "precision": self.setting.precision,
                "seed": self.setting.seed,
                "prerequisites": {role: spec.key for role, spec in self.prerequisites.items()},
            }
        )

    def describe(self) -> dict[str, Any]:
        """As stored beside the weights: everything a reader needs, and the key."""
        described = dataclasses.asdict(dataclasses.replace(self, prerequisites={}))
        described["prerequisites"] = {role: spec.key for role, spec in self.prerequisites.items()}
        return {"key": self.key, **described}


@dataclass(frozen=True)
class Cell:
    """One attack on one trained defence over a fixed set of test images; ``key`` names its record.

    Args:
        samples: number of test images, the first of the fixed permutation.
        subset_checksum: of those images and labels.
    """

    training: TrainSpec
    attack: AttackSpec
    samples: int
    subset_checksum: str

    @cached_property
    def key(self) -> str:
        """64 hex digits."""
        needed = {role: spec.key for role, spec in self.prerequisites.items()}
        return cell_key(self.training.key, self.attack, self.subset_checksum, needed)

    @cached_property
    def prerequisites(self) -> Mapping[str, TrainSpec]:
        """Trainings the attack needs, by role."""
        attack = ATTACKS.get(self.attack.name)
        return dict(attack.prerequisites(self.attack.params_object, self.training))


def cell_key(
    model_key: str, attack: AttackSpec, subset_checksum: str, prerequisites: Mapping[str, str] | None = None
) -> str:
    """Key of a cell from the training key, or from the weights' hash for a module that was not trained here."""
    return content_key(
        {
            "numerics": NUMERICS,
            "model": model_key,
            "attack": attack.identity(),
            "subset": subset_checksum,
            "prerequisites": dict(prerequisites or {}),
        }
    )


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with fields replaced; ``attack`` is overridden field by field."""
    changes = dict(changes)
    inner = changes.pop("attack", {})
    if not isinstance(inner, Mapping):
        raise UsageError(f"training: attack is {inner!r}; expected a table, such as attack = {{ steps = 10 }}")
    plain = {key: value for key, value in dataclasses.asdict(recipe).items() if key != "attack"}
    if unknown := sorted(set(changes) - set(plain)):
        raise UsageError(f"training has no setting {', '.join(unknown)}; it has: {', '.join(plain)}, attack")
    attack = fill(InnerAttack, {**dataclasses.asdict(recipe.attack), **inner}, "inner attack")
    hints = typing.get_type_hints(Recipe)
    values = {key: convert(value, hints[key], f"training: {key}") for key, value in {**plain, **changes}.items()}
    return Recipe(**values, attack=attack)

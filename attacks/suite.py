"""Several attacks in a row, each on what those before it left: the image-wise worst case that Reliable Evaluation of
Adversarial Robustness (Croce, Hein; ICML 2020, arXiv:2003.01690) asks for, over any attacks of the registry.

The default is what a row of the leaderboard has to withstand: PGD with restarts, AutoAttack, and the attacks made for
ensembles.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ensdef.adversarial_sets import AdversarialSets
from ensdef.attack import Attack, CompositeAttack, register_attack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.notation import NORMS, fill, parse_call
from ensdef.progress import Progress
from ensdef.registry import ATTACKS
from ensdef.specs import TrainSpec
from ensdef.target import Traits

#: What an attacker sees, from most to least.
ACCESS = ("gradient", "score", "decision", "transfer")


@dataclass(frozen=True)
class SuiteParams:
    """Settings of ``suite``.

    Args:
        attacks: calls of other attacks, joined by ``+``, in the order in which they run.
    """

    attacks: tuple[str, ...] = ("pgd[steps=50,restarts=5]", "autoattack", "adaptive")

    def __post_init__(self) -> None:
        if not self.attacks:
            raise UsageError("attacks is empty; give at least one, several joined by +")
        seen = []
        for call in self.attacks:
            name, given = parse_call(call)
            attack = ATTACKS.get(name)
            if issubclass(attack, Suite):
                raise UsageError(f"attacks: {call} is a suite itself; name its attacks one by one")
            if attack.budget == "none":
                raise UsageError(
                    f"attacks: {name} has no radius, and what a suite finds lies within one; make it a column of its "
                    "own: tables show the worst case over columns"
                )
            if "success" in given:
                raise UsageError(f"attacks: success is a setting of the whole suite, not of {name}; leave it out there")
            resolved = (name, fill(attack.Params, given, name))
            if resolved in seen:
                raise UsageError(f"attacks: {call} is there twice; leave one out")
            seen.append(resolved)


@register_attack("suite")
class Suite(CompositeAttack):
    """Worst case over several attacks, each run on the images that withstood those before it."""

    Params = SuiteParams
    #: AutoAttack makes its own batches.
    per_image = False

    def __init__(self, params: Any = None) -> None:
        super().__init__(params)
        self.attacks: dict[str, Attack] = {}
        for call, (cls, own) in _resolved(self.params).items():
            self.attacks[call] = cls(own)
            self.attacks[call].warnings = self.warnings
        self.access = next(sight for sight in ACCESS if any(one.access == sight for one in self.attacks.values()))  # type: ignore[misc]
        self.random = any(one.random for one in self.attacks.values())  # type: ignore[misc]

    def __copy__(self) -> Suite:
        """The attacks are copied too: what they prepare on other images must not reach the original."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.attacks = {call: copy.copy(attack) for call, attack in self.attacks.items()}
        return other

    @classmethod
    def made_of(cls, params: Any) -> Sequence[str]:
        return tuple(params.attacks)

    @classmethod
    def norms_for(cls, params: Any) -> tuple[str, ...]:
        return tuple(
            norm for norm in NORMS if all(norm in one.norms_for(own) for one, own in _resolved(params).values())
        )

    @classmethod
    def uses(cls, params: Any) -> Sequence[str]:
        looked_up = {name for attack, own in _resolved(params).values() for name in attack.uses(own)}
        return sorted(looked_up | {parse_call(call)[0] for call in params.attacks})

    @classmethod
    def prerequisites(cls, params: Any, training: TrainSpec) -> Mapping[str, TrainSpec]:
        return {
            f"{call}: {role}": spec
            for call, (attack, own) in _resolved(params).items()
            for role, spec in attack.prerequisites(own, training).items()
        }

    def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:
        for call, attack in self.attacks.items():
            begins = f"{call}: "
            own = {role.removeprefix(begins): one for role, one in prerequisites.items() if role.startswith(begins)}
            if own:
                attack.warm_start(own)

    def prepare(
        self, x: Tensor, y: Tensor, ids: Tensor, spec: AttackSpec, sets: AdversarialSets, progress: Progress
    ) -> None:
        for call, attack in self.attacks.items():
            name, given = parse_call(call)
            with _naming(call):
                own = AttackSpec.create(
                    name,
                    {**given, "success": spec.success},
                    str(spec.norm),
                    str(spec.eps),
                    search=spec.search,
                    combiner=spec.combiner,
                    seed=spec.seed,
                )
                attack.prepare(x, y, ids, own, sets, progress)

    def fits(self, traits: Traits) -> None:
        for call, attack in self.attacks.items():
            with _naming(call):
                attack.fits(traits)

    def parts(self, traits: Traits) -> Sequence[tuple[str, Attack]]:
        found: list[tuple[str, Attack]] = []
        for call, attack in self.attacks.items():
            if isinstance(attack, CompositeAttack):
                found += [(f"{call}: {name}", part) for name, part in attack.parts(traits)]
            else:
                found.append((call, attack))
        return found


def _resolved(params: SuiteParams) -> dict[str, tuple[type[Attack], Any]]:
    """Classes and parameters of the attacks by their calls."""
    found = {}
    for call in params.attacks:
        name, given = parse_call(call)
        attack = ATTACKS.get(name)
        found[call] = (attack, fill(attack.Params, given, name))
    return found


@contextmanager
def _naming(call: str) -> Iterator[None]:
    """A refusal says which attack of the suite it comes from."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"suite: {call}: {error}") from error

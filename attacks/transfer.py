"""Adversarial examples crafted on other ensembles: DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation
of Ensembles (Yang et al., NeurIPS 2020, arXiv:2009.14720), as Synergy-of-Experts (NeurIPS 2022) evaluates with it.

The surrogates are hold-out ensembles, trained once by the protocol's own recipe from seeds set aside for them; the
images crafted on them are stored and offered to every defence alike. An image is robust only if it withstands all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ensdef.adversarial_sets import AdversarialSets, craft
from ensdef.attack import Attack, CompositeAttack, WholeAttack, register_attack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.keys import content_key
from ensdef.notation import at_least, fill, parse_call
from ensdef.progress import Progress
from ensdef.registry import ATTACKS, METHODS
from ensdef.rng import KeyedRandom
from ensdef.specs import TrainSpec
from ensdef.target import Target, Traits
from ensdef.threat import Threat
from ensdef.weights import weights_hash

#: Training seeds from here on belong to hold-out surrogates.
HOLD_OUT = 10_000
#: Random starts of one crafting attack draw from seeds this far apart.
START = 1_000_003


@dataclass(frozen=True)
class TransferParams:
    """Settings of ``transfer``; lists are joined by ``+``.

    Args:
        surrogates: methods that train the surrogates.
        members: sizes of the surrogate ensembles.
        attacks: gradient attacks that craft.
        losses: ``ce``, and ``margin`` (the papers' CW).
        starts: random starts of the attacks that have them; each is a variant of its own.
        steps: of every crafting attack.
        architecture: of the surrogates; None: that of the attacked defence. Where defences differ in theirs, one
            architecture for all means the same images for all.
    """

    surrogates: tuple[str, ...] = ("nat",)
    members: tuple[int, ...] = (3,)
    attacks: tuple[str, ...] = ("mim[random_start=true]",)
    losses: tuple[Literal["ce", "margin"], ...] = ("ce",)
    starts: int = 1
    steps: int = 100
    architecture: str | None = None

    def __post_init__(self) -> None:
        at_least("", starts=(self.starts, 1), steps=(self.steps, 1))
        for name in ("surrogates", "members", "attacks", "losses"):
            if not getattr(self, name):
                raise UsageError(f"{name} is empty; give at least one, several joined by +")
        for size in self.members:
            at_least("", members=(size, 1))
        for call in self.surrogates:
            METHODS.get(parse_call(call)[0])
        for call in self.attacks:
            name, params = parse_call(call)
            if not hasattr(fill(ATTACKS.get(name).Params, params, name), "loss"):
                raise UsageError(f"attacks: {name} is no gradient attack with a loss to choose; use such as mim or sgm")
            if {"loss", "steps", "success"} & set(params):
                raise UsageError(f"attacks: set losses and steps of transfer, not those of {name}")


@dataclass(frozen=True)
class Variant:
    """One way to craft: a surrogate's role, an attack call with its loss, and which of its random starts."""

    role: str
    call: str
    loss: str
    start: int

    @property
    def name(self) -> str:
        return f"{self.role}, {self.call}, {self.loss}" + (f", start {self.start + 1}" if self.start else "")


@register_attack("transfer")
class Transfer(CompositeAttack):
    """Examples crafted on hold-out ensembles; the target answers, and is asked for nothing else."""

    Params = TransferParams
    access = "transfer"

    @classmethod
    def prerequisites(cls, params: Any, training: TrainSpec) -> Mapping[str, TrainSpec]:
        needed = {}
        changes = {"seed": HOLD_OUT, **({"architecture": params.architecture} if params.architecture else {})}
        for call in params.surrogates:
            name, hyper = parse_call(call)
            for size in params.members:
                needed[_role(call, size)] = training.derive(name, hyper, members=size, **changes)
        return needed

    @classmethod
    def uses(cls, params: Any) -> Sequence[str]:
        return sorted({parse_call(call)[0] for call in params.attacks})

    def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:
        self.surrogates = dict(prerequisites)

    def fits(self, traits: Traits) -> None:
        """Nothing is asked of the target but its decision."""

    def variants(self) -> Iterator[Variant]:
        """In the order in which they are offered."""
        params = self.params
        for role in (_role(call, size) for call in params.surrogates for size in params.members):
            for call in params.attacks:
                name, given = parse_call(call)
                settings = AttackSpec.create(name, given, "linf", 0).params_object
                starts = params.starts if getattr(settings, "random_start", False) else 1
                for loss in params.losses:
                    for start in range(starts):
                        yield Variant(role, call, loss, start)

    def prepare(
        self, x: Tensor, y: Tensor, ids: Tensor, spec: AttackSpec, sets: AdversarialSets, progress: Progress
    ) -> None:
        """Craft, or fetch, what every variant offers for these images."""
        missing = [role for role in {variant.role for variant in self.variants()} if role not in self._surrogates]
        if missing:
            raise UsageError(
                f"no surrogate {', '.join(sorted(missing))}; the command line trains surrogates itself, "
                "ensdef.evaluate takes them as prerequisites={role: module}"
            )
        images = content_key([ids.tolist(), hashlib.sha256(x.detach().cpu().numpy().tobytes()).hexdigest(), y.tolist()])
        weights = {role: weights_hash(surrogate) for role, surrogate in self._surrogates.items()}
        self.offered: dict[Variant, Tensor] = {}
        for variant in self.variants():
            surrogate = self._surrogates[variant.role]
            name, given = parse_call(variant.call)
            crafting = AttackSpec.create(
                name,
                {**given, "loss": variant.loss, "steps": self.params.steps, "success": "last"},
                str(spec.norm),
                str(spec.eps),
                seed=spec.seed + START * variant.start,
            )
            made_from = {
                "surrogate": variant.role,
                "trained as": getattr(surrogate, "training_key", None) or weights[variant.role],
                "attack": crafting.identity(),
                "images": images,
            }

            def make(surrogate: EnsembleDefense = surrogate, crafting: AttackSpec = crafting) -> Tensor:
                return craft(surrogate, crafting, x, y, ids, progress=progress)

            self.offered[variant] = sets.get(made_from, weights[variant.role], make).to(x.device)
        self.rows = {index: row for row, index in enumerate(ids.tolist())}

    def parts(self, traits: Traits) -> Sequence[tuple[str, Attack]]:
        return [(variant.name, Offer(self.offered[variant], self.rows)) for variant in self.variants()]

    @property
    def _surrogates(self) -> dict[str, EnsembleDefense]:
        return getattr(self, "surrogates", {})


class Offer(WholeAttack):
    """Images that were crafted before."""

    access = "transfer"
    per_image = True

    def __init__(self, offered: Tensor, rows: Mapping[int, int]) -> None:
        super().__init__()
        self.offered = offered
        self.rows = rows

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        return self.offered[torch.tensor([self.rows[index] for index in rng.ids.tolist()], device=x.device)]


@dataclass(frozen=True)
class Transfer3Params(TransferParams):
    """One hold-out ensemble of three members and three ways to craft on it (CDA2, SoE)."""

    attacks: tuple[str, ...] = ("mim[random_start=true]", "sgm", "m_fgsm")


@dataclass(frozen=True)
class Transfer30Params(Transfer3Params):
    """Ensembles of three, five and eight, two losses, momentum PGD from three starts, SGM and M-DI2-FGSM: thirty."""

    members: tuple[int, ...] = (3, 5, 8)
    losses: tuple[Literal["ce", "margin"], ...] = ("ce", "margin")
    starts: int = 3


@register_attack("transfer3")
class Transfer3(Transfer):
    """Three variants of transfer from a hold-out baseline ensemble of three."""

    Params = Transfer3Params


@register_attack("transfer30")
class Transfer30(Transfer):
    """Thirty variants of transfer from hold-out baseline ensembles of three, five and eight."""

    Params = Transfer30Params


def _role(call: str, size: int) -> str:
    return f"{call} x {size}"

"""Torchattacks: A PyTorch Repository for Adversarial Attacks (Kim, 2020, arXiv:2010.01950): every attack class of
torchattacks by its name, ``torchattacks.PGD[steps=50]``; ``pip install 'ensdef[torchattacks]'``.

Constructor parameters stand in the brackets, in the library's own units (``alpha=2/255``); radius, norm, seed and
number of classes are the harness's. Success is judged by the harness, on what the attack returns.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from ensdef.attacks import _wrapped
from torch import Tensor

from ensdef.attack import Attack, WholeAttack, register_attack
from ensdef.errors import UsageError, suggest
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

#: Constructor parameters that hold the radius.
RADII = ("eps", "max_epsilon")
#: What the harness sets.
OURS = ("model", *RADII, "norm", "seed", "n_classes", "device", "verbose")
#: Classes that use scores and no gradient.
BLIND = ("SPSA", "Square")


@register_attack("torchattacks.*")
def torchattack(name: str) -> type[Attack]:
    """Any attack of torchattacks by its class: torchattacks.PGD, torchattacks.CW[c=1], ..."""
    owner = f"torchattacks.{name}"
    torchattacks = _wrapped.library("torchattacks", owner)
    if name == "AutoAttack":
        raise UsageError(
            f"{owner} is not AutoAttack: its parts have 10 steps where the published attack has 100, and Square has "
            "another schedule; use autoattack"
        )
    known = {key: value for key, value in vars(torchattacks).items() if inspect.isclass(value)}
    if name not in known:
        raise UsageError(suggest("class of torchattacks", name, set(known) - {"AutoAttack"}))
    cls: Any = known[name]
    accepted = inspect.signature(cls).parameters
    radius = next((key for key in RADII if key in accepted), None)

    class TorchAttack(WholeAttack):
        Params = _wrapped.params_from(cls, owner, OURS)
        norms = _norms(cls, owner)
        budget = "min_norm" if radius is None else "eps"
        access = "score" if name in BLIND else "gradient"

        def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
            if threat.eps == 0:
                return x
            ours: dict[str, Any] = {"norm": {"linf": "Linf", "l2": "L2"}[str(threat.norm)], "seed": rng.seed}
            if "n_classes" in accepted:
                ours["n_classes"] = target.traits(x[:1]).num_classes
            if radius is not None:
                ours[radius] = threat.eps
            with _wrapped.guarded(rng.seed, self.warnings):
                model = _wrapped.ModelForLibrary(target, x.device)
                given = {key: value for key, value in ours.items() if key in accepted}
                attack = cls(model, **vars(self.params), **given)
                attack.set_device(x.device)
                x_adv: Tensor = attack(x.contiguous(), y)
            return x_adv.detach().to(torch.float32)

    TorchAttack.__name__ = TorchAttack.__qualname__ = f"TorchAttack{name}"
    TorchAttack.__doc__ = f"{name} of torchattacks."
    return TorchAttack


def _norms(cls: type, owner: str) -> tuple[str, ...]:
    """The norms its documentation names.

    Raises:
        UsageError: it has none that attacks are run in.
    """
    measured = re.search(r"Distance Measure\s*:\s*(.+)", cls.__doc__ or "")
    named = re.findall(r"L(?:inf|\d)", measured[1]) if measured else []
    norms = tuple(norm for norm in ("linf", "l2") if norm.capitalize() in named)
    if not norms:
        found = f"measures perturbations in {', '.join(named)}" if named else "has no norm"
        raise UsageError(f"{owner} {found}; attacks are run in linf or l2")
    return norms

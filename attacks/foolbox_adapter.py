"""Foolbox: A Python toolbox to benchmark the robustness of machine learning models (Rauber, Brendel, Bethge; 2017,
arXiv:1707.04131): every attack class of foolbox 3 by its name, ``foolbox.LinfPGD[steps=50]``;
``pip install 'ensdef[foolbox]'``.

Constructor parameters stand in the brackets; the radius is the harness's. What a shortest-perturbation attack found
beyond the radius is clipped to it and judged again, as foolbox itself does.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from ensdef.attacks import _wrapped
from torch import Tensor

from ensdef.attack import Attack, WholeAttack, register_attack
from ensdef.errors import UsageError, suggest
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

#: Whole modules of foolbox.attacks that use no gradient.
BLIND = (
    "additive_noise",
    "binarization",
    "blended_noise",
    "blur",
    "boundary_attack",
    "contrast",
    "contrast_min",
    "dataset_attack",
    "gen_attack",
    "hop_skip_jump",
    "inversion",
    "pointwise",
    "saltandpepper",
)


@register_attack("foolbox.*")
def foolbox_attack(name: str) -> type[Attack]:
    """Any attack of foolbox by its class: foolbox.LinfPGD, foolbox.LinfDeepFoolAttack[steps=20], ..."""
    owner = f"foolbox.{name}"
    foolbox = _wrapped.library("foolbox", owner)
    base = foolbox.attacks.base
    known = {
        key: value
        for key, value in vars(foolbox.attacks).items()
        if inspect.isclass(value) and issubclass(value, base.AttackWithDistance) and not inspect.isabstract(value)
    }
    if name not in known:
        raise UsageError(suggest("class of foolbox.attacks", name, known))
    cls: Any = known[name]
    if hasattr(cls, "feed"):
        raise UsageError(f"{owner} must be fed with images by hand, which cannot be written; take another class")
    takes = inspect.signature(cls).parameters
    chosen_by = next((key for key in ("distance", "constraint") if key in takes), None)

    class FoolboxAttack(WholeAttack):
        Params = _wrapped.params_from(cls, owner, ("distance", "constraint", "tensorboard", "init_attack"))
        norms = ("linf", "l2") if chosen_by else _norms(cls, owner)
        budget = "min_norm" if issubclass(cls, base.MinimizationAttack) else "eps"
        access = "score" if cls.__module__.rpartition(".")[2] in BLIND else "gradient"

        def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
            if threat.eps == 0:
                return x
            ours: dict[str, Any] = {}
            if chosen_by == "distance":
                ours["distance"] = getattr(foolbox.distances, str(threat.norm))
            elif chosen_by == "constraint":
                ours["constraint"] = threat.norm
            with _wrapped.guarded(rng.seed, self.warnings):
                module = _wrapped.ModelForLibrary(target, x.device)
                model = foolbox.PyTorchModel(module, bounds=(0, 1), device=x.device)
                attack = cls(**vars(self.params), **ours)
                _, clipped, _ = attack(model, x.contiguous(), y, epsilons=threat.eps)
            x_adv: Tensor = clipped.detach().to(torch.float32)
            return x_adv

    FoolboxAttack.__name__ = FoolboxAttack.__qualname__ = f"Foolbox{name}"
    FoolboxAttack.__doc__ = f"{name} of foolbox."
    return FoolboxAttack


def _norms(cls: Any, owner: str) -> tuple[str, ...]:
    """The norm in which the class measures.

    Raises:
        UsageError: it is none that attacks are run in.
    """
    try:  # a property here is the same for every instance, however it is built
        distance = object.__new__(cls).distance
    except (AttributeError, ValueError):
        distance = "no norm of their own"
    order = getattr(distance, "p", None)
    names = {2: "l2", math.inf: "linf"}
    if order not in names:
        raise UsageError(f"{owner} measures perturbations in {distance}; attacks are run in linf or l2")
    return (names[order],)

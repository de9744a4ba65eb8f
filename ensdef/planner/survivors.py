"""How many images an attack will still have to work on: measured on a trained defence, assumed for an untrained one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ensdef.attack import Attack
from ensdef.attack_spec import AttackSpec
from ensdef.health.ascent import NEVER, climb, wrong
from ensdef.health.observer import spread
from ensdef.losses import margin
from ensdef.notation import parse_eps
from ensdef.recipe import parse_train_eps
from ensdef.registry import ATTACKS, DATASETS, METHODS
from ensdef.specs import TrainSpec
from ensdef.target import Target
from ensdef.threat import Threat

#: Images, steps and step (in units of the radius) of the attack that counts survivors of a trained defence.
IMAGES, STEPS, STEP = 64, 15, 0.25
#: Shares assumed of an untrained defence: right on clean images; of these withstanding an attack at the training's
#: radius if trained on attacks in its norm, in another norm, or not on attacks.
CLEAN, TRAINED, OTHER_NORM, NATURAL = 0.95, 0.65, 0.35, 0.005
#: Images shown in a training, repetitions included, after which half as many withstand.
HALF_LEARNED = 2500
#: Withstanding attacks without gradients, of images of a defence that was not trained on attacks.
NATURAL_BLIND = 0.02
#: Steps after which an image falls that does fall: of a gradient attack, and as part of a run without gradients.
FALLS_AFTER, FALLS_PART = 6.5, 0.12


@dataclass(frozen=True)
class Survivors:
    """Shares of the images.

    Args:
        clean: right before the attack.
        robust: right after one attack on the decision.
        hard: right after attacks on every view of it.
        measured: on a trained defence; False: assumed.
    """

    clean: float
    robust: float
    hard: float
    measured: bool = False


def blind(attack: Attack | type[Attack]) -> bool:
    """Whether an attack has to do without gradients."""
    return attack.access in ("score", "decision")


def steps_to_fall(attack: Attack, steps: float) -> float:
    """Steps spent on an image that falls, of a run of ``steps``."""
    return min(steps, max(FALLS_AFTER, FALLS_PART * steps if blind(attack) else 0.0))


def assumed(training: TrainSpec, attack: AttackSpec, images: int) -> Survivors:
    """Of a defence that is not trained yet.

    Args:
        images: of the training split.
    """
    if attack.eps_value is None:
        return Survivors(CLEAN, CLEAN, CLEAN)
    if not METHODS.get(training.method).trains_on_attacks(training.hyper):
        share = CLEAN * (NATURAL_BLIND if blind(ATTACKS.get(attack.name)) else NATURAL)
        return Survivors(CLEAN, share, share)
    setting, usual = training.setting, DATASETS.get(training.setting.data.name).eps
    trained = float(parse_train_eps(setting.train_eps, setting.norm)[1])
    # radii of two norms are compared by how they stand to the data set's own
    units = [float(parse_eps(usual[norm], norm)) for norm in (str(attack.norm), setting.norm)]
    ratio = (attack.eps_value / units[0]) / max(trained / units[1], 1e-9)
    shown = images * training.recipe.epochs
    share = (TRAINED if attack.norm == setting.norm else OTHER_NORM) * shown / (shown + HALF_LEARNED)
    # falls like a Gaussian: 0.76 of the images at three quarters of the radius where 0.6 withstand the whole of it
    share = CLEAN * share ** min(ratio**2, 20)
    return Survivors(CLEAN, share, share)


def measured(judge: Target, x: Tensor, y: Tensor, attack: AttackSpec, every_view: bool, batch_size: int) -> Survivors:
    """Of a trained defence, on a few of the images that will be attacked.

    Args:
        x, y: the images, (N, ...), and labels, (N,).
        every_view: attack every differentiable view, not the decision alone.
    """
    rows = spread(torch.arange(len(x), device=x.device), IMAGES)
    x, y = x[rows], y[rows]
    with torch.no_grad():
        right = ~wrong(judge(x), y)
    judge.forget()
    clean = float(right.float().mean())
    if attack.eps_value is None or not bool(right.any()):
        return Survivors(clean, clean, clean, True)
    threat = Threat(attack.norm, attack.eps_value)
    views = judge.traits(x[:1]).differentiable
    left = right.clone()
    after_one: Tensor | None = None
    for view in sorted(views, key=lambda name: name != "predict"):
        size = STEP * threat.eps
        alive = left.nonzero().squeeze(1)
        if len(alive):
            falls = climb(
                judge, x[alive], y[alive], threat, margin, steps=STEPS, step_size=size, view=view, batch_size=batch_size
            )
            left[alive[falls < NEVER]] = False
        if view == "predict":
            after_one = left.clone()
            if not every_view:
                break
    after_one = right if after_one is None else after_one
    return Survivors(clean, float(after_one.float().mean()), float(left.float().mean()), True)

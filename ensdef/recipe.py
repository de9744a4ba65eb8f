"""How a defence is trained: plain frozen values with text forms, part of the training key. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Literal

from ensdef.errors import UsageError
from ensdef.notation import at_least, fill, parse_call, parse_eps, relative


@dataclass(frozen=True)
class InnerAttack:
    """The adversary that a defence meets in training; its norm and radius come from the training specification.

    Args:
        steps: gradient steps K.
        step_size: in image units; ``"eps/4"`` is 2/255 at 8/255 (recipe A of DVERGE's and CCE's code).
        start: ``"uniform"`` in the ball, or ``"zero"``.
        batch_norm: ``"eval"`` attacks with running statistics (reproducible, foldable, default); ``"train"`` attacks
            with batch statistics and lets every attack step move the running ones, as all released codes do.
        label: ``"true"``, or ``"predicted"`` as the Keras codes of ADP and CCE do by not passing labels.
    """

    steps: int = 10
    step_size: str = "eps/4"
    start: Literal["uniform", "zero"] = "uniform"
    batch_norm: Literal["eval", "train"] = "eval"
    label: Literal["true", "predicted"] = "true"

    def __post_init__(self) -> None:
        at_least("", steps=(self.steps, 0))
        at_least("", step_size=(relative(self.step_size, 1.0, "step_size"), 0))


@dataclass(frozen=True)
class Recipe:
    """Optimiser, schedule and budget; a method's class attribute gives its authors' values.

    Args:
        optimizer: ``"sgd"`` (Nesterov off) or ``"adam"``; one over all members. Both keep state per parameter, so
            losses that separate by member train as with one optimiser a member.
        lr, momentum, weight_decay: as in PyTorch; momentum is for sgd alone.
        epochs: passes over the training set.
        batch_size: images per step, for each stream.
        schedule: ``"step"`` multiplies by ``gamma`` at the milestones; ``"cosine"`` falls to 0; ``"onecycle"`` rises
            linearly for the first 30 % of the steps and falls to 0; ``"constant"``.
        milestones: fractions of the epochs, so that a shortened run keeps its shape.
        augment: names joined by ``+`` (``"crop+flip"``), parameters in brackets (``"fog[density=0.13]"``), ``"none"``,
            or None for the data set's own; with a ``+`` in front (``"+noise"``) they come after the data set's own.
        keep: ``"last"`` epoch's weights, or ``"best"`` by robust accuracy on a tenth of the training images, held out.
        attack: the inner adversary.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    epochs: int = 200
    batch_size: int = 128
    schedule: Literal["step", "cosine", "onecycle", "constant"] = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    augment: str | None = None
    keep: Literal["last", "best"] = "last"
    attack: InnerAttack = field(default_factory=InnerAttack)

    def __post_init__(self) -> None:
        at_least(
            "training",
            epochs=(self.epochs, 1),
            batch_size=(self.batch_size, 1),
            lr=(self.lr, 0),
            weight_decay=(self.weight_decay, 0),
        )

    def lr_at(self, progress: float) -> float:
        """Learning rate at ``progress`` in [0, 1), the fraction of all steps done (``"step"``: of all epochs)."""
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(progress >= milestone for milestone in self.milestones)
        if self.schedule == "cosine":
            from math import cos, pi

            return self.lr * 0.5 * (1 + cos(pi * progress))
        if self.schedule == "onecycle":
            peak = 0.3
            return self.lr * (progress / peak if progress < peak else (1 - progress) / (1 - peak))
        return self.lr


#: SGD recipe of DVERGE's code (methods "recipe S"): 200 epochs, x0.1 at 100 and 150.
SGD_200 = Recipe()
#: Adam recipe of DVERGE's ports of ADP and GAL.
ADAM_200 = Recipe(optimizer="adam", lr=1e-3)


@dataclass(frozen=True)
class NoOptions:
    """An augmentation without parameters."""


@dataclass(frozen=True)
class Fog:
    """Parameters of fog, as augmentation and as attack; the defaults are those that MoRE is evaluated with.

    Args:
        density: t in the paper; larger is thicker, 0 lets half of the light through.
        light: brightness of the fog, in [0, 1].
    """

    density: float = 0.15
    light: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.light <= 1:
            raise UsageError(f"light is {self.light}; expected a brightness in [0, 1]")


@dataclass(frozen=True)
class Snow:
    """Parameters of snow, as augmentation and as attack; the default is the one that MoRE is evaluated with.

    Args:
        brightness: factor on the lightness of dark pixels ("darkness" in the paper).
    """

    brightness: float = 2.5

    def __post_init__(self) -> None:
        at_least("", brightness=(self.brightness, 1))


#: The batch augmentations (``ensdef.augment``) and their parameters, here so that a recipe is checked without torch.
AUGMENTATIONS: Mapping[str, type] = {
    "crop": NoOptions,
    "shift": NoOptions,
    "flip": NoOptions,
    "noise": NoOptions,
    "fog": Fog,
    "snow": Snow,
}


def joined(own: str, more: str) -> str:
    """``"crop+flip"`` and ``"noise"`` -> ``"crop+flip+noise"``; ``"none"`` adds nothing."""
    return "+".join(part for part in (own, more) if part != "none") or "none"


def check_augmentation(text: str) -> list[tuple[str, dict[str, Any]]]:
    """``"flip+snow[brightness=2]"`` -> names and all their parameters, in order; ``"none"`` -> [].

    Raises:
        UsageError: an unknown name or parameter.
    """
    calls = []
    # a plus sign inside brackets belongs to a number
    for part in [] if text == "none" else re.split(r"\+(?![^\[]*\])", text):
        if part.partition("[")[0] not in AUGMENTATIONS:
            raise UsageError(f"unknown augmentation {part!r}; expected none or a sum of {', '.join(AUGMENTATIONS)}")
        name, params = parse_call(part)
        options: Any = fill(AUGMENTATIONS[name], params, name)
        calls.append((name, asdict(options)))
    return calls


_UNIFORM = re.compile(r"uniform\(\s*([^,\s]+)\s*,\s*([^,\s]+)\s*\)\Z")


def parse_train_eps(text: str | float, norm: str, dimensions: int | None = None) -> tuple[Fraction, Fraction]:
    """Training radius as an interval: ``"8/255"`` -> (8/255, 8/255); ``"uniform(0.01,0.05)"`` is drawn per batch."""
    match = _UNIFORM.match(str(text).strip())
    if not match:
        eps = parse_eps(text, norm, dimensions)
        return eps, eps
    low, high = (parse_eps(part, norm, dimensions) for part in match.groups())
    if low > high:
        raise UsageError(f"train-eps is {text!r}; expected the smaller radius first")
    return low, high

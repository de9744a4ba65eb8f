"""Adversarial and distilled images for the diagnostics.

Every image is perturbed through all steps, wrong ones and already fooled ones included. The evaluation harness is
not used for this: it stops at the first point that fools and leaves images alone that are wrong already, which is right
for a verdict, but understates how far a perturbation carries over to another network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ensdef.adversary import Adversary
from ensdef.architecture import Network
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.folding import FoldedCopy
from ensdef.losses import cross_entropy
from ensdef.recipe import InnerAttack
from ensdef.rng import derived_generator
from ensdef.target import View
from ensdef.threat import Threat

#: Where each attack starts, and the factor on its accumulated l1-normalised gradient.
ATTACKS: dict[str, tuple[Literal["uniform", "zero"], float]] = {
    "pgd": ("uniform", 0.0),
    "bim": ("zero", 0.0),
    "mim": ("zero", 1.0),
}


def craft(
    defense: EnsembleDefense,
    x: Tensor,
    y: Tensor,
    *,
    eps: str | float,
    norm: str = "linf",
    attack: str = "pgd",
    view: str = "predict",
    steps: int = 20,
    step_size: str = "eps/4",
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """Raise the cross-entropy of one view of a defence on every image.

    The defaults are those of CCE's Table 6 (Bui et al., AAAI 2021): 20 steps of a quarter of the radius.

    Args:
        x, y: images in [0, 1], (N, ...), and labels, (N,), on the device of the defence, which is left untouched.
        eps, norm: radius in image units (``"8/255"``), and ``"linf"`` or ``"l2"``.
        attack: ``"pgd"`` (uniform start), ``"bim"`` (starts at the image), ``"mim"`` (``bim`` with momentum 1).
        view: the reading of the defence that is attacked: ``"predict"``, ``"member0"``, ...
        steps, step_size: of the attack; the step in image units or in units of the radius.
        seed: of the starts; the same seed and batch size give the same points.
        batch_size: images a pass.
    Returns:
        the last iterates, (N, ...), in ball and box.
    Raises:
        UsageError: unknown attack or view, or an impossible radius or step.
    """
    model = cast(EnsembleDefense, FoldedCopy(defense).module)
    surface = view_of(model, view)
    if attack not in ATTACKS:
        raise UsageError(f"attack is {attack!r}; expected one of {', '.join(ATTACKS)}")
    start, momentum = ATTACKS[attack]
    radius = Threat.parse(norm, eps, math.prod(x.shape[1:])).eps
    adversary = Adversary(model, InnerAttack(steps, step_size, start), norm, (radius, radius))
    points = []
    for number, (images, labels) in enumerate(zip(x.split(batch_size), y.split(batch_size), strict=True)):
        adversary.begin_batch(derived_generator(x.device, seed, number))
        points.append(adversary(loss_of(surface, labels), images, momentum=momentum))
    return torch.cat(points)


def craft_on_each(defense: EnsembleDefense, x: Tensor, y: Tensor, **settings: Any) -> dict[int | str, Tensor]:
    """Images crafted on each member (keys 0 ... K-1) and on the deployed ensemble (key ``"en"``), each (N, ...).

    ``settings`` are those of :func:`craft`; ``view`` is the reading attacked for ``"en"``.
    """
    view = settings.pop("view", "predict")
    crafted: dict[int | str, Tensor] = {
        index: craft(defense, x, y, view=f"member{index}", **settings) for index in range(len(defense.members))
    }
    crafted["en"] = craft(defense, x, y, view=view, **settings)
    return crafted


def distill(
    member: nn.Module, x: Tensor, target: Tensor, layer: int, *, eps: str | float = "0.07", steps: int = 10
) -> Tensor:
    """Small changes after which a member's features of one layer resemble those of other images.

    Descent on the mean squared distance of the features from those of ``target``, from the source image itself, with
    momentum 1 on l1-normalised gradients and steps of eps / steps, in an l-infinity ball.
    Source: DVERGE (Yang et al., NeurIPS 2020, arXiv:2009.14720), non-robust feature distillation, with the defaults
    of its released evaluation of diversity.

    Args:
        member: a network, or a module that contains one; taken in eval mode and left untouched.
        x, target: source and target images, (B, ...).
        layer: 1 ... num_layers, features before the activation; the last layer is the logits.
        eps: radius in image units.
        steps: at least 1.
    Returns:
        distilled images, (B, ...), in ball and box.
    """
    network = FoldedCopy(network_of(member)).module
    assert isinstance(network, Network)
    with torch.no_grad():
        wanted = network.features(target, layer)

    def distance(z: Tensor) -> Tensor:
        return (network.features(z, layer) - wanted).square().flatten(1).mean(dim=1)

    radius = Threat.parse("linf", eps).eps
    # the adversary asks its defence for nothing but train and eval mode
    adversary = Adversary(cast(EnsembleDefense, network), InnerAttack(steps, f"eps/{steps}"), "linf", (radius, radius))
    return adversary(distance, x, momentum=1.0, start="zero", descend=True)


def network_of(member: nn.Module) -> Network:
    """The network with numbered layers in a member, which may be the member itself.

    Raises:
        UsageError: there is none.
    """
    for part in member.modules():
        if isinstance(part, Network):
            return part
    raise UsageError(f"{type(member).__name__} contains no ensdef.architecture.Network, so it has no numbered layers")


def view_of(model: EnsembleDefense, name: str) -> View:
    """A differentiable reading of a model by name, (N, ...) -> (N, C).

    Raises:
        UsageError: it has no such view.
    """
    views = model.views()
    if name not in views:
        raise UsageError(f"the defence has no view {name!r}; it has: {', '.join(views)}")
    return views[name]


def loss_of(view: View, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Cross-entropy of a view against fixed labels, images (N, ...) -> (N,), nats."""
    return lambda x: cross_entropy(view(x), y)

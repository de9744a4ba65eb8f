"""The attack behind a measurement: what the papers say of it, as parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.diagnostics.crafting import craft, view_of
from ensdef.measure import Measure, Subject
from ensdef.notation import at_least, relative


@dataclass(frozen=True)
class Crafting:
    """Images crafted on a view of the defence; every image runs through all steps.

    Args:
        attack: ``pgd`` (uniform start), ``bim`` (starts at the image) or ``mim`` (``bim`` with momentum 1).
        steps, step_size: the step in image units (``2/255``) or in units of the radius.
    """

    attack: Literal["pgd", "bim", "mim"] = "pgd"
    steps: int = 20
    step_size: str = "eps/4"

    def __post_init__(self) -> None:
        at_least("", steps=(self.steps, 1))
        relative(self.step_size, 1.0, "step_size")

    def settings(self, subject: Subject) -> dict[str, Any]:
        """Arguments of :func:`ensdef.diagnostics.craft`."""
        return {
            "eps": subject.eps,
            "norm": subject.norm,
            "attack": self.attack,
            "steps": self.steps,
            "step_size": self.step_size,
            "seed": subject.seed,
        }

    def craft(self, subject: Subject, view: str) -> Tensor:
        """All images of the subject, attacked, (N, ...)."""
        return craft(subject.defense, subject.x, subject.y, view=view, **self.settings(subject))


@dataclass(frozen=True)
class ViewCrafting(Crafting):
    """Crafting on a view that the user may choose.

    Args:
        view: the reading of the defence that is attacked: ``predict``, ``member0``, ...
    """

    view: str = "predict"


class OnView(Measure):
    """A measurement whose parameters choose a view."""

    Params = ViewCrafting

    def fits(self, defense: EnsembleDefense) -> None:
        view_of(defense, self.params.view)

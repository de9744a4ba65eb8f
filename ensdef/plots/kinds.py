"""The kinds of figures there are, what each is drawn from, and what to run to have it. No torch, no matplotlib yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ensdef.errors import UsageError, suggest
from ensdef.plots.choice import Choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Args:
        summary: what it shows, in a line.
        command: what makes the files that it is drawn from.
        function: ``module:name``, a function of a results folder and a :class:`Choice`.
    """

    summary: str
    command: str
    function: str


KINDS: Mapping[str, Kind] = {
    "robustness": Kind(
        "accuracy against the radius, a line for each method",
        "ensdef bench --method soe,adv_en --attack pgd --eps 0.05,0.1,0.2",
        "ensdef.plots.robustness:draw",
    ),
    "roc": Kind(
        "attacked images told from clean ones by entropy: the curve over all thresholds",
        "ensdef measure detection --method 'cce[mode=dm]' --eps 0.1,0.2",
        "ensdef.plots.detection:draw_roc",
    ),
    "entropy": Kind(
        "entropy of the mean prediction on clean and on attacked images",
        "ensdef measure detection --method 'cce[mode=dm]'",
        "ensdef.plots.detection:draw_entropy",
    ),
    "surface": Kind(
        "loss and predicted class of ensemble and members around an adversarial image",
        "ensdef measure loss_surface --method soe",
        "ensdef.plots.surface:draw",
    ),
    "xor": Kind(
        "decision regions of two experts and of their average on XOR",
        "ensdef measure xor",
        "ensdef.plots.xor:draw",
    ),
    "examples": Kind(
        "clean and adversarial images of one record side by side (attacks anew; needs the record's checkpoint)",
        "ensdef bench --method soe --attack pgd",
        "ensdef.plots.examples:draw",
    ),
}


def draw(kind: str, results: Path, choice: Choice | None = None) -> Figure:
    """A figure of the files in a results folder.

    Raises:
        UsageError: no such kind, or nothing there to draw it from.
    """
    if kind not in KINDS:
        raise UsageError(suggest("plot", kind, KINDS) + " (`ensdef plot --list` tells what each shows)")
    module, _, name = KINDS[kind].function.partition(":")
    return cast("Figure", getattr(import_module(module), name)(results, choice or Choice()))

"""Figures from records and measurements, by matplotlib, without a display; ``ensdef plot`` and notebooks call these.

from ensdef.plots import Choice, draw, save

save(draw("robustness", Path("results"), Choice(method=("soe",))), Path("soe.svg"))
"""

from typing import TYPE_CHECKING, Any

from ensdef.plots.choice import Choice
from ensdef.plots.kinds import KINDS, draw

if TYPE_CHECKING:
    from ensdef.plots.style import save

__all__ = ["KINDS", "Choice", "draw", "save"]


def __getattr__(name: str) -> Any:
    if name != "save":
        raise AttributeError(f"module 'ensdef.plots' has no attribute {name!r}")
    from ensdef.plots.style import save  # matplotlib, which a list of the kinds does not need

    return save

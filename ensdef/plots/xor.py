"""Decision regions of two experts and of their average, from ``xor`` measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ensdef.measurement import Measurement
from ensdef.plots.choice import Choice, listed
from ensdef.plots.kinds import KINDS
from ensdef.plots.style import SIDES, caption, new_figure, styled

#: Inches of a panel.
PANEL = 2.9


def draw(results: Path, choice: Choice) -> Figure:
    """One row for each measurement: the experts with their gate, and the average."""
    found = choice.measurements(results, "xor", KINDS["xor"].command)
    found.sort(key=lambda one: (one.params["variance"], one.seed))
    with styled():
        figure = new_figure(2 * PANEL, len(found) * PANEL)
        rows = figure.subplots(len(found), 2, squeeze=False, sharex=True, sharey=True)
        for (experts, average), one in zip(rows, found, strict=True):
            _regions(experts, one, "experts")
            _regions(average, one, "average")
            _gate(experts, one)
            experts.set_title(f"two experts: {_percent(one, 'accuracy')}", loc="left", fontsize=9)
            average.set_title(f"their average: {_percent(one, 'averaged_accuracy')}", loc="left", fontsize=9)
            experts.set_ylabel(f"second input, variance {one.params['variance']:g}")
        for axis in rows[-1]:
            axis.set_xlabel("first input")
        shown = listed(len(one.series["points"]) for one in found)
        caption(
            figure,
            f"Accuracy on n = {listed(one.n for one in found)} fresh points, of which {shown} are shown. Shaded: sign "
            "of the answer; dashed: where the gate changes from one expert to the other.",
        )
    return figure


def _regions(axis: Axes, one: Measurement, which: str) -> None:
    sides, points = np.array(one.series["axis"]), np.array(one.series["points"])
    signs, labels = np.array(one.series[which]), np.array(one.series["labels"])
    light = ListedColormap([SIDES[1][0], "#ffffff", SIDES[0][0]])
    axis.pcolormesh(sides, sides, signs, cmap=light, vmin=-1.5, vmax=1.5, rasterized=True)
    for sign, (_, dark), marker in ((1, SIDES[0], "o"), (-1, SIDES[1], "x")):
        chosen = points[labels == sign]
        axis.scatter(chosen[:, 0], chosen[:, 1], s=7, color=dark, marker=marker, linewidths=0.8)
    axis.set_aspect("equal")
    axis.grid(False)
    axis.set_xlim(sides[0], sides[-1])
    axis.set_ylim(sides[0], sides[-1])


def _gate(axis: Axes, one: Measurement) -> None:
    """The line where the gate changes its mind, if it ever does."""
    chosen, sides = np.array(one.series["chosen"]), one.series["axis"]
    if chosen.min() < chosen.max():
        axis.contour(sides, sides, chosen, levels=[0.5], colors="black", linestyles="--", linewidths=1)


def _percent(one: Measurement, name: str) -> str:
    value = one.values[name]
    return "-" if value is None else f"{100 * value:.1f} % right"

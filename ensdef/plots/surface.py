"""Loss surfaces as CCE draws them, from ``loss_surface`` measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ensdef.errors import UsageError
from ensdef.measurement import Measurement
from ensdef.plots.choice import Choice
from ensdef.plots.detection import names
from ensdef.plots.kinds import KINDS
from ensdef.plots.style import caption, new_figure, styled

#: Inches of a panel, and levels of the contours.
PANEL, LEVELS = 2.3, 14
#: The true class is light, so that every other stands out.
TRUE_CLASS = "#e8e8e8"
#: Paul Tol's muted colours, which colour-blind readers can tell apart: as many as ten classes have wrong ones.
CLASSES = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499"),
)


def draw(results: Path, choice: Choice) -> Figure:
    """Rows: the ensemble and each member. Columns: the pictures, the loss, the predicted class."""
    one = _the_one(choice.measurements(results, "loss_surface", KINDS["surface"].command))
    loss, predicted = np.array(one.series["loss"], dtype=float), np.array(one.series["predicted"])
    if not 0 <= choice.image < len(loss):
        raise UsageError(f"--image is {choice.image}; this measurement has {len(loss)} images, from 0")
    loss, predicted = loss[choice.image], predicted[choice.image]
    label = one.series["labels"][choice.image]
    networks = ["ensemble", *(f"member {number}" for number in range(1, len(loss)))]
    offsets = np.array(one.series["offsets"])
    with styled():
        figure = new_figure(3.4 * PANEL, len(networks) * PANEL)
        grid = figure.add_gridspec(len(networks), 3)
        _pictures(figure, grid, one, choice.image)
        low, high = float(loss.min()), max(float(loss.max()), float(loss.min()) + 1e-6)
        shared = np.asarray(MaxNLocator(LEVELS).tick_values(low, high))
        others = [int(value) for value in np.unique(predicted) if value != label]
        panels: list[Any] = []
        for row, name in enumerate(networks):
            axis = figure.add_subplot(grid[row, 1], projection="3d" if choice.style == "3d" else None)
            panels.append(_loss(axis, offsets, loss[row], shared))
            axis.set_title(f"{name}: loss", loc="left", fontsize=9)
            classes = figure.add_subplot(grid[row, 2])
            _classes(classes, offsets, predicted[row], label, others)
            if row == 0:
                _key(classes, label, others)
            classes.set_title(f"{name}: class", loc="left", fontsize=9)
        bars = [axis for axis in figure.axes if axis.get_title(loc="left").endswith(": loss")]
        figure.colorbar(panels[0], ax=bars, label="cross-entropy in nats", location="bottom", aspect=25)
        caption(figure, _told(one, choice.image, label))
    return figure


def _the_one(found: list[Measurement]) -> Measurement:
    if len(found) > 1:
        listed = "; ".join(f"{name} ({one.path})" for name, one in zip(names(found), found, strict=True))
        raise UsageError(
            f"there are {len(found)} loss surfaces, and a figure shows one: {listed}; choose with --method, --dataset, "
            "--norm, --eps or --seed"
        )
    return found[0]


def _pictures(figure: Figure, grid: Any, one: Measurement, image: int) -> None:
    shown = {"centre": one.series["centre"][image], "clean": one.series["clean"][image]}
    titles = {"centre": "adversarial image" if one.params["around"] == "adversarial" else "image", "clean": "clean"}
    if one.params["around"] == "clean":
        del shown["clean"]
    for row, (name, levels) in enumerate(shown.items()):
        axis = figure.add_subplot(grid[row, 0])
        show_picture(axis, np.array(levels) / 255)
        axis.set_title(titles[name], loc="left", fontsize=9)


def show_picture(axis: Axes, pixels: np.ndarray[Any, Any]) -> None:
    """An image (C, H, W) in [0, 1], grey where it has one channel."""
    colour = pixels.shape[0] == 3
    axis.imshow(
        np.moveaxis(pixels, 0, -1) if colour else pixels[0],
        cmap=None if colour else "gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _loss(axis: Any, offsets: np.ndarray[Any, Any], loss: np.ndarray[Any, Any], levels: np.ndarray[Any, Any]) -> Any:
    """Columns of ``loss`` run along v, rows along u."""
    if hasattr(axis, "plot_surface"):
        across, up = np.meshgrid(offsets, offsets)
        drawn = axis.plot_surface(across, up, loss, cmap="viridis", vmin=levels[0], vmax=levels[-1], linewidth=0)
        axis.set_zlim(levels[0], levels[-1])
        axis.set_xlabel("v in radii", labelpad=-4)
        axis.set_ylabel("u in radii", labelpad=-4)
        axis.tick_params(pad=-2, labelsize=7)
        return drawn
    drawn = axis.contourf(offsets, offsets, loss, levels=levels)
    axis.contour(offsets, offsets, loss, levels=levels, colors="white", linewidths=0.3)
    _plane(axis)
    return drawn


def _classes(
    axis: Axes, offsets: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any], label: int, others: list[int]
) -> None:
    codes = np.zeros_like(predicted)
    for code, other in enumerate(others, start=1):
        codes[predicted == other] = code
    colours = [TRUE_CLASS, *(colour_of(index) for index in range(len(others)))]
    axis.pcolormesh(offsets, offsets, codes, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5)
    _plane(axis)
    axis.set_xlim(offsets[0], offsets[-1])
    axis.set_ylim(offsets[0], offsets[-1])


def _key(axis: Axes, label: int, others: list[int]) -> None:
    """Which colour is which class, the same for all networks."""
    handles = [Patch(color=TRUE_CLASS, label=f"{label} (true)")]
    handles += [Patch(color=colour_of(index), label=str(other)) for index, other in enumerate(others)]
    axis.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def colour_of(index: int) -> str:
    """Of the wrong class with this number."""
    return CLASSES[index % len(CLASSES)]


def _plane(axis: Axes) -> None:
    axis.plot([0], [0], marker="P", markerfacecolor="white", markeredgecolor="black", markersize=6)
    axis.set_aspect("equal")
    axis.grid(False)
    axis.set_xlabel("v in radii")
    axis.set_ylabel("u in radii")


def _told(one: Measurement, image: int, label: int) -> str:
    centre = f"{one.params['attack']} image" if one.params["around"] == "adversarial" else "clean image"
    return (
        f"{one.label} on {one.dataset}, seed {one.train_seed}, test image {one.series['ids'][image]} of class {label}. "
        f"Centre (+): {centre}, {one.norm} {one.eps}. u: steepest ascent of the ensemble's loss, v: random "
        f"perpendicular; n = {len(one.series['offsets'])} x {len(one.series['offsets'])} images, clipped to [0, 1]."
    )

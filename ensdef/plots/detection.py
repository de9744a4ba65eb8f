"""Curves and histograms of entropy as a detector, from ``detection`` measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ensdef.measurement import Measurement
from ensdef.plots.choice import Choice, listed, telling
from ensdef.plots.kinds import KINDS
from ensdef.plots.style import COLOURS, HEIGHT, WIDTH, caption, line_style, new_figure, styled

#: Panels a row.
COLUMNS = 3


def draw_roc(results: Path, choice: Choice) -> Figure:
    """One curve for each measurement, with its area in the legend."""
    found = _ordered(choice.measurements(results, "detection", KINDS["roc"].command))
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        axis = figure.subplots()
        for index, (one, name) in enumerate(zip(found, names(found), strict=True)):
            style = {**line_style(index), "marker": ""}
            error = f" ± {one.stderr['auc']:.3f}" if "auc" in one.stderr else ""
            axis.plot(
                one.series["false_positive_rate"],
                one.series["true_positive_rate"],
                label=f"{name}: {one.values['auc']:.3f}{error}",
                **style,  # type: ignore[arg-type]
            )
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":", label="chance: 0.500")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.01)
        axis.set_aspect("equal")
        axis.set_xlabel("false alarms on clean images (fraction)")
        axis.set_ylabel("attacked images found (fraction)")
        axis.legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, title="area under the curve", alignment="left"
        )
        caption(figure, _told(found))
    return figure


def draw_entropy(results: Path, choice: Choice) -> Figure:
    """One panel for each measurement: how entropy is spread over clean and over attacked images."""
    found = _ordered(choice.measurements(results, "detection", KINDS["entropy"].command))
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    with styled():
        figure = new_figure(WIDTH * 0.75 * columns + 0.4, HEIGHT * 0.75 * rows + 0.4)
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axis, one, name in zip(axes, found, names(found), strict=False):
            edges = one.series["edges"]
            for side, colour, hatch in (("clean", COLOURS[0], ""), ("attacked", COLOURS[1], "///")):
                percent = [100 * share for share in one.series[side]]
                axis.stairs(percent, edges, fill=True, alpha=0.35, color=colour, hatch=hatch, label=side)
                axis.stairs(percent, edges, color=colour, linewidth=1.2)
            axis.set_xlim(edges[0], edges[-1])
            axis.set_xlabel("entropy of the mean prediction in nats")
            if len(found) > 1:
                axis.set_title(name, loc="left", fontsize=9)
        for axis in axes[len(found) :]:
            axis.set_visible(False)
        axes[0].set_ylabel("images in percent")
        axes[0].legend(fontsize=8)
        caption(figure, _told(found))
    return figure


def _ordered(found: Sequence[Measurement]) -> list[Measurement]:
    """By method, then by attack, then by radius."""
    return sorted(
        found, key=lambda one: (str(one.label), str(one.params["attack"]), one.norm or "", one.eps_value or 0)
    )


def names(found: Sequence[Measurement]) -> list[str]:
    """What tells measurements apart, shortest form: the method, and whatever else differs between them."""
    traits = [
        {
            "method": str(one.label),
            "attack": str(one.params["attack"]),
            "eps": f"{one.norm} {one.eps}",
            "dataset": str(one.dataset),
            "architecture": f"{one.members} x {one.architecture}",
            "combiner": "" if one.combiner == "native" else f"on {one.combiner}",
            "steps": f"{one.params['steps']} steps of {one.params['step_size']}",
            "view": f"view {one.params['view']}",
            "seed": f"seed {one.train_seed}",
            "n": f"{one.n} images",
            "epochs": f"{one.training.get('recipe', {}).get('epochs')} epochs",
            "training": f"training {str(one.training.get('key'))[:8]}",
        }
        for one in found
    ]
    told = telling(traits)
    return [", ".join(trait[name] for name in told if trait[name]) for trait in traits]


def _told(found: Sequence[Measurement]) -> str:
    attacks = listed(
        f"{one.params['attack']} with {one.params['steps']} steps of {one.params['step_size']}" for one in found
    )
    radii = listed(
        f"{one.norm} {one.eps}" for one in sorted(found, key=lambda one: (one.norm or "", one.eps_value or 0))
    )
    return (
        f"{listed(one.dataset for one in found)}; n = {listed(one.n for one in found)} clean test images and as many "
        f"attacked ones ({attacks}; radius {radii})."
    )

"""How all figures look, and how they are written: the same file for the same numbers."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ensdef.errors import UsageError
from ensdef.records import write_bytes

#: Okabe and Ito's palette, which colour-blind readers can tell apart, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
#: Light and dark of two sides.
SIDES = (("#9ecae9", "#0072B2"), ("#fdc9a0", "#D55E00"))
#: Inches.
WIDTH, HEIGHT = 5.2, 3.6
_FORMATS = {
    ".png": {"Software": None},  # else the version of matplotlib would be in the file
    ".svg": {"Date": None, "Creator": None},
}
#: Their type is Any: the stubs want literal keys.
_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "image.cmap": "viridis",
    "svg.fonttype": "none",
    "svg.hashsalt": "ensdef",
    "savefig.dpi": 200,
    # labels are texts from files: a dollar sign is one
    "text.parse_math": False,
}


@contextmanager
def styled() -> Iterator[None]:
    """Settings that hold while a figure is made, whatever the user's own are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure of so many inches, outside of pyplot: no window, nothing kept."""
    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, str]:
    """Colour, marker and dashes of the line with this number; no two of the first 56 are alike."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def caption(figure: Figure, text: str) -> None:
    """What a reader must know beside the axes, in small print below."""
    width = int(figure.get_figwidth() * 17)
    figure.supxlabel("\n".join(textwrap.wrap(text, width)), fontsize=7.5, color="#444444", x=0.01, ha="left")


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the same figure gives the same file.

    Raises:
        UsageError: the name ends neither in .png nor in .svg.
    """
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise UsageError(f"cannot write a figure to {path}; expected a name that ends in .png or .svg")
    content = io.BytesIO()
    with styled():
        figure.savefig(content, format=suffix[1:], metadata=_FORMATS[suffix], bbox_inches="tight")
    try:
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error

"""Damaged files are kept for whoever wants to look, out of the way of the work that is done again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path


def set_aside(path: Path, reason: str, tell: Callable[[str], None]) -> None:
    """Rename ``path`` to ``<path>.damaged-<n>``, the first such name that is free, and tell so in one line."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not aside.exists():
            break
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        tell(f"{path} is set aside as {aside.name}, and what it held is done again: {reason}")

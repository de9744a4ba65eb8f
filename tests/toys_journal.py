"""Journals that write at every moment, and ways to be stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensdef.journal import Journal
from ensdef.progress import Advance, Progress


class Killed(Exception):
    """Stands for the end of a process."""


class Told(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        #: units that each task was begun with, and by how much it moved on
        self.totals: list[float] = []
        self.steps: list[float] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        self.totals.append(total)

        def advance(amount: float = 1, note: str = "") -> None:
            self.steps.append(amount)

        yield advance


class KilledAfter(Progress):
    """Ends the work after so many steps of its bar."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        def advance(amount: float = 1, note: str = "") -> None:
            if amount:
                self.left -= 1
                if self.left < 0:
                    raise Killed

        yield advance


def always(folder: Path, tell: Any = lambda text: None, **work: Any) -> Journal:
    """A journal that writes whenever it is asked to."""
    return Journal(folder / "work.journal", {"key": "k", **work}, tell, wait=0.0, share=math.inf)

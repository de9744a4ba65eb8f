"""The plan of a run: every training and every cell that is missing, with its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ensdef.planner.work import Work
from ensdef.specs import Cell, TrainSpec

State = Literal["done", "attack", "train and attack"]


@dataclass(frozen=True)
class PlannedTraining:
    """A training that is missing; ``work`` None: it cannot be told, ``reason`` says why."""

    spec: TrainSpec
    work: Work | None
    reason: str = ""


@dataclass(frozen=True)
class PlannedCell:
    """A cell and what is left to do for it beside trainings; a finished one has ``work`` of nothing."""

    cell: Cell
    state: State
    work: Work | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """All cells in their order, the missing trainings in theirs.

    Args:
        startup: seconds that a command takes before its work begins.
        assumptions: what the numbers rest on, in sentences.
    """

    trainings: tuple[PlannedTraining, ...]
    cells: tuple[PlannedCell, ...]
    startup: float
    assumptions: tuple[str, ...]

    @property
    def to_do(self) -> tuple[PlannedCell, ...]:
        """Cells that are not done."""
        return tuple(planned for planned in self.cells if planned.state != "done")

    @property
    def total(self) -> Work:
        """Of everything whose cost is known."""
        works = [work for work in self._works if work is not None]
        return sum(works, Work(seconds=self.startup if self.to_do else 0.0))

    @property
    def unknown(self) -> int:
        """Trainings and cells whose cost could not be told."""
        return sum(work is None for work in self._works)

    @property
    def _works(self) -> list[Work | None]:
        return [*(planned.work for planned in self.trainings), *(planned.work for planned in self.to_do)]

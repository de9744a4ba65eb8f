"""What something costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Cost of a training or a cell.

    Args:
        seconds: on this machine.
        forwards, backwards: passes of one member over one image.
        memory: peak in bytes, of the whole process (CPU) or of what torch allocates (CUDA).
    """

    seconds: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0
    memory: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.seconds + other.seconds,
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            max(self.memory, other.memory),
        )

    @property
    def passes(self) -> float:
        """Forward and backward."""
        return self.forwards + self.backwards

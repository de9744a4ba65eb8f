"""SIGINT and SIGTERM end a command in order: locks are given back, and one line tells what is kept."""

from __future__ import annotations

import signal
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end; notes (``add_note``) tell what is kept."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_status(self) -> int:
        """As a shell tells it: 130 or 143."""
        return 128 + self.number

    @property
    def told(self) -> str:
        """One line for whoever sent the signal."""
        notes = getattr(self, "__notes__", [])
        return "; ".join([f"stopped by {signal.Signals(self.number).name}", *notes])


def end_in_order() -> None:
    """Raise :class:`Interrupted` in the main thread at the first of these signals; the second one ends at once."""
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, _raise)


def end_at_once() -> None:
    """For processes that others start and end: no traceback, nothing of their own to keep."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    end_at_once()
    raise Interrupted(number)

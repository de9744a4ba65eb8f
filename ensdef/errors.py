"""What goes wrong, by whom it can be mended. The command line maps these to exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The caller asked for something that cannot be: says what was expected, what came and what to do (exit 2)."""


class PluginError(UsageError):
    """A defence, attack, architecture or data set file breaks its contract (exit 2)."""


class DataError(UsageError):
    """A data folder or file cannot be used as asked (exit 2)."""


class CheckpointError(UsageError):
    """A checkpoint cannot be read, or does not belong to what was asked for (exit 2)."""


class ForeignCheckpoint(CheckpointError):
    """Weights that are whole, but of another network, or a pickle: who put them there has to decide (exit 2)."""


class StorageError(OSError):
    """The results folder could not be written: it is full, read-only or out of reach (exit 1)."""


class TrainingDiverged(RuntimeError):
    """A loss term became NaN or infinite (the cell fails, exit 1).

    ``last_good`` holds the weights of the last finished epoch, as a safetensors file's bytes.
    """

    def __init__(self, message: str, last_good: bytes = b"") -> None:
        super().__init__(message)
        self.last_good = last_good


class AttackError(RuntimeError):
    """An attack returned points outside its contract: wrong shape, NaN, outside the ball or the box (exit 1)."""


def suggest(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name: nearest names first, then where to look."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
    return f"unknown {kind} {name!r};{hint} known: {', '.join(names) or 'none'}"

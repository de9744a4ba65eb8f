"""Time and memory of a probe: what the clock says when the device is idle, and the peak since the last look."""

from __future__ import annotations

import time

import torch

from ensdef.peak import begin_peak, peak


class Enough(Exception):
    """A probe has seen what it needs."""


class Stopwatch:
    """Reads seconds and bytes on one device.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def now(self) -> float:
        """Seconds since some moment; on CUDA after all that was launched has run."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin_peak(self) -> None:
        """Forget the peak so far, where the system lets us."""
        begin_peak(self.device)

    def peak(self) -> int:
        """Bytes: of this process (CPU), or allocated by torch on the device (CUDA); 0: the system does not tell."""
        return peak(self.device)

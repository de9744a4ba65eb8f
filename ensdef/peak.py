"""Peak memory of a stretch of work, on the CPU or a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def begin_peak(device: str) -> None:
    """Forget the peak so far, where the system lets us.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return  # then the peak is that of the process since its start


def peak(device: str) -> int:
    """Bytes: of this process (CPU), or allocated by torch on the device (CUDA); 0: the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _highest()


def _highest() -> int:
    """Of this process since its start, where there is no ``/proc``."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

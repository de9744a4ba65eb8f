"""Where a number came from: versions, device, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from ensdef._version import __version__


def provenance(device: str, **more: Any) -> dict[str, Any]:
    """A fresh description of this machine and installation; ``more`` is added as it is."""
    import torch

    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):  # of a cell that failed elsewhere, on a GPU that is not here
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "unknown"
    return {
        "versions": {"ensdef": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


@lru_cache
def git_commit() -> str | None:
    """The commit of the checkout this package runs from (``-dirty`` if files differ); None when installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
        return _git(root, "rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    # a status that refreshed the index would leave a lock in the checkout if it were killed
    command = ["git", "--no-optional-locks", "-C", os.fspath(root), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

"""Who works on what: several drivers share a results folder without doing anything twice.

A claim is a lock on ``.claims/<key>.lock``. The operating system drops it when its holder dies, however that happens.
It holds between processes of one machine, and between machines where the file system has working locks (NFS with its
lock daemon, Lustre with ``flock``). Without them two drivers may do the same work; files are written whole, so even
then nothing is damaged.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout


class Claims:
    """The claims that this process holds on the work of one results folder."""

    def __init__(self, results: Path) -> None:
        self.folder = results / ".claims"
        self._held: dict[str, FileLock] = {}

    def take(self, key: str) -> bool:
        """Claim a piece of work, unless another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{key[:16]}.lock", thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        self._held[key] = lock
        return True

    def release(self, key: str) -> None:
        """Let others have it; call it when the result is in the folder."""
        self._held.pop(key).release()

    def release_all(self) -> None:
        """Give up everything."""
        for key in list(self._held):
            self.release(key)

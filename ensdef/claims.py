"""Who works on what: several drivers share a results folder without doing anything twice.

A claim is a lock on ``.claims/<key>.lock``. The operating system drops it when its holder dies, however that happens.
It holds between processes of one machine, and between machines where the file system has working locks (NFS with its
lock daemon, Lustre with ``flock``). Without them two drivers may do the same work; files are written whole, so even
then nothing is damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_FOLDER = ".claims"


class Claims:
    """The claims that this process holds on the work of one results folder.

    Args:
        tell: is told once, in a line, that locks do not work there.
    """

    def __init__(self, results: Path, tell: Callable[[str], None] = lambda text: None) -> None:
        self.folder = results / _FOLDER
        self.tell = tell
        self.work = True
        self._held: dict[str, FileLock] = {}

    def take(self, key: str) -> bool:
        """Claim a piece of work, unless another process has it; where locks do not work, everybody has everything."""
        if not self.work:
            return True
        try:
            lock = _lock(self.folder, key[:16])
            lock.acquire(blocking=False)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            self.work = False
            self.tell(
                f"locks do not work in {self.folder} ({error}): other commands on this results folder may do the same "
                "work; run one at a time"
            )
            return True
        self._held[key] = lock
        return True

    def release(self, key: str) -> None:
        """Let others have it; call it when the result is in the folder."""
        if (lock := self._held.pop(key, None)) is not None:
            lock.release()

    def release_all(self) -> None:
        """Give up everything."""
        for key in list(self._held):
            self.release(key)


@contextmanager
def one_at_a_time(results: Path, what: str) -> Iterator[None]:
    """Wait until no other process is in here for the same results folder; where locks do not work, do not wait."""
    lock = None
    try:
        lock = _lock(results / _FOLDER, what)
        lock.acquire()
    except (OSError, NotImplementedError):
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock(folder: Path, name: str) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    # a lock that is a mere file would outlive a killed holder
    return FileLock(folder / f"{name}.lock", thread_local=False, fallback_to_soft=False)

"""Who works on what: several commands share a results folder without doing anything twice.

A claim is a lock and a lease. The lock on ``.claims/<key>.lock`` is the operating system's, which drops it when its
holder dies, however that happens. The lease (see ``leases``) is a file that its holder counts up in every ten seconds;
one that stood still for sixty seconds of the watcher's own monotonic clock is free. So neither the clocks of other
machines nor clocks that are set decide anything.

What holds where:

- on one machine, and on a shared folder whose locks work between machines: every piece of work is done once, and what a
  killed process had is free at once (to other machines: after sixty seconds);
- on a shared folder where locks work within each machine alone, or nowhere: every piece of work is done once as long as
  no process stands still for sixty seconds; what a killed process had is free after sixty seconds;
- everywhere: a process that stood still and was overtaken finds out before it files its result (:meth:`Claims.holds`),
  and files are written whole, under keys of their content, so that even work done twice damages nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ensdef.leases import KEEPER, RENEW, STALE, Lease, newest, numbers, read_lease, this_host

#: Seconds between looks of a process that waits for its turn, and between lines that say so.
POLL, TELL = 0.1, 600.0
_FOLDER = ".claims"


class Claims:
    """The claims that this process holds on the work of one results folder.

    Args:
        tell: is told once, in a line, that locks do not work there.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        results: Path,
        tell: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = results / _FOLDER
        self.tell = tell
        self.clock = clock
        self.locks_work = True
        self._held: dict[str, tuple[FileLock | None, Lease]] = {}
        #: of others' leases by name: what they said when last looked at, for how long they had said it, and when
        self._watched: dict[str, tuple[str, float, float]] = {}

    def take(self, key: str) -> bool:
        """Claim a piece of work, unless another process has it.

        Raises:
            OSError: the folder cannot be written.
        """
        name = key[:16]
        try:
            lock = self._lock(name)
        except Timeout:
            return False
        lease = None
        try:
            lease = self._next_lease(name, lock is not None)
        finally:
            if lease is None and lock is not None:
                lock.release()
        if lease is None:
            return False
        self._watched.pop(name, None)
        self._held[key] = (lock, lease)
        KEEPER.add(lease)
        return True

    def holds(self, key: str) -> bool:
        """Whether what was claimed is still this process's: nobody took it over while this one stood still."""
        return key in self._held and self._held[key][1].is_newest()

    def release(self, key: str) -> None:
        """Let others have it; call it when the result is in the folder."""
        if key in self._held:
            lock, lease = self._held.pop(key)
            KEEPER.remove(lease)
            lease.end()
            if lock is not None:
                lock.release()

    def release_all(self) -> None:
        """Give up everything."""
        for key in list(self._held):
            self.release(key)

    def _lock(self, name: str) -> FileLock | None:
        """The operating system's lock; None where there are none.

        Raises:
            Timeout: another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.locks_work:
            return None
        # a lock that is a mere file would outlive a killed holder
        lock = FileLock(self.folder / f"{name}.lock", thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise
        except (OSError, NotImplementedError) as error:
            self.locks_work = False
            self.tell(
                f"locks do not work in {self.folder} ({error}): leases alone keep other commands from the same work, "
                f"and what a killed command was at is free after {STALE:g} s"
            )
            return None
        return lock

    def _next_lease(self, name: str, locked: bool) -> Lease | None:
        """A lease newer than all others; None: another process holds one, or was faster."""
        folder = self.folder / f"{name}.leases"
        folder.mkdir(exist_ok=True)
        last = newest(folder)
        if last and not self._is_free(name, folder / str(last), locked):
            return None
        try:
            lease = Lease(folder / str(last + 1), locked)
        except FileExistsError:
            return None
        if not lease.is_newest():  # this number had been given to somebody, whose file was tidied away
            lease.end()
            lease.path.unlink(missing_ok=True)
            return None
        for number in numbers(folder):
            if number <= last:
                (folder / str(number)).unlink(missing_ok=True)
        return lease

    def _is_free(self, name: str, path: Path, locked: bool) -> bool:
        """Whether the holder of a lease released it, is dead, or did not renew it for long."""
        found = read_lease(path)
        if found is None:
            return False
        text, told = found
        if told.get("released") or (locked and told.get("locked") and told.get("host") == this_host()):
            return True
        now, seen = self.clock(), f"{path.name} {text}"
        before, waited, at = self._watched.get(name, ("", 0.0, now))
        # a look counts for no more than a renewal takes: after all machines slept, holders renew before they are judged
        waited = waited + min(now - at, RENEW) if before == seen else 0.0
        self._watched[name] = (seen, waited, now)
        return waited >= STALE


@contextmanager
def one_at_a_time(results: Path, what: str, tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Wait until no other process is in here for the same results folder; ``tell`` hears of a wait now and then."""
    claims, told = Claims(results, tell), -float("inf")
    while not claims.take(what):
        if time.monotonic() - told > TELL:
            told = time.monotonic()
            tell(f"waiting: another command is at {what} in {results}")
        time.sleep(POLL)
    try:
        yield
    finally:
        claims.release(what)

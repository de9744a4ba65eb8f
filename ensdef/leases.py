"""Files that tell who works on what, and that it still does: counted up in for as long as their process runs.

A piece of work has a folder of leases with numbers for names; the newest counts. Only one process can make a number,
and the newest is never deleted, so that none is given twice.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Seconds between renewals of a lease, and until one that was not renewed is free.
RENEW, STALE = 10.0, 60.0


class Lease:
    """A file that one process made, and writes to; whoever overtakes it makes another.

    Args:
        path: ``<folder of the work>/<number>``.
        locked: whether the holder has the operating system's lock as well.
    Raises:
        FileExistsError: somebody made it first.
    """

    def __init__(self, path: Path, locked: bool) -> None:
        self.path = path
        self._told = {"host": this_host(), "process": os.getpid(), "token": uuid.uuid4().hex, "locked": locked}
        self._renewals = 0
        self._guard = threading.Lock()
        self._file: int | None = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._write()

    def renew(self) -> None:
        """Show that the holder lives."""
        with self._guard:
            self._renewals += 1
            with suppress(OSError):  # the server may be away for a moment; the next renewal tells
                self._write()

    def end(self) -> None:
        """Let others have it."""
        with self._guard:
            self._told["released"] = True
            with suppress(OSError):
                self._write()
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def is_newest(self) -> bool:
        """Whether nobody overtook it."""
        return newest(self.path.parent) == int(self.path.name)

    def _write(self) -> None:
        # in place, through the file it opened, and never shorter than before: a lease that was overtaken and tidied
        # away is written to in vain, and no other ever is
        if self._file is not None:
            os.pwrite(self._file, json.dumps({**self._told, "renewals": self._renewals}).encode(), 0)
            os.fsync(self._file)


def numbers(folder: Path) -> list[int]:
    """Of the leases in the folder of a piece of work."""
    try:
        return [int(name) for name in os.listdir(folder) if name.isdigit()]
    except FileNotFoundError:
        return []


def newest(folder: Path) -> int:
    """The number of the lease that counts; 0: there is none."""
    return max(numbers(folder), default=0)


def read_lease(path: Path) -> tuple[str, dict[str, Any]] | None:
    """What a lease tells, as text and taken apart (empty for one that was just made); None: it was tidied away."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    try:
        return text, dict(json.loads(text))
    except (ValueError, TypeError):
        return text, {}


def this_host() -> str:
    """This machine since it was started: within it, a lock that is free tells that its holder is dead."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = str(uuid.getnode())
    return f"{socket.gethostname()} {boot}"


class Keeper:
    """Renews leases, in one thread that ends when there are none left."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self._guard:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self._thread.start()

    def remove(self, lease: Lease) -> None:
        with self._guard:
            self._leases.discard(lease)

    def renew_all(self) -> None:
        for lease in list(self._leases):
            lease.renew()

    def _run(self) -> None:
        while True:
            time.sleep(RENEW)
            with self._guard:
                if not self._leases:
                    self._thread = None
                    return
            self.renew_all()


#: The one of this process.
KEEPER = Keeper()

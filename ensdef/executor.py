"""Where jobs are done. The driver (``runner``) decides what is done and writes the records; an executor does it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from ensdef.jobs import Job, Result, attempt
from ensdef.progress import Progress
from ensdef.worker import READY, RESULT, ShownProgress, work

#: Seconds without a word from a job after which it is given up.
STALL = 3600.0
#: Seconds that a new process may take to load everything that its first job needs, at least.
START = 300.0


class Executor(Protocol):
    """Performs jobs, here or elsewhere; a job submitted comes back from :meth:`next` exactly once."""

    #: Whether the jobs' own progress cannot be seen.
    silent: bool

    @property
    def has_room(self) -> bool:
        """Whether another job would begin soon."""

    def submit(self, job: Job) -> None:
        """Take a job whose needs are in the results folder."""

    def next(self) -> tuple[Job, Result]:
        """Wait for a submitted job to end."""

    def close(self) -> None:
        """Give up what is not done, and all resources."""


class LocalExecutor:
    """One job after the other, in this process.

    Args:
        results: the folder jobs read and write.
    """

    silent = False

    def __init__(self, results: Path, progress: Progress) -> None:
        self.results = results
        self.progress = progress
        self._waiting: list[Job] = []

    @property
    def has_room(self) -> bool:
        return not self._waiting

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def next(self) -> tuple[Job, Result]:
        job = self._waiting.pop(0)
        return job, attempt(job, self.results, self.progress)

    def close(self) -> None:
        self._waiting.clear()


class IsolatedExecutor:
    """One job after the other, in a process beside this one; should it die or stall, its job fails and another starts.

    Args:
        results: the folder jobs read and write.
        plugins: files and modules that the process loads first.
        stall: seconds without progress after which a job counts as hung.
    """

    silent = False

    def __init__(self, results: Path, progress: Progress, plugins: Sequence[str] = (), stall: float = STALL) -> None:
        self.results = results
        self.progress = progress
        self.plugins = tuple(plugins)
        self.stall = stall
        self._waiting: list[Job] = []
        self._process: Any = None
        #: whether nothing has been heard of the process's first job yet
        self._new = True
        self._pipe: Connection | None = None

    @property
    def has_room(self) -> bool:
        return not self._waiting

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def next(self) -> tuple[Job, Result]:
        job = self._waiting.pop(0)
        shown = ShownProgress(self.progress)
        try:
            return job, self._perform(job, shown)
        finally:
            shown.end()

    def close(self) -> None:
        self._waiting.clear()
        self._kill()

    def _perform(self, job: Job, shown: ShownProgress) -> Result:
        if self._pipe is None:
            self._pipe = self._start()
        patience = max(self.stall, START) if self._new else self.stall
        with contextlib.suppress(OSError):  # a process that is dead is found out below
            self._pipe.send_bytes(pickle.dumps(job))
        heard = time.monotonic()
        while time.monotonic() - heard < patience:
            # looked at now and then, because what a job started may hold the pipe open when the process is dead
            alive = self._process.is_alive()
            if not self._pipe.poll(min(1.0, patience) if alive else 0.0):
                if not alive:
                    return self._died()
                continue
            try:
                kind, *told = self._pipe.recv()
            except Exception:  # the end of the pipe, or half a message
                return self._died()
            heard = time.monotonic()
            if kind == READY:
                continue
            patience, self._new = self.stall, False
            if kind == RESULT:
                result: Result = told[0]
                return result
            shown.show(kind, *told)
        self._kill()
        return Result(error=f"no progress for {patience:g} s, so the process was ended; --stall allows for more")

    def _start(self) -> Connection:
        import torch

        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        told = (there, self.results, self.plugins, os.getcwd(), torch.get_num_threads())
        self._process = context.Process(target=work, args=told, name="ensdef worker")
        self._process.start()
        self._new = True
        there.close()
        return here

    def _died(self) -> Result:
        self._process.join(5.0)
        code = self._process.exitcode
        self._kill()
        if code is None or code >= 0:
            return Result(error=f"the process ended with exit code {code} before it had a result")
        hint = ", which is also what the system does when memory runs out" if -code == signal.SIGKILL else ""
        return Result(error=f"the process died ({signal.Signals(-code).name}{hint})")

    def _kill(self) -> None:
        """End the process and what it started."""
        process, self._process = self._process, None
        if process is not None and process.pid is not None:  # a signal may come before it was started
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; not yet a group of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

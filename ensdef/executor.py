"""Where jobs are done. The driver (``runner``) decides what is done and writes the records; an executor does it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ensdef.jobs import Job, Result, attempt
from ensdef.progress import Progress


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

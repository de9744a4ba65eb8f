"""A process for jobs: it takes them from a pipe, and sends progress and results back.

A plug-in that crashes there or never returns costs the process and the one job that it was at, not the command.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ensdef.progress import Advance, Progress
from ensdef.registry import load_plugin

#: Kinds of messages to the command: plug-ins are loaded; a line; a bar begins, moves on, ends; what came of a job.
READY, LINE, BEGIN, ADVANCE, END, RESULT = range(6)


def settle(plugins: Sequence[str], folder: str, threads: int) -> None:
    """What a process elsewhere does before it opens a job: same folder, threads and plug-ins as the command's.

    Raises:
        PluginError: a plug-in that could be loaded there cannot be loaded here.
    """
    import torch

    torch.set_num_threads(threads)
    if Path(folder).is_dir():
        os.chdir(folder)
    for plugin in plugins:
        load_plugin(plugin)


def work(pipe: Connection, results: Path, plugins: Sequence[str], folder: str, threads: int) -> None:
    """The life of the process: one job after the other, until the pipe is closed or the command dies."""
    from ensdef.jobs import Result, attempt, describe

    os.setpgrp()  # so that what a job starts can be ended along with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides what an interrupt means
    os.dup2(2, 1)  # its standard output is for records
    faulthandler.enable()
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    failure = None
    try:
        settle(plugins, folder, threads)
    except Exception as error:
        failure = Result(error=describe(error))
    progress = SentProgress(pipe)
    progress.send(READY)
    while True:
        try:
            packed = pipe.recv_bytes()
        except EOFError:
            return
        progress.send(RESULT, failure or attempt(pickle.loads(packed), results, progress))


def _end_with_the_command() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


class SentProgress(Progress):
    """Progress that is shown by the process at the other end of a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._guard = threading.Lock()
        self._numbers = itertools.count()

    def send(self, kind: int, *told: Any) -> None:
        with self._guard:
            self._pipe.send((kind, *told))

    def message(self, text: str) -> None:
        self.send(LINE, text)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        number = next(self._numbers)
        self.send(BEGIN, number, description, total)

        def advance(amount: float = 1, note: str = "") -> None:
            self.send(ADVANCE, number, amount, note)

        try:
            yield advance
        finally:
            self.send(END, number)


class ShownProgress:
    """The other end: shows what :class:`SentProgress` sends."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._bars: dict[int, tuple[Any, Advance]] = {}

    def show(self, kind: int, *told: Any) -> None:
        if kind == LINE:
            self.progress.message(*told)
        elif kind == BEGIN:
            number, description, total = told
            bar = self.progress.task(description, total)
            self._bars[number] = bar, bar.__enter__()
        elif kind == ADVANCE:
            number, amount, note = told
            self._bars[number][1](amount, note)
        elif kind == END:
            self._bars.pop(told[0])[0].__exit__(None, None, None)

    def end(self) -> None:
        """Take away the bars of a process that ended without a word, the innermost first."""
        for number in sorted(self._bars, reverse=True):
            self.show(END, number)

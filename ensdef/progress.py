"""Progress with the time that is left, on stderr; silent where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a bar on by ``amount`` units; ``note`` is shown beside it."""

    def __call__(self, amount: float = 1, note: str = "") -> None: ...


class Progress:
    """The silent reporter, and the interface of the others."""

    def message(self, text: str) -> None:
        """A line that stays."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """A bar of ``total`` units while the block runs."""

        def advance(amount: float = 1, note: str = "") -> None:
            return None

        yield advance


class ConsoleProgress(Progress):
    """Bars by rich on stderr; on a pipe or in a log, a line a minute instead."""

    #: Seconds between lines where there is no terminal.
    LINE_EVERY = 60.0

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    def __reduce__(self) -> tuple[type[ConsoleProgress], tuple[()]]:
        return type(self), ()  # in another process: its standard error is ours, its console is its own

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        began = told = time.monotonic()
        done, last = 0.0, ""
        bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bars:
            bar = bars.add_task(description, total=total, note="")

            def advance(amount: float = 1, note: str = "") -> None:
                nonlocal done, last, told
                done, last, now = done + amount, note or last, time.monotonic()
                bars.update(bar, advance=amount, note=last)
                if bars.disable and now - told > self.LINE_EVERY and done:
                    told = now
                    left = (now - began) * (total - done) / done
                    self.message(f"{description}: {done / total:.0%}, about {left / 60:.1f} min left")

            yield advance
        self.message(f"{description}: {time.monotonic() - began:.1f} s" + (f" ({last})" if last else ""))

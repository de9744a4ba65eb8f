"""Hostile inputs, drawn with hypothesis: good ones with something changed, and whether the change is nonsense."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from hypothesis import strategies as st

import ensdef
from ensdef.cli import cli, compare, explain, import_pth, inspect, measure, plot, plugins, report, run  # noqa: F401
from ensdef.errors import UsageError
from ensdef.registry import ATTACKS, METHODS, Registry

Draw = Callable[[st.SearchStrategy[Any]], Any]

#: Texts that found their way into paths, tables, pages and numbers elsewhere.
TEXTS = st.one_of(
    st.sampled_from(
        [
            *(
                "",
                " ",
                "..",
                "../../outside/secret",
                "/etc/passwd",
                "\0",
                "a\nb",
                "\ud800",
                "-",
                "--",
                "[",
                "]",
                "[[]]",
            ),
            *(
                "nan",
                "inf",
                "-1",
                "1e999999999",
                "8/0",
                "9" * 5000,
                "true",
                "none",
                "eps/0",
                "</script><script>",
                "|",
                "\\",
            ),
            *(
                "pgd[steps=99999999999]",
                "pgd[steps=-1]",
                "pgd[steps=1",
                "torchattacks.__class__",
                "os.system",
                "*",
                "nat,nat",
            ),
            *(
                "$x^$ \\frac{ $",
                "javascript:alert(1)",
                "{{7*7}}",
                "%s%n",
                "$(touch x)",
                "`touch x`",
                "\u202e",
                "x" * 10_000,
            ),
        ]
    ),
    st.text(max_size=30),
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 3), st.floats(), st.sampled_from([10**400, 1e308, -0.0, 5e-324])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


#: What a number may be where one is expected.
PLAIN = st.one_of(
    st.integers(-2, 5), st.floats(0, 2), st.sampled_from(["eps/5", "8/255", "1e-300", "0", "2**3", "1_0"])
)


@st.composite
def calls(draw: Draw, registry: Registry[Any], parameters: str) -> str:
    """A plug-in by name, with some of its own parameters at values that it may or may not take."""
    name = draw(st.sampled_from(registry.names()))
    known = [one.name for one in dataclasses.fields(getattr(registry.get(name), parameters))]
    chosen = draw(st.lists(st.sampled_from(known), max_size=2, unique=True)) if known else []
    inside = ",".join(f"{one}={draw(st.one_of(PLAIN, PLAIN, TEXTS))}" for one in chosen)
    return f"{name}[{inside}]" if inside else name


METHOD_CALLS, ATTACK_CALLS = calls(METHODS, "Hyper"), calls(ATTACKS, "Params")


def alike(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, so that what is refused is refused for what it says."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.one_of(st.integers(-5, 50), st.integers(-(2**62), 2**62))
    if isinstance(value, float):
        return st.one_of(st.floats(-1, 2), st.floats(allow_nan=False, allow_infinity=False))
    if isinstance(value, str):
        return TEXTS
    if isinstance(value, list):
        return st.one_of(st.permutations(value), st.just([]), st.just(value[:1] * 3), st.just(value + value))
    if isinstance(value, dict):
        return st.one_of(st.just({}), st.dictionaries(TEXTS, st.one_of(PLAIN, TEXTS), max_size=3))
    return VALUES


@dataclass
class Input:
    """A command, or a checkpoint to load, with a file in another state.

    Args:
        arguments: of ``ensdef``; None: load the checkpoint in the file's folder.
        file, content: what the file holds while it is tried.
        nonsense: why it must not succeed; empty: it may.
    """

    folder: Path
    arguments: list[str] | None
    file: Path | None = None
    content: bytes = b""
    nonsense: str = ""
    output: str = field(default="", repr=False)

    def __str__(self) -> str:
        shown = f" with {self.file.name} = {self.content[:600]!r}" if self.file else ""
        return (
            f"{self.arguments or 'load_checkpoint'}{shown} [{self.nonsense or 'may succeed'}]\n  {self.output[-300:]}"
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """With the file as it shall be, in the working directory."""
        before = self.file.read_bytes() if self.file is not None and self.file.is_file() else None
        there = os.getcwd()
        os.chdir(self.folder)
        try:
            if self.file is not None:
                self.file.write_bytes(self.content)
            yield
        finally:
            os.chdir(there)
            if self.file is not None:
                if before is None:
                    self.file.unlink()
                else:
                    self.file.write_bytes(before)

    def run_in_place(self) -> int:
        """Exit status of a good command.

        Raises:
            RuntimeError: it failed.
        """
        with self.in_place():
            status, told = self.run()
        if status or told:
            raise RuntimeError(f"{self}\n{told}")
        return status

    def run(self) -> tuple[int, str]:
        """Exit status, and the traceback if there was one."""
        if self.arguments is None:
            assert self.file is not None
            try:
                ensdef.load_checkpoint(self.file.parent)
            except UsageError as error:
                self.output = str(error)
                return 2, ""
            except BaseException:
                return 1, traceback.format_exc(limit=-6)
            return 0, ""
        found = CliRunner().invoke(cli, self.arguments)
        self.output = found.output
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            return 1, "".join(traceback.format_exception(found.exception)[-7:])
        return found.exit_code, ""


def at(body: Any, owner: tuple[Any, ...]) -> Any:
    """The table or list that is nested there."""
    for step in owner:
        body = body[step]
    return body


def places(body: Any, owner: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of nested tables and lists, by the way to it; of long lists the first few."""
    items = body.items() if isinstance(body, dict) else enumerate(body[:3]) if isinstance(body, list) else ()
    for name, value in items:
        yield owner, name
        yield from places(value, (*owner, name))

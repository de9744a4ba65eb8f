"""`benchmarks/reliability/fuzz.py`: a few of its inputs are refused or harmless, and what it looks for it finds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

RELIABILITY = Path(__file__).parent.parent / "benchmarks" / "reliability"
sys.path.insert(0, str(RELIABILITY))

import fuzz  # noqa: E402
from hostile import Input  # noqa: E402

from ensdef.cli import cli  # noqa: E402


@pytest.mark.slow
def test_a_few_dozen_hostile_inputs_are_refused_or_harmless(tmp_path: Path) -> None:
    tried, failures = fuzz.fuzz(tmp_path, 40, number=1)
    assert set(tried) == set(fuzz.KINDS)
    assert not failures, "\n".join(failures)


@pytest.fixture
def misbehaving() -> Iterator[None]:
    """Commands that do what none should."""

    @cli.command("misbehave")
    @click.argument("how")
    def misbehave(how: str) -> None:
        if how == "raise":
            raise RuntimeError("as no command should")
        if how == "write":
            Path("outside.txt").write_text("harm")
        if how == "create and remove":
            Path("gone.txt").touch()
            os.remove("gone.txt")
        if how == "start":
            subprocess.run(["true"], check=True)
        if how == "exit":
            raise SystemExit(3)
        if how == "write inside":
            Path("results/inside.txt").write_text("fine")

    yield
    del cli.commands["misbehave"]


@pytest.mark.parametrize(
    ("how", "nonsense", "told"),
    [
        ("raise", "", "as no command should"),
        ("write", "", "outside.txt"),
        ("create and remove", "", "gone.txt"),
        ("start", "", "subprocess.Popen"),
        ("exit", "", "exit status 3"),
        ("nothing", "all of it", "exit status 0 on nonsense (all of it)"),
        ("write inside", "", ""),
        ("nothing", "", ""),
    ],
)
@pytest.mark.usefixtures("misbehaving")
def test_what_is_looked_for_is_found(how: str, nonsense: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    watch = fuzz.Watch(tmp_path, tmp_path / "results")
    found = fuzz.attempt(Input(tmp_path, ["misbehave", how], nonsense=nonsense), watch)
    assert told in found
    assert bool(found) == bool(told)

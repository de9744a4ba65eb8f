"""A process beside the command's: what crashes or hangs there fails its cell, and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_executors import SMALL, cell, told, wait_for

from ensdef.cli import cli, run  # noqa: F401 - run adds its commands
from ensdef.executor import IsolatedExecutor
from ensdef.progress import Advance, Progress
from ensdef.runner import Run, run_cells

#: Attacks that end their process, or never end.
PLUGIN = '''
"""Throw-away attacks (A. Author; nowhere, 2020)."""

import os
import pathlib
import signal
import time

import ensdef

HERE = pathlib.Path(__file__).parent


class Bad(ensdef.IterativeAttack):
    steps = 1

    def step(self, target, x_adv, y, state, threat, rng):
        with (HERE / "begun").open("a") as file:
            file.write(f"{type(self).__name__} {os.getpid()}\\n")
        self.misbehave()


@ensdef.register_attack("crashes")
class Crashes(Bad):
    """As a fault in compiled code."""

    def misbehave(self):
        os.kill(os.getpid(), signal.SIGSEGV)


@ensdef.register_attack("exits")
class Exits(Bad):
    """As a library that calls exit()."""

    def misbehave(self):
        os._exit(3)


@ensdef.register_attack("hangs")
class Hangs(Bad):
    """As a lock that nobody gives back."""

    def misbehave(self):
        time.sleep(600)
'''


#: So that some images are right, and attacked.
LEARNED = (*SMALL, "--epochs", "6", "--limit", "300")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "bad.py"
    path.write_text(PLUGIN)
    return path


def bench(results: Path, *words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ensdef", "bench", *LEARNED, *map(str, words), "--results", str(results), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_cells_that_crash_exit_or_hang_fail_with_the_reason_and_the_others_finish(plugin: Path, tmp_path: Path) -> None:
    words = ("--plugin", plugin, "--method", "nat", "--attack", "crashes,hangs,exits,fgsm", "--stall", "3")
    process = bench(tmp_path / "r", *words)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    records = json.loads(out)
    assert [(record["attack"], record["error"]) for record in records] == [
        ("crashes", "the process died (SIGSEGV)"),
        ("hangs", "no progress for 3 s, so the process was ended; --stall allows for more"),
        ("exits", "the process ended with exit code 3 before it had a result"),
        ("fgsm", None),
    ]
    pids = [int(line.split()[1]) for line in (tmp_path / "begun").read_text().splitlines()]
    assert len(set(pids)) == 3, "each in a process of its own"
    assert not any(alive(pid) for pid in pids)
    assert len(list((tmp_path / "r").glob("checkpoints/*"))) == 1


@pytest.mark.slow
def test_the_process_ends_with_a_command_that_is_killed(plugin: Path, tmp_path: Path) -> None:
    process = bench(tmp_path / "r", "--plugin", plugin, "--method", "nat", "--attack", "hangs")
    wait_for(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text().endswith("\n"), 120)
    pid = int((tmp_path / "begun").read_text().split()[1])
    assert pid != process.pid
    assert alive(pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(pid), 10)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


class Watching(Progress):
    """Notes bars and lines."""

    def __init__(self) -> None:
        self.bars: dict[str, float] = {}
        self.open = 0

    def task(self, description: str, total: float) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def bar() -> Iterator[Advance]:
            self.open += 1

            def advance(amount: float = 1, note: str = "") -> None:
                self.bars[description] = self.bars.get(description, 0) + amount

            yield advance
            self.open -= 1

        return bar()


def test_records_are_those_of_this_process_and_progress_is_seen(tmp_path: Path) -> None:
    cells = [cell(), cell(attack="pgd")]
    progress = Watching()
    executor = IsolatedExecutor(tmp_path / "one", progress)
    apart = run_cells(cells, Run(tmp_path / "one"), progress, executor)
    here = run_cells(cells, Run(tmp_path / "two"))
    assert [told(record) for record in apart] == [told(record) for record in here]
    weights = [(tmp_path / name).rglob("*.safetensors") for name in ("one", "two")]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
    assert any("train nat" in bar for bar in progress.bars)
    assert any("attack" in bar for bar in progress.bars)
    assert progress.open == 0


def test_a_plug_in_that_cannot_be_loaded_there_fails_the_cells_with_its_reason(tmp_path: Path) -> None:
    executor = IsolatedExecutor(tmp_path, Progress(), [str(tmp_path / "nowhere.py")])
    (record,) = run_cells([cell()], Run(tmp_path), executor=executor)
    assert record.error == f"--plugin {tmp_path / 'nowhere.py'}: no such file"


def test_plug_ins_are_isolated_and_what_is_built_in_is_not(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def remember(cells: Any, how: Any, progress: Any, executor: Any) -> Any:
        made.append(executor)
        raise KeyboardInterrupt

    monkeypatch.setattr("ensdef.runner.run_cells", remember)
    words = ["bench", "--method", "nat", "--attack", "fgsm", *SMALL, "--results", str(tmp_path / "r")]
    mine = ["--plugin", str(plugin)]
    for more in ([], mine, [*mine, "--isolate", "never"], ["--isolate", "always"], [*mine, "--devices", "2"]):
        CliRunner().invoke(cli, [*words, *more])
    assert [isinstance(executor, IsolatedExecutor) for executor in made] == [False, True, False, True, False]
    assert str(plugin) in made[1].plugins
    assert made[1].stall == 3600


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--executor", "ray", "--isolate", "always"], "are for --executor local"),
        (["--executor", "ray", "--stall", "10"], "are for --executor local"),
        (["--devices", "2", "--isolate", "always"], "leave one of the two out"),
    ],
)
def test_processes_in_processes_are_refused(words: list[str], remedy: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["bench", *words, "--results", str(tmp_path)])
    assert result.exit_code == 2
    assert remedy in result.output


def test_a_job_s_silence_counts_from_its_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that loads slowly is not taken for one that hangs."""
    executor = IsolatedExecutor(tmp_path, Progress(), stall=0.5)
    began = time.monotonic()
    monkeypatch.setattr("ensdef.executor.START", 0.2)
    (record,) = run_cells([cell()], Run(tmp_path), executor=executor)
    assert "no progress for 0.5 s" in (record.error or "")
    assert time.monotonic() - began < 60

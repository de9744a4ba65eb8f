"""SIGINT and SIGTERM: the exit status says so, one line tells what is kept, and the same command goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ensdef.claims import Claims
from ensdef.signals import Interrupted

#: A defence whose every batch leaves a line in a file, and takes its time.
SLOW = '''
"""On taking one's time (A. Author; nowhere, 2020)."""

import time
from pathlib import Path

import ensdef
from ensdef.losses import member_cross_entropy


@ensdef.register_defense("slow")
class Slow(ensdef.EnsembleDefense):
    """Sleeps."""

    def loss(self, batch, progress):
        with Path(__file__).with_name("batches").open("a") as file:
            file.write(f"{progress}\\n")
        time.sleep(0.05)
        return {"ce": member_cross_entropy(self.member_logits(batch.x), batch.y).mean()}
'''


def started(folder: Path) -> subprocess.Popen[str]:
    """A command that trains two epochs a second, six in all, in a process of its own."""
    words = ["bench", "--plugin", "slow.py", "--method", "slow", "--attack", "fgsm", "--epochs", "6", "--limit", "640"]
    words += ["--arch", "small_resnet[width=4]", "--members", "1", "--samples", "10", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "ensdef", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_batches(folder: Path, count: int) -> list[str]:
    path, deadline = folder / "batches", time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.is_file() and len(lines := path.read_text().split()) >= count:
            return lines
        time.sleep(0.02)
    raise AssertionError("the command never got there")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_in_order_and_the_same_command_goes_on(number: int, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    process = started(tmp_path)
    wait_for_batches(tmp_path, 42)  # of 10 an epoch
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    assert "Traceback" not in told
    assert told.splitlines()[-1] == (
        f"stopped by {signal.Signals(number).name}; 0 of 1 cells are done, and what was kept of the others lies in "
        "results; the same command goes on from there"
    )
    claims = Claims(tmp_path / "results")
    for lock in claims.folder.glob("*.lock"):
        assert claims.take(lock.stem), "the locks are free"
    claims.release_all()
    before = len((tmp_path / "batches").read_text().split())
    again = started(tmp_path)
    _, told = again.communicate(timeout=60)
    assert again.returncode == 0, told
    assert "goes on after" in told
    seen = (tmp_path / "batches").read_text().split()
    assert 60 <= len(seen) < before + 60
    assert not list(tmp_path.rglob("*.journal"))


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    script = """
        import time
        from ensdef.signals import Interrupted, end_in_order
        end_in_order()
        try:
            print("ready", flush=True)
            time.sleep(30)
        except Interrupted:
            print("first", flush=True)
            time.sleep(30)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "first\n"
    process.terminate()
    _, told = process.communicate(timeout=20)
    assert (process.returncode, told) == (-signal.SIGTERM, "")


def test_a_signal_that_was_ignored_when_the_command_began_stays_ignored() -> None:
    script = """
        import os, signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from ensdef.signals import end_in_order
        end_in_order()
        os.kill(os.getpid(), signal.SIGINT)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode == 0


def test_what_is_kept_is_told_behind_the_signal() -> None:
    error = Interrupted(signal.SIGTERM)
    error.add_note("two of three are done")
    assert (error.told, error.exit_status) == ("stopped by SIGTERM; two of three are done", 143)
    assert isinstance(error, KeyboardInterrupt), "what cleans up after Ctrl-C cleans up after this"

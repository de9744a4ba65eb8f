"""The script that counts what several commands do on one folder: its quick form, and that it can miss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

RELIABILITY = Path(__file__).parent.parent / "benchmarks" / "reliability"
sys.path.insert(0, str(RELIABILITY))

import processes  # noqa: E402

sys.path.remove(str(RELIABILITY))


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["working", "off"])
def test_two_commands_do_every_cell_once(locks: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = processes.main(["--processes", "2", "--cells", "6", "--locks", locks])
    out = capsys.readouterr().out
    assert code == 0, out
    assert f"locks {locks}: 6 of 6 cells and 1 of 1 trainings exactly once, 0 repeated, 6 of 6 rows" in out


def counted(folder: Path, events: list[str], rows: list[str]) -> str:
    (folder / "r" / "tables").mkdir(parents=True)
    (folder / "events").write_text("".join(f"{event}\n" for event in events))
    (folder / "r" / "tables" / "bench.csv").write_text("method,robust_accuracy\n" + "".join(f"{row}\n" for row in rows))
    return processes.judged(folder, 1, 2, 2, "working", 1.0)


GOOD = ["train 0 11", "attack aa 0 11", "attack aa 1 12"]


def test_what_was_done_once_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert counted(tmp_path, GOOD, ["nat,0.5", "nat,0.5"]) == ""
    assert "2 of 2 cells and 1 of 1 trainings exactly once, 0 repeated, 2 of 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("events", "rows"),
    [
        ([*GOOD, "attack aa 1 11"], ["nat,0.5", "nat,0.5"]),
        (GOOD[:-1], ["nat,0.5", "nat,0.5"]),
        ([*GOOD, "train 0 12"], ["nat,0.5", "nat,0.5"]),
        (GOOD, ["nat,0.5"]),
        (GOOD, ["nat,0.5", "nat,"]),
    ],
    ids=["repeated", "lost", "trained twice", "a row is missing", "a cell failed"],
)
def test_what_was_repeated_or_lost_is_a_miss(events: list[str], rows: list[str], tmp_path: Path) -> None:
    assert "not every cell exactly once" in counted(tmp_path, events, rows)

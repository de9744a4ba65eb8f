"""``benchmarks/reliability/kill.py``: what it counts is counted, and what it compares is compared."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ensdef.journal import Snapshot

RELIABILITY = Path(__file__).parent.parent / "benchmarks" / "reliability"
sys.path.insert(0, str(RELIABILITY))

import kill  # noqa: E402

sys.path.remove(str(RELIABILITY))

IDS = [30, 10, 20, 40]


def attack_state() -> Snapshot:
    """The image at position 0 is at work, the one at 1 waits for its third run, the others are done with."""
    rows = {"index": torch.tensor([0]), "run": torch.tensor([1]), "step": torch.tensor([5])}
    return Snapshot(
        {f"active.{name}": value for name, value in rows.items()}, {"under way": {"waiting": [[1, 2]]}, "done": 0}
    )


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"epoch": 1}, 1),
        ({"epoch": 2}, 0),
        ({"journal": 0.1}, 0),
    ],
)
def test_a_batch_of_an_epoch_that_was_kept_counts(event: dict[str, Any], expected: int) -> None:
    assert kill.repeated([{"key": "t", **event}], set(), {"t": Snapshot(values={"epoch": 2})}, IDS) == expected


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"runs": [[30, 1, 6], [10, 2, 1]]}, 0),
        ({"runs": [[30, 1, 5]]}, 1),
        ({"runs": [[30, 0, 9]]}, 1),
        ({"runs": [[10, 1, 9], [30, 1, 6]]}, 1),
        ({"runs": [[20, 3, 1]]}, 1),
        ({"ids": [10]}, 1),
        ({"ids": [40]}, 1),
    ],
)
def test_a_step_that_was_kept_counts(event: dict[str, Any], expected: int) -> None:
    assert kill.repeated([{"key": "c", **event}], set(), {"c": attack_state()}, IDS) == expected


def test_a_whole_batch_that_waits_does_not_count() -> None:
    state = Snapshot(values={"under way": {"waiting": [[2, 0], [3, 0]]}})
    events = [{"key": "c", "ids": [20, 40]}, {"key": "c", "ids": [10, 20]}]
    assert kill.repeated(events, set(), {"c": state}, IDS) == 1


def test_every_batch_of_what_is_finished_counts_and_none_of_what_nothing_is_known_of() -> None:
    events = [{"key": "t", "epoch": 5}, {"key": "c", "ids": [10]}, {"key": "other", "epoch": 0}]
    assert kill.repeated(events, {"t", "c"}, {}, IDS) == 2


def test_moments_of_all_folders_together_cover_the_whole_length() -> None:
    folders = list(kill.moments(20, 5, 10.0, random.Random(0)))
    reached = sorted(sum(gaps[: index + 1]) for gaps in folders for index in range(len(gaps)))
    assert len(reached) == 20
    assert all(0.5 * part <= moment <= 0.5 * (part + 1) for part, moment in enumerate(reached))


@pytest.mark.slow
def test_killed_once_in_its_middle_and_once_at_its_tables_a_run_gives_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (RELIABILITY / "kill.toml").read_text().replace("epochs = 6", "epochs = 2").replace("150", "40")
    (tmp_path / "kill.toml").write_text(small)
    monkeypatch.setattr(kill, "SHARE", 0.1)  # a second of work beside one write on a busy disk
    assert kill.compare(tmp_path, 2, 1, random.Random(0), tmp_path / "kill.toml"), capsys.readouterr().out
    assert "2 of 2 kills" in capsys.readouterr().out

"""The journal: what comes back, what is not believed, and what it may cost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys_journal import always

import ensdef.journal
from ensdef.journal import Journal, Snapshot, unpacked
from ensdef.records import Store, write_bytes


@pytest.fixture(autouse=True)
def _no_costs_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "usual", 0.0)


def there_and_back(folder: Path, snapshot: Snapshot) -> Snapshot:
    assert always(folder).keep(lambda: snapshot)
    found = always(folder).read()
    assert found is not None
    return found


# --- what comes back ------------------------------------------------------------------------------

TENSORS = {
    "channels last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "one channel, strides of its own": torch.rand(3, 64).as_strided((3, 1, 8, 8), (64, 1, 8, 1)),
    "transposed": torch.rand(3, 5).T,
    "a scalar": torch.tensor(2.5),
    "no rows": torch.zeros(0, 4),
    "bf16": torch.rand(4).to(torch.bfloat16),
    "double": torch.rand(2).double(),
    "whole numbers": torch.tensor([-(2**62), 2**62]),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "no numbers": torch.tensor([float("nan"), float("inf"), -0.0]),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_tensor_comes_back_bit_by_bit_in_its_layout(tensor: torch.Tensor, tmp_path: Path) -> None:
    found = there_and_back(tmp_path, Snapshot({"x": tensor})).tensors["x"]
    assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert torch.equal(found.contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))


def test_parts_of_one_tensor_come_back_apart(tmp_path: Path) -> None:
    whole = torch.rand(4, 3)
    found = there_and_back(tmp_path, Snapshot({"whole": whole, "again": whole, "row": whole[1]})).tensors
    assert torch.equal(found["whole"], whole)
    assert torch.equal(found["row"], whole[1])
    found["again"].zero_()
    assert torch.equal(found["whole"], whole)


def test_what_is_kept_does_not_change_with_what_it_was_taken_from(tmp_path: Path) -> None:
    x = torch.zeros(2)
    always(tmp_path).keep(lambda: Snapshot({"x": x}))
    x += 1
    found = always(tmp_path).read()
    assert found is not None
    assert torch.equal(found.tensors["x"], torch.zeros(2))


@settings(deadline=None, max_examples=30)
@given(st.floats(allow_nan=False))
def test_a_number_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, number: float) -> None:
    folder = tmp_path_factory.mktemp("journal")
    assert there_and_back(folder, Snapshot(values={"score": number})).values == {"score": number}


def test_without_a_file_there_is_no_state(tmp_path: Path) -> None:
    assert always(tmp_path).read() is None


def test_the_latest_state_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    journal = always(tmp_path)
    for epoch in (1, 2, 3):
        journal.keep(lambda epoch=epoch: Snapshot(values={"epoch": epoch}))  # type: ignore[misc]
    found = always(tmp_path).read()
    assert found is not None
    assert found.values == {"epoch": 3}
    assert (journal.written, len(list(tmp_path.iterdir()))) == (3, 1)


# --- what is not believed -------------------------------------------------------------------------


def kept(folder: Path) -> Path:
    there_and_back(folder, Snapshot({"x": torch.arange(40.0)}, {"epoch": 1}))
    return folder / "work.journal"


def not_believed(folder: Path, reason: str, **work: Any) -> None:
    told: list[str] = []
    path = folder / "work.journal"
    content = path.read_bytes()
    assert always(folder, told.append, **work).read() is None
    assert len(told) == 1
    assert "work.journal is work.journal.damaged-1 now" in told[0]
    assert reason in told[0]
    assert not path.exists()
    assert (folder / "work.journal.damaged-1").read_bytes() == content, "whoever wants to look can"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_half_a_file_is_not_believed(share: float, tmp_path: Path) -> None:
    path = kept(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    not_believed(tmp_path, "its checksum is not that of its content")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.99])
def test_a_single_flipped_bit_is_noticed(share: float, tmp_path: Path) -> None:
    path = kept(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)
    not_believed(tmp_path, "damaged")


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"\n\n", b"{}", os.urandom(300)])
def test_what_is_no_journal_is_not_believed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "work.journal").write_bytes(content)
    not_believed(tmp_path, "damaged")


def test_the_state_of_another_key_is_not_believed(tmp_path: Path) -> None:
    kept(tmp_path)
    not_believed(tmp_path, "it is the state of other work (other key)", key="another")


def test_a_state_from_other_weights_is_not_believed(tmp_path: Path) -> None:
    always(tmp_path, weights={"": "a"}).keep(Snapshot)
    not_believed(tmp_path, "(other weights)", weights={"": "b"})


@pytest.mark.parametrize("what", ["engine", "torch"])
def test_a_state_of_another_version_is_not_believed(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path)
    if what == "engine":
        monkeypatch.setattr(ensdef.journal, "engine_hash", lambda: "another")
    else:
        monkeypatch.setattr(torch, "__version__", "1.0")
    not_believed(tmp_path, f"(other {what})")


# --- what it costs --------------------------------------------------------------------------------


class Clock:
    """Stands still but for what it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def journal_at(folder: Path, clock: Clock) -> Journal:
    return Journal(folder / "work.journal", {"key": "k"}, clock=clock)


def costing(clock: Clock, seconds: float) -> Snapshot:
    clock.now += seconds
    return Snapshot()


def test_the_first_state_waits_for_a_second_of_work(tmp_path: Path) -> None:
    clock = Clock()
    journal = journal_at(tmp_path, clock)
    clock.now = 0.99
    assert not journal.keep(Snapshot)
    clock.now = 1.0
    assert journal.keep(Snapshot)


@pytest.mark.parametrize("cost", [0.001, 0.05, 2.0])
def test_a_state_waits_a_hundred_times_as_long_as_the_last_one_took(cost: float, tmp_path: Path) -> None:
    clock = Clock()
    journal = journal_at(tmp_path, clock)
    clock.now = 1.0
    assert journal.keep(lambda: costing(clock, cost))
    assert journal.seconds == pytest.approx(cost)
    ended = clock.now
    clock.now = ended + 0.98 * max(1.0, 100 * cost)
    assert not journal.keep(Snapshot)
    clock.now = max(ended + 1.001 * max(1.0, 100 * cost), 200.1 * cost)
    assert journal.keep(Snapshot)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.001, 30), min_size=1, max_size=60))
def test_before_every_state_all_of_them_took_less_than_a_hundredth(
    tmp_path_factory: pytest.TempPathFactory, moments: list[float]
) -> None:
    clock, spent, worst = Clock(), 0.0, 0.0
    journal = journal_at(tmp_path_factory.mktemp("journal"), clock)
    for seconds in moments:
        clock.now += seconds
        before = clock.now
        if journal.keep(lambda: costing(clock, 0.02)):
            worst = max(worst, spent / before)
            spent += 0.02
    assert worst <= 0.01
    assert journal.seconds == pytest.approx(spent)


def test_the_next_journal_of_a_process_expects_what_the_last_write_took(tmp_path: Path) -> None:
    clock = Clock()
    first = journal_at(tmp_path, clock)
    clock.now = 1.0
    first.keep(lambda: costing(clock, 0.5))
    began = clock.now
    second = journal_at(tmp_path, clock)
    clock.now = began + 49.0
    assert not second.due
    clock.now = began + 51.0
    assert second.due


def test_a_full_disk_ends_the_journal_and_not_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told: list[str] = []
    journal = always(tmp_path, told.append)
    monkeypatch.setattr(ensdef.journal, "write_bytes", full)
    assert not journal.keep(Snapshot)
    assert not journal.keep(Snapshot)
    assert told == [
        f"{tmp_path / 'work.journal'} cannot be written (No space left on device): if this is stopped, it starts over"
    ]


# --- whole files ----------------------------------------------------------------------------------


def test_a_file_and_its_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.path.isdir(f"/proc/self/fd/{handle}")))
    write_bytes(tmp_path / "a", b"x")
    assert flushed == ([False, True] if os.path.isdir("/proc/self/fd") else [False, False])


def test_a_folder_that_cannot_be_opened_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError("folders are not opened here")
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_what_a_killed_writer_leaves_is_no_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("digits", "nat", "pgd", "0" * 64)
    path.parent.mkdir(parents=True)
    (path.parent / f".{path.name}.k3jx81_a").write_text('{"format": 1, "meth')
    assert store.read(path) is None
    assert list(store.all()) == []


def test_a_journal_is_read_without_knowing_whose_it_is(tmp_path: Path) -> None:
    work, snapshot = unpacked(kept(tmp_path).read_bytes())
    assert (work["key"], snapshot.values) == ("k", {"epoch": 1})

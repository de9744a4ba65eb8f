"""Claims: a piece of work is had by one, whether or not locks work, and a dead holder's work is had by another."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ensdef.claims import Claims, one_at_a_time
from ensdef.leases import KEEPER, RENEW, STALE, Keeper, Lease, newest, read_lease

KEY = "a" * 64


class Clock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def locks_of_other_machines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lock is granted, as to a machine that cannot see the locks of the others."""
    monkeypatch.setattr(fcntl, "flock", lambda *args: None)
    hosts = iter(range(10**6))
    monkeypatch.setattr("ensdef.leases.this_host", lambda: f"machine {next(hosts)}")


@pytest.fixture(autouse=True)
def nothing_stays_held() -> Iterator[None]:
    yield
    for lease in list(KEEPER._leases):
        KEEPER.remove(lease)
        lease.end()


without = pytest.mark.parametrize("kind", ["no_locks", "locks_of_other_machines_only"])


def lease_of(results: Path) -> Path:
    folder = results / ".claims" / f"{KEY[:16]}.leases"
    return folder / str(newest(folder))


def look_for(seconds: float, watcher: Claims, clock: Clock, every: float = 1.0) -> bool:
    """Whether the watcher gets the work within so many seconds of looking."""
    taken = watcher.take(KEY)
    for _ in range(int(seconds / every)):
        if taken:
            break
        clock.now += every
        taken = watcher.take(KEY)
    return taken


# --- without locks --------------------------------------------------------------------------------


@without
def test_a_claim_is_had_by_one_and_freed_by_its_release(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(kind)
    mine, other = Claims(tmp_path), Claims(tmp_path)
    assert mine.take(KEY)
    assert not other.take(KEY)
    assert other.take("b" * 64)
    mine.release(KEY)
    assert other.take(KEY)
    assert not mine.take(KEY)


@without
def test_a_lease_that_is_renewed_is_never_taken_over(
    kind: str, tmp_path: Path, clock: Clock, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(kind)
    mine, other = Claims(tmp_path), Claims(tmp_path, clock=clock)
    assert mine.take(KEY)
    for _ in range(20):
        assert not look_for(STALE - 1, other, clock)
        KEEPER.renew_all()
    assert mine.holds(KEY)


@without
def test_a_lease_that_stood_still_for_a_minute_is_taken_over_and_its_holder_finds_out(
    kind: str, tmp_path: Path, clock: Clock, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(kind)
    mine, other, third = Claims(tmp_path), Claims(tmp_path, clock=clock), Claims(tmp_path, clock=clock)
    assert mine.take(KEY)
    began = clock.now
    assert look_for(2 * STALE, other, clock)
    assert STALE <= clock.now - began <= STALE + 1
    assert other.holds(KEY)
    assert not mine.holds(KEY)
    KEEPER.renew_all()  # the one that was overtaken wakes
    assert other.holds(KEY)
    assert read_lease(lease_of(tmp_path)) is not None
    mine.release(KEY)
    assert other.holds(KEY), "what the overtaken one gives back is its own alone"
    assert not third.take(KEY)


def test_of_many_watchers_of_one_dead_holder_one_takes_over(no_locks: None, tmp_path: Path) -> None:
    assert Claims(tmp_path).take(KEY)
    KEEPER.remove(next(iter(KEEPER._leases)))
    for _ in range(20):
        clocks = [Clock() for _ in range(8)]
        watchers = [Claims(tmp_path, clock=clock) for clock in clocks]
        for _ in range(6):
            assert not any(watcher.take(KEY) for watcher in watchers)
            for clock in clocks:
                clock.now += RENEW
        start, taken = threading.Barrier(len(watchers)), []

        def race(watcher: Claims, start: threading.Barrier = start, taken: list[Claims] = taken) -> None:
            start.wait()
            if watcher.take(KEY):
                taken.append(watcher)

        threads = [threading.Thread(target=race, args=(watcher,)) for watcher in watchers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        assert [watcher.holds(KEY) for watcher in watchers].count(True) == 1
        for lease in list(KEEPER._leases):  # this holder dies as well
            KEEPER.remove(lease)


def test_a_slow_watcher_cannot_take_a_number_that_was_given_and_tidied_away(
    no_locks: None, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It judged the lease dead; before it acts, others take over, finish, take over again and tidy up."""
    assert Claims(tmp_path).take(KEY)
    slow, fast = Claims(tmp_path, clock=clock), Claims(tmp_path)
    is_free = slow._is_free

    def judged_long_ago(*args: Any) -> bool:
        free = is_free(*args)
        if free:
            folder = lease_of(tmp_path).parent
            (folder / "1").rename(folder / "3")
        return free

    monkeypatch.setattr(slow, "_is_free", judged_long_ago)
    assert not look_for(2 * STALE, slow, clock)
    assert sorted(path.name for path in lease_of(tmp_path).parent.iterdir()) == ["3"]
    assert not fast.take(KEY)


def test_a_watcher_that_slept_as_long_as_the_holder_does_not_judge_it_at_once(
    no_locks: None, tmp_path: Path, clock: Clock
) -> None:
    mine, other = Claims(tmp_path), Claims(tmp_path, clock=clock)
    assert mine.take(KEY)
    assert not other.take(KEY)
    clock.now += 10 * STALE
    assert not other.take(KEY)


def test_a_lease_whose_maker_died_before_it_wrote_is_free_after_a_minute(
    no_locks: None, tmp_path: Path, clock: Clock
) -> None:
    (tmp_path / ".claims" / f"{KEY[:16]}.leases").mkdir(parents=True)
    (tmp_path / ".claims" / f"{KEY[:16]}.leases" / "1").touch()
    assert look_for(2 * STALE, Claims(tmp_path, clock=clock), clock)


def test_that_locks_do_not_work_is_told_once(no_locks: None, tmp_path: Path) -> None:
    told: list[str] = []
    claims = Claims(tmp_path, told.append)
    assert claims.take(KEY)
    assert claims.take("b" * 64)
    assert len(told) == 1
    assert "leases alone" in told[0]


# --- with locks -----------------------------------------------------------------------------------

HOLDER = """
    import pathlib, time
    from ensdef.claims import Claims
    claims = Claims(pathlib.Path({folder!r}))
    print(claims.take({key!r}), flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    script = textwrap.dedent(HOLDER.format(folder=os.fspath(tmp_path), key=KEY))
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "True\n"
    mine = Claims(tmp_path)
    assert not mine.take(KEY)
    holder.kill()
    holder.wait()
    assert mine.take(KEY)
    assert mine.holds(KEY)


def test_a_free_lock_proves_nothing_of_a_holder_that_had_none(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks may fail for a while; what was claimed meanwhile stands on its lease alone."""
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, "busy")))
        assert Claims(tmp_path).take(KEY)
    other = Claims(tmp_path, clock=clock)
    assert not look_for(STALE - 1, other, clock)
    assert look_for(2, other, clock)


def test_one_thread_renews_all_leases_of_a_process_and_ends_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensdef.leases.RENEW", 0.01)
    keeper = Keeper()  # that of the process may be asleep since another test
    monkeypatch.setattr("ensdef.claims.KEEPER", keeper)
    before = set(threading.enumerate())
    claims, other = Claims(tmp_path / "one"), Claims(tmp_path / "other")
    assert claims.take(KEY)
    assert other.take(KEY)
    (thread,) = set(threading.enumerate()) - before
    for folder in (tmp_path / "one", tmp_path / "other"):
        wait_for(partial(renewed, folder))
    claims.release_all()
    other.release_all()
    thread.join(timeout=10)
    assert not thread.is_alive()


def renewed(results: Path) -> bool:
    found = read_lease(lease_of(results))
    assert found is not None
    return found[1].get("renewals", 0) > 2


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# --- one at a time --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no_locks", "locks_of_other_machines_only", None])
def test_one_at_a_time_lets_no_two_in(kind: str | None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind is not None:
        request.getfixturevalue(kind)
    inside, most = 0, 0
    guard = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        for _ in range(5):
            with one_at_a_time(tmp_path, "tables"):
                with guard:
                    inside += 1
                    most = max(most, inside)
                threading.Event().wait(0.002)
                with guard:
                    inside -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ensdef.claims.POLL", 0.001)
        threads = [threading.Thread(target=enter) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


def test_who_waits_for_its_turn_says_so(tmp_path: Path) -> None:
    other = Claims(tmp_path)
    assert other.take("tables")
    told: list[str] = []

    def hear(text: str) -> None:
        told.append(text)
        other.release_all()

    with one_at_a_time(tmp_path, "tables", hear):
        pass
    assert told == [f"waiting: another command is at tables in {tmp_path}"]


def test_a_lease_can_be_made_by_one_alone(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "1", locked=False)
    with pytest.raises(FileExistsError):
        Lease(tmp_path / "1", locked=False)
    lease.end()

"""Kill a run at random moments, go on each time, and compare with a run that was left alone.

    python benchmarks/reliability/kill.py            # 25 kills
    python benchmarks/reliability/kill.py --quick    # 3

``kill.toml`` (two trainings, four cells, a table) is run once without a disturbance, which tells how long it takes.
Then it is run in several folders (with jobs in a process of their own in every other one), in each of them killed
(SIGKILL) several times in a row, and at last run to its end.
Moments are spread over the whole length: those of all folders together have one in every equal part of it, and the
last kill in every folder hits the writing of the tables. Work since the last state that was kept is lost by a kill and
done again; what must not happen is counted:

- tables, records (but for times and provenance) and weights that differ from those of the run left alone, in any byte;
- batches done again although a state that was kept, a checkpoint or a record already had them. Plug-ins note every
  batch (``watched_work.py``); the journals are read after every kill.

Exit status 1 if there is one of these, or if journals took 1 % of the time or more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ensdef.journal import Snapshot, unpacked

HERE = Path(__file__).parent
PROTOCOL = HERE / "kill.toml"
#: Most of the time that journals may take.
SHARE = 0.01
#: Tries at a kill before a process that is about to end has ended.
TRIES = 8
Event = dict[str, Any]


@dataclass
class Folder:
    """One results folder and the processes that were at work in it."""

    path: Path
    protocol: Path = PROTOCOL
    #: where jobs are done: in the command's process, or in one beside it
    isolate: str = "never"
    #: events of every process so far, and how long each worked, in seconds
    events: list[list[Event]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def results(self) -> Path:
        return self.path / "results"

    def start(self) -> tuple[subprocess.Popen[bytes], Path]:
        """A process that begins or goes on, and the file of its events."""
        self.path.mkdir(parents=True, exist_ok=True)
        events = self.path / f"events-{len(self.events)}.jsonl"
        plugin = str(HERE / "watched_work.py")
        words = ["run", str(self.protocol), "--plugin", plugin, "--results", "results", "--device", "cpu"]
        words += ["--isolate", self.isolate]
        with (self.path / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ensdef", *words],
                cwd=self.path,
                stdout=log,
                stderr=log,
                env={**os.environ, "ENSDEF_EVENTS": str(events), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        return process, events

    def finish(self) -> None:
        """Run to the end."""
        process, events = self.start()
        status = process.wait()
        ended = time.monotonic()
        self._note(events, ended)
        if status:
            raise SystemExit(f"exit status {status}:\n{(self.path / 'log').read_text()[-3000:]}")

    def kill(self, after: float) -> bool:
        """Work for ``after`` seconds and be killed; False: it was done before."""
        process, events = self.start()
        while not events.is_file() and process.poll() is None:
            time.sleep(0.005)
        return self._kill(process, events, after)

    def kill_at_tables(self, cells: int, after: float) -> bool:
        """Be killed ``after`` seconds after the last record is there."""
        process, events = self.start()
        while (len(self.records()) < cells or not events.is_file()) and process.poll() is None:
            time.sleep(0.002)
        return self._kill(process, events, after)

    def _kill(self, process: subprocess.Popen[bytes], events: Path, after: float) -> bool:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self._note(events, time.monotonic())
            return True
        self._note(events, time.monotonic())
        return False

    def _note(self, path: Path, ended: float) -> None:
        # a line may have been cut by the kill
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        found = [json.loads(line) for line in lines]
        self.events.append(found)
        self.seconds.append(ended - found[0]["time"] if found else 0.0)

    def records(self) -> dict[str, dict[str, Any]]:
        """Finished records by key."""
        found = [json.loads(path.read_text()) for path in self.results.glob("records/*/*/*.json")]
        return {record["key"]: record for record in found}

    def trained(self) -> set[str]:
        """Keys of finished trainings."""
        return {json.loads(path.read_text())["key"] for path in self.results.glob("checkpoints/*/spec.json")}

    def states(self) -> dict[str, Snapshot]:
        """What journals hold, by the key of the training or cell."""
        read = [unpacked(path.read_bytes()) for path in self.results.glob(".journals/*.journal")]
        return {work["key"]: snapshot for work, snapshot in read}

    def phase(self, cells: int) -> str:
        """What the last process was at."""
        if len(self.records()) == cells:
            return "tables"
        last = next((event for event in reversed(self.events[-1]) if {"epoch", "runs", "ids"} & set(event)), {})
        return "training" if "epoch" in last else "attack" if last else "start"

    def outcome(self) -> dict[str, Any]:
        """Everything that must not depend on kills: tables and weights byte by byte, records but for times."""
        files = [*self.results.glob("tables/*"), *self.results.glob("checkpoints/*/*.safetensors")]
        told: dict[str, Any] = {str(path.relative_to(self.results)): path.read_bytes() for path in files}
        for key, record in self.records().items():
            told[key] = {
                name: value for name, value in record.items() if name not in ("seconds", "provenance", "sha256")
            }
        return told


def repeated(events: Sequence[Event], done: set[str], states: Mapping[str, Snapshot], ids: Sequence[int]) -> int:
    """Batches among ``events`` that were done before.

    Args:
        done: keys of finished trainings and cells.
        states: what was kept of unfinished ones.
        ids: image ids in the order of a cell's positions.
    """
    positions = {image: position for position, image in enumerate(ids)}
    known = {key: _Known.of(state) for key, state in states.items()}
    again = 0
    for event in events:
        if not {"epoch", "runs", "ids"} & set(event):
            continue
        key = event["key"]
        if key in done:
            again += 1
        elif key in known and "epoch" in event:
            again += event["epoch"] < known[key].epoch
        elif key in known:
            items = event["runs"] if "runs" in event else [(image, 0, 1) for image in event["ids"]]
            again += any(known[key].has(positions[image], run, step) for image, run, step in items)
    return again


@dataclass(frozen=True)
class _Known:
    """What a state has behind it: epochs of a training; runs and steps of an attack by position."""

    epoch: int
    stages: int
    at: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, state: Snapshot) -> _Known:
        values = state.values
        at = {index: (run, 0) for index, run in values.get("under way", {}).get("waiting", ())}
        for place in ("active", "aside"):
            rows = state.under(f"{place}.")
            if rows:
                columns = [rows[name].tolist() for name in ("index", "run", "step")]
                at |= {index: (run, step) for index, run, step in zip(*columns, strict=True)}
        return cls(values.get("epoch", 0), values.get("done", 0), at)

    def has(self, position: int, run: int, step: int) -> bool:
        """Whether this step of this run is behind; an image that is neither waiting nor at work is done with."""
        return position not in self.at or (run, step) <= self.at[position]


def moments(kills: int, folders: int, length: float, rng: random.Random) -> Iterator[list[float]]:
    """For every folder, seconds of work before each kill: gaps between moments spread over ``length``."""
    spread = [(part + rng.random()) / kills * length for part in range(kills)]
    for folder in range(folders):
        yield [later - earlier for earlier, later in pairwise([0.0, *spread[folder::folders]])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three kills in one folder")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [default: 0]")
    options = parser.parse_args()
    kills, folders = (3, 1) if options.quick else (25, 5)
    with tempfile.TemporaryDirectory(prefix="ensdef-kill-") as name:
        sys.exit(0 if compare(Path(name), kills, folders, random.Random(options.seed)) else 1)


def compare(where: Path, kills: int, folders: int, rng: random.Random, protocol: Path = PROTOCOL) -> bool:
    """Run, kill, go on, print; whether all figures are reached."""
    alone = Folder(where / "alone", protocol)
    alone.finish()
    expected, cells = alone.outcome(), len(alone.records())
    ids = next(iter(alone.records().values()))["outcomes"]["ids"]
    length, tail = alone.seconds[0], _tail(alone)
    print(f"left alone: {length:.1f} s of work, {cells} cells; the tables take {tail:.2f} s", flush=True)
    done, again, differ = 0, 0, 0
    phases: Counter[str] = Counter()
    all_folders = [alone]
    for number, gaps in enumerate(moments(kills - folders, folders, length, rng)):
        folder = Folder(where / f"killed-{number}", protocol, "always" if number % 2 else "never")
        all_folders.append(folder)
        # the last kill of a folder hits the tables: what is done is done, so that it may be tried until it hits
        for gap in (*gaps, None):
            for tries in range(TRIES):
                before = ({*folder.trained(), *folder.records()}, folder.states())
                # a moment that came too late, because this run was faster than the one left alone, hits the tables too
                if gap is None or tries:
                    hit = folder.kill_at_tables(cells, rng.random() * tail)
                else:
                    hit = folder.kill(gap)
                again += repeated(folder.events[-1], *before, ids)
                if hit:
                    done += 1
                    phases[folder.phase(cells)] += 1
                    break
        before = ({*folder.trained(), *folder.records()}, folder.states())
        folder.finish()
        again += repeated(folder.events[-1], *before, ids)
        found = folder.outcome()
        odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        differ += bool(odd)
        left = [path.name for path in folder.results.glob(".journals/*")]
        told = f"differ: {', '.join(odd)}" if odd else "everything equal"
        print(f"folder {number}: {len(gaps) + 1} kills, {told}; journals left: {len(left)}", flush=True)
    journals = [event["journal"] for one in all_folders for part in one.events for event in part if "journal" in event]
    worked = sum(sum(one.seconds) for one in all_folders)
    share = sum(journals) / worked
    hit_in = ", ".join(f"{count} in {phase}" for phase, count in sorted(phases.items()))
    print(f"{len(journals)} states written in {sum(journals):.2f} s of {worked:.0f} s of work")
    print(
        f"{done} of {kills} kills ({hit_in}): tables, records and weights "
        f"{'identical' if not differ else f'differ in {differ} folders'}; {again} kept batches done again; "
        f"journals took {100 * share:.2f} % of the time"
    )
    return done == kills and not differ and not again and share < SHARE


def _tail(folder: Folder) -> float:
    """Seconds from the last record to the end."""
    newest = max(path.stat().st_mtime for path in folder.results.glob("records/*/*/*.json"))
    tables = max(path.stat().st_mtime for path in folder.results.glob("tables/*"))
    return float(tables - newest)


if __name__ == "__main__":
    main()

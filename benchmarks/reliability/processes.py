"""Eight commands on one results folder: is every training and every cell done exactly once?

    python benchmarks/reliability/processes.py [--quick] [--processes 8] [--cells 200] [--locks working off]

The work counts itself: a plug-in writes a line for every training and every attack that is begun. With `--locks off`
each process takes itself for a machine of its own, and is granted every lock, as by a network file system whose locks
do not reach other machines: leases alone keep the commands apart.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PLUGIN = '''
"""Notes in a file every training and every attack that is begun (nobody; nowhere, 2020)."""

import hashlib
import os
import pathlib
import time
from dataclasses import dataclass

import torch

import ensdef
from ensdef.losses import member_cross_entropy

EVENTS = pathlib.Path(__file__).with_name("events")


def note(*words):
    with EVENTS.open("a") as file:  # one write, appended whole
        file.write(" ".join(map(str, words)) + "\\n")


@ensdef.register_defense("noting")
class Noting(ensdef.EnsembleDefense):
    """Plain cross-entropy."""

    def warm_start(self, prerequisites):
        note("train", torch.initial_seed(), os.getpid())

    def loss(self, batch, progress):
        return {"ce": member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1).sum()}


@ensdef.register_attack("noting")
class NotingAttack(ensdef.IterativeAttack):
    """Leaves every image as it is."""

    @dataclass(frozen=True)
    class Params:
        number: int = 0

    steps = 1

    def start(self, target, x, y, threat, rng):
        scores = target(torch.full_like(x[:1], 0.5)).detach().numpy().tobytes()
        note("attack", hashlib.sha256(scores).hexdigest()[:16], self.params.number, os.getpid())
        time.sleep(0.2)
        return {}

    def step(self, target, x_adv, y, state, threat, rng):
        return x_adv.detach().clone(), state
'''
#: Small enough to take a moment, learned enough that some images are attacked.
SMALL = ["--arch", "small_resnet[width=4]", "--members", "1", "--epochs", "5", "--limit", "300", "--samples", "10"]
#: Attacks on one training.
EACH = 50


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 processes, 20 cells")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--cells", type=int)
    parser.add_argument("--locks", nargs="+", choices=["working", "off"], default=["working", "off"])
    options = parser.parse_args(words)
    processes = options.processes or (3 if options.quick else 8)
    cells = options.cells or (20 if options.quick else 200)
    missed = [told for locks in options.locks if (told := _shared(processes, cells, locks))]
    for told in missed:
        print(told)
    return 1 if missed else 0


def _shared(processes: int, cells: int, locks: str) -> str:
    """Run the commands, print what they did; returns what is wrong with it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "noting.py").write_text(PLUGIN, encoding="utf-8")
        seeds = range(-(-cells // EACH))
        numbers = range(-(-cells // len(seeds)))
        bench = [
            *("bench", "--plugin", os.fspath(folder / "noting.py"), "--isolate", "never", "--method", "noting"),
            *("--attack", ",".join(f"noting[number={number}]" for number in numbers)),
            *("--seed", ",".join(map(str, seeds)), *SMALL, "--device", "cpu", "--results", os.fspath(folder / "r")),
        ]
        here = [sys.executable, os.fspath(Path(__file__).resolve())]
        running = [
            subprocess.Popen(
                [*here, "--as-command", locks, os.fspath(folder / f"ready-{index}"), os.fspath(folder / "go"), *bench],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(processes)
        ]
        while not all((folder / f"ready-{index}").exists() for index in range(processes)):
            if any(process.poll() is not None for process in running):
                break
            time.sleep(0.05)
        began = time.monotonic()
        (folder / "go").touch()
        errors = [process.communicate()[1] for process in running]
        seconds = time.monotonic() - began
        failed = [error for process, error in zip(running, errors, strict=True) if process.returncode]
        if failed:
            return f"locks {locks}: {len(failed)} of {processes} commands failed, the first with: {failed[0][-2000:]}"
        return judged(folder, len(seeds), len(seeds) * len(numbers), processes, locks, seconds)


def judged(folder: Path, trainings: int, cells: int, processes: int, locks: str, seconds: float) -> str:
    """Print the counts of events and table rows in the folder; returns what is wrong with them."""
    events = [line.split() for line in (folder / "events").read_text(encoding="utf-8").splitlines()]
    done = Counter(tuple(words[:-1]) for words in events)
    once = [sum(count == 1 for work, count in done.items() if work[0] == kind) for kind in ("train", "attack")]
    repeated = sum(count - 1 for count in done.values())
    with (folder / "r" / "tables" / "bench.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["robust_accuracy"]]
    workers = len({words[-1] for words in events})
    print(
        f"locks {locks}: {once[1]} of {cells} cells and {once[0]} of {trainings} trainings exactly once, {repeated} "
        f"repeated, {len(rows)} of {cells} rows in the table; by {workers} of {processes} processes, {seconds:.0f} s"
    )
    complete = once == [trainings, cells] and not repeated and len(rows) == cells
    return "" if complete else f"locks {locks}: not every cell exactly once"


def as_command(locks: str, ready: str, go: str, *words: str) -> None:
    """What each process does: load, wait until all have, and be the command line."""
    import torch

    import ensdef.claims
    import ensdef.runner
    from ensdef.cli import main as command_line

    torch.set_num_threads(1)
    if locks == "off":
        import fcntl

        fcntl.flock = lambda *args: None
        ensdef.claims.this_host = lambda: f"machine {os.getpid()}"
        ensdef.leases.this_host = ensdef.claims.this_host
    Path(ready).touch()
    while not Path(go).exists():
        time.sleep(0.01)
    sys.argv = ["ensdef", *words]
    command_line()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-command"]:
        as_command(*sys.argv[2:])
    else:
        sys.exit(main())

"""2,000 hostile inputs made by hypothesis: command lines, protocols, records, measurements, manifests and checkpoints.

    python benchmarks/reliability/fuzz.py
    python benchmarks/reliability/fuzz.py --quick

Each is handed to a command that reads and trains nothing, in this process. Counted as a failure: a traceback; an exit
status other than 0, 1 and 2; status 0 on what is known to be nonsense; a file outside the results folder that was
opened for writing, renamed, removed or changed; a program that was started. Of `--dry-run` the probes are left out: all
reading comes before them. The same seed makes the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from hostile import Input
from hostile_files import bytes_changed, json_changed
from hostile_orders import READING, command_line, protocol
from victims import Victims, make_victims

# a script beside this one has the name of a package that others import
sys.path[:] = [folder for folder in sys.path if folder != str(Path(__file__).parent)]

Made = Callable[[Any, Victims], Input]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 inputs in place of 2,000.")
    parser.add_argument("--inputs", type=int, default=2000, help="How many.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ensdef-fuzz-") as name:
        tried, failures = fuzz(Path(name), 100 if options.quick else options.inputs, options.seed)
    for failure in failures[:20]:
        print(failure, "\n")
    total = sum(tried.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in tried.items())
    print(
        f"{total - len(failures)} of {total} hostile inputs ({kinds}): refused or harmless; "
        f"{len(failures)} failures; {time.perf_counter() - began:.0f} s"
    )
    sys.exit(1 if failures else 0)


#: How to make inputs of each kind, and how many of a hundred.
KINDS: dict[str, tuple[int, Made]] = {
    "command lines": (25, command_line),
    "protocols": (25, protocol),
    "records": (20, lambda draw, victims: json_changed(draw, victims, "record")),
    "measurements": (8, lambda draw, victims: json_changed(draw, victims, "measurement")),
    "manifests": (7, lambda draw, victims: json_changed(draw, victims, "manifest")),
    "checkpoints": (10, lambda draw, victims: json_changed(draw, victims, "checkpoint")),
    "weights and pickles": (5, bytes_changed),
}


def fuzz(guarded: Path, count: int, number: int) -> tuple[Counter[str], list[str]]:
    """Try about ``count`` inputs in an empty folder; how many of each kind, and what went wrong."""
    victims = make_victims(guarded)
    tried: Counter[str] = Counter()
    failures: list[str] = []

    def trials(kind: str, make: Made, examples: int) -> Callable[[], None]:
        @seed(number)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def one(data: Any) -> None:
            made = make(data.draw, victims)
            tried[kind] += 1
            if told := attempt(made, watch):
                failures.append(f"{kind}: {told}\n  {made}")

        return one

    with cells_alone():
        # what libraries start, and put into their own folders, when they are first used is not ours
        for library in ("foolbox", "torchattacks"):
            with contextlib.suppress(ImportError):
                importlib.import_module(library)
        for arguments in READING:
            Input(victims.folder, list(arguments)).run_in_place()
        shutil.rmtree(victims.results / "imported")
        watch = Watch(guarded, victims.results)
        for kind, (percent, make) in KINDS.items():
            trials(kind, make, count * percent // 100)()
    return tried, failures


def cells_alone() -> contextlib.AbstractContextManager[object]:
    """Have dry runs count their cells and leave out the probes of real work, which take seconds each."""
    return mock.patch("ensdef.cli.run._print_plan", lambda cells, where, options: print(len(cells)))


def attempt(made: Input, watch: Watch) -> str:
    """What went wrong with one input, in lines; empty if nothing did."""
    with made.in_place(), watch:
        status, told = made.run()
    if told:
        return told
    if status not in (0, 1, 2):
        return f"exit status {status}"
    if status == 0 and made.nonsense:
        return f"exit status 0 on nonsense ({made.nonsense})"
    return watch.seen()


class Watch:
    """Notices files outside the results folder that are touched while it is entered, and programs that are started."""

    def __init__(self, guarded: Path, results: Path) -> None:
        self.guarded, self.results = guarded, results.resolve()
        self.active = False
        self.touched: list[str] = []
        self.before = self.snapshot()
        sys.addaudithook(self.audit)

    def __enter__(self) -> None:
        self.bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        self.active, self.touched = True, []

    def __exit__(self, *_: object) -> None:
        self.active, sys.dont_write_bytecode = False, self.bytecode

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by the interpreter before it opens, renames, removes or starts anything."""
        if not self.active:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
                self.check(event, path)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self.check(event, arguments[1])
        elif event in ("os.remove", "os.rmdir", "os.truncate", "os.chmod") or (
            event == "os.mkdir" and not os.path.exists(arguments[0])
        ):
            self.check(event, arguments[0])
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            self.touched.append(f"{event} {str(arguments)[:100]}")

    def check(self, event: str, path: Any) -> None:
        if isinstance(path, int) or str(path) == os.devnull:
            return
        with contextlib.suppress(OSError, ValueError, TypeError):
            if not Path(os.fsdecode(path)).resolve().is_relative_to(self.results):
                self.touched.append(f"{event} {path}")

    def snapshot(self) -> dict[str, str]:
        """Files outside the results folder, with what they hold."""
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(self.guarded.rglob("*"))
            if not path.resolve().is_relative_to(self.results)
        }

    def seen(self) -> str:
        """What was touched, in lines; empty if nothing was."""
        now = self.snapshot()
        changed = sorted(name for name in {*now, *self.before} if now.get(name) != self.before.get(name))
        told = list(dict.fromkeys([*self.touched, *changed]))
        return "\n  ".join(["outside the results folder:", *told[:5]]) if told else ""


if __name__ == "__main__":
    main()

"""Whole commands, as a user waits for them: from nothing, from the cache, and those that must not load torch.

python benchmarks/speed/commands.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

GOALS = {"bench": 90.0, "bench, cached": 10.0, "list methods": 2.0, "table bench": 2.0, "--help": 2.0}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = str(Path(folder) / "results")
        bench = ["bench", "--method", "soe", "--attack", "pgd", "--results", results]
        commands = {
            "bench": bench,
            "bench, cached": bench,
            "list methods": ["list", "methods"],
            "table bench": ["table", "bench", "--results", results],
            "--help": ["--help"],
        }
        rows = []
        for name, arguments in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "ensdef", *arguments], check=True, capture_output=True)
            rows.append((name, f"{time.perf_counter() - began:.2f}", f"{GOALS[name]:.0f}"))
        print(tabulate(rows, headers=["command", "seconds", "goal"], tablefmt="github"))


if __name__ == "__main__":
    main()

"""What `--dry-run` estimates against what then happens.

For each command below: its dry run, then the command itself in an empty results folder, both as a user calls them.
Columns: the whole command by the clock (start-up included), then by themselves trainings (the seconds that checkpoints
carry), attacks (those of the records) and the passes of the attacks. A ratio is estimated over actual.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

SMALL = "--epochs 3 --device cpu"
#: Commands, and what is done before, untimed: their defences are trained then, and their survivors are measured.
COMMANDS = [
    ("", f"bench --method adv_en --attack pgd {SMALL}"),
    ("", "bench --method adv_en --attack pgd --epochs 10 --device cpu"),
    ("", f"bench --method soe --attack pgd[steps=50,restarts=5] --samples 200 {SMALL}"),
    ("", f"bench --method nat --attack square[queries=500] --samples 200 {SMALL}"),
    ("", f"bench --method adv_en --attack autoattack --samples 50 {SMALL}"),
    ("", f"bench --method dverge,igat --attack mim {SMALL}"),
    ("", f"bench --method adv_en --attack adaptive,transfer3 --samples 50 {SMALL}"),
    (
        f"bench --method adv_en,soe --attack fgsm {SMALL}",
        f"bench --method adv_en,soe --attack pgd[restarts=3],square[queries=1000],adaptive --samples 100 {SMALL}",
    ),
    ("", "run ci --device cpu"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="Commands that contain this text.")
    options = parser.parse_args()
    rows = []
    for before, command in COMMANDS:
        if options.only is None or options.only in command:
            rows.append(compared(before, command))
            print(tabulate(rows[-1:], headers="keys", disable_numparse=True), flush=True)
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def compared(before: str, command: str) -> dict[str, str]:
    """One command, estimated and run."""
    with tempfile.TemporaryDirectory() as folder:
        if before:
            called(before, folder)
        estimated, probed = called(f"{command} --dry-run", folder)
        records, actual = called(command, folder)
        cells = estimated["cells"]
        specs = [json.loads(path.read_text()) for path in Path(folder).glob("checkpoints/*/spec.json")]
    if estimated["unknown"]:
        raise SystemExit(f"{command}: {[one['reason'] for one in cells if one['reason']]}")
    trained = sum(spec["report"]["seconds"] for spec in specs)
    attacked = sum(record["seconds"] for record in records)
    passes = sum((record["forwards"] + record["backwards"]) * record["n"] for record in records)
    return {
        "command": command + (" (trained before)" if before else ""),
        "dry run s": f"{probed:.0f}",
        "estimated s": f"{estimated['seconds']:.1f}",
        "actual s": f"{actual:.1f}",
        "ratio": f"{estimated['seconds'] / actual:.2f}",
        "trainings": "" if before else ratio(sum(one["seconds"] for one in estimated["trainings"]), trained),
        "attacks": ratio(sum(one["seconds"] for one in cells), attacked),
        "passes": ratio(sum(one["forwards"] + one["backwards"] for one in cells), passes),
    }


def ratio(estimated: float, actual: float) -> str:
    return f"{estimated / actual:.2f}"


def called(command: str, results: str) -> tuple[Any, float]:
    """What a command prints as JSON, and its seconds by the clock."""
    words = [sys.executable, "-m", "ensdef", *command.split(), "--results", results, "--json"]
    began = time.perf_counter()
    finished = subprocess.run(words, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if finished.returncode:
        raise SystemExit(f"{command} failed:\n{finished.stderr}")
    return json.loads(finished.stdout), seconds


if __name__ == "__main__":
    main()

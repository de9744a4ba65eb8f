"""How far the papers' tables replicate: cells answered, and pairs of rows in the paper's order, table by table.

python benchmarks/replication.py results/published
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from ensdef.manifests import Manifests
from ensdef.papers.comparison import compare
from ensdef.papers.orderings import orderings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of results")
    options = parser.parse_args()
    manifests = Manifests(options.results)
    rows = []
    for name in manifests.names():
        if manifests.kind(name) != "paper":
            continue
        comparison = compare(name, options.results)
        found = orderings(comparison.entries)
        answered = sum(entry.ours is not None for entry in comparison.entries)
        rows.append(
            [
                *(comparison.title, comparison.scale, len(comparison.entries), answered),
                *(found.pairs, found.same, found.opposite, found.undecided),
            ]
        )
    heads = ["table", "scale", "cells", "answered", "pairs of rows", "same order", "opposite", "not told apart"]
    print(tabulate(rows, heads, tablefmt="github"))


if __name__ == "__main__":
    main()

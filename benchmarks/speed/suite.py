"""Every speed claim in one run: the tables that `make speed` and `make speed-full` print.

    python benchmarks/speed/suite.py --size small [--data-dir DIR] [--checkpoint FOLDER]

Attacks against the libraries that have them, training steps against plain loops, growth over a decade, distance to the
limit. Scores and robust accuracies are explained in the scripts of each part, which can be run alone at other sizes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from comparison import Row, table, table_of
from library_attacks import attack
from limits import arithmetic, passes
from machine import machine
from pgd_restarts import pgd
from scaling import memory_growth, time_growth
from subject import WARM_UP, Subject, add_arguments, chosen
from training import measure


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        pgd: images for PGD with restarts and for the other gradient attacks.
        steps, restarts: of PGD.
        autoattack, queried: images for AutoAttack; for Square, SPSA and DeepFool.
        queries, spsa_steps: of Square and SPSA, on both sides.
        modes: searches of all attacks but PGD with restarts, which has all three.
        architecture, batch_size, rounds: of the training steps.
        memory: largest number of images for the peak of memory.
        warm_up: seconds.
    """

    pgd: int
    autoattack: int
    queried: int
    queries: int
    spsa_steps: int
    modes: Sequence[str]
    batch_size: int
    rounds: int
    memory: int
    steps: int = 50
    restarts: int = 5
    architecture: str = "resnet8"
    warm_up: float = WARM_UP


SIZES = {
    "small": Sizes(128, 24, 24, 1000, 10, ("fp32", "bf16"), 32, 2, 2000),
    "full": Sizes(512, 48, 48, 5000, 50, ("fp32", "bf16"), 64, 3, 10_000),
}
GRADIENT_ATTACKS = ("bim", "mim", "cw", "mul_pgd")
STEPS_CLAIMED = ("soe", "cce", "dverge[adversarial=true]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    options = parser.parse_args()
    sizes = SIZES[options.size]
    subject = chosen(options, sizes.pgd)
    began = time.perf_counter()
    for part in report(subject, sizes):
        print(part, "\n", flush=True)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes in all")


def report(subject: Subject, sizes: Sizes) -> Iterator[str]:
    """Paragraphs and tables, each as soon as it is measured."""
    yield heading(subject, sizes)
    subject.warm_up(sizes.warm_up)
    restarts = pgd(subject, sizes.steps, sizes.restarts)
    yield table(restarts.rows)
    for part in attack_parts(subject, sizes):
        yield table(part)
    for times in measure(STEPS_CLAIMED, sizes.architecture, sizes.batch_size, sizes.rounds, sizes.warm_up):
        yield table(times.rows())
    yield table_of(time_growth(sizes.architecture, sizes.rounds))
    yield table_of(memory_growth(sizes.architecture, sizes.memory))
    yield table_of(arithmetic(subject))
    yield table_of(passes(subject, restarts.answers, sizes.steps, sizes.restarts))


def attack_parts(subject: Subject, sizes: Sizes) -> Iterator[list[Row]]:
    """The rows of every attack but PGD with restarts."""
    yield attack(subject.first(sizes.autoattack), "autoattack", sizes.modes).rows
    for floor in (False, True):
        for name in GRADIENT_ATTACKS:
            yield attack(subject, name, sizes.modes, floor=floor).rows
    queried = subject.first(sizes.queried)
    yield attack(queried, "square", sizes.modes, queries=sizes.queries).rows
    yield attack(queried, "spsa", sizes.modes, steps=sizes.spsa_steps).rows
    yield attack(queried, "deepfool", sizes.modes).rows


def heading(subject: Subject, sizes: Sizes) -> str:
    """The machine, the model and the sizes."""
    return (
        f"{machine()}; {subject}. The first {sizes.autoattack} images for AutoAttack, the first {sizes.queried} for "
        f"Square ({sizes.queries} queries), SPSA ({sizes.spsa_steps} steps) and DeepFool; training steps of three "
        f"{sizes.architecture} on batches of {sizes.batch_size}. Libraries are judged on the last iterate, "
        "ours on any; nothing is compiled."
    )


if __name__ == "__main__":
    main()

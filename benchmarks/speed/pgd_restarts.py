"""PGD with restarts on one ensemble: torchattacks, twice, against ensdef.

    python benchmarks/speed/pgd_restarts.py --checkpoint results/checkpoints/adv_en-... --data-dir DIR --samples 512

Baselines: `loop` runs torchattacks' PGD `restarts` times on all images and combines the worst case; `MultiAttack` is
what its documentation recommends, which drops fooled images between restarts. Both judge the last iterate of a run
(`last`) on the module as `load_checkpoint` gives it; ours judges every iterate (`any`), which can only find more.
All robust accuracies are recounted by one fresh pass of the untouched module in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torchattacks
from comparison import Comparison, compare, library, searches, table
from machine import machine
from subject import Subject, add_arguments, chosen
from torch import Tensor, nn

MODES = ("fp32", "bf16", "bf16+fp32")
MULTI, LOOP = "MultiAttack", "plain loop"
AIMS = {MULTI: {"fp32": 2.3, "bf16": 4.0}, LOOP: {"fp32": 4.2, "bf16": 7.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, samples=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--skip-loop", action="store_true", help="leave the slowest baseline out")
    options = parser.parse_args()
    subject = chosen(options)
    subject.warm_up()
    print(f"{machine()}; {subject}\n", flush=True)
    print(table(pgd(subject, options.steps, options.restarts, loop=not options.skip_loop).rows))


def pgd(
    subject: Subject, steps: int = 50, restarts: int = 5, modes: Sequence[str] = MODES, loop: bool = True
) -> Comparison:
    """torchattacks in a loop and as its documentation has it, both on all images, and our search modes."""

    def once(model: nn.Module, eps: float) -> torchattacks.PGD:
        return torchattacks.PGD(model, eps=eps, alpha=eps / 5, steps=steps, random_start=True)

    def plain_loop(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        return [once(model, eps)(x, y) for _ in range(restarts)]

    def multi_attack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
        return [torchattacks.MultiAttack([once(model, eps) for _ in range(restarts)])(x, y)]

    libraries = {MULTI: library(subject, multi_attack, "linf", right_only=False)}
    if loop:
        libraries[LOOP] = library(subject, plain_loop, "linf", right_only=False)
    ours = searches(subject, "pgd", "linf", modes, steps=steps, restarts=restarts)
    watched = searches(subject, "pgd", "linf", ["fp32"], health="basic", steps=steps, restarts=restarts)
    return compare(f"pgd {steps} x {restarts}", libraries, {**ours, "fp32 + health": watched["fp32"]}, AIMS)


if __name__ == "__main__":
    main()

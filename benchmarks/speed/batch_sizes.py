"""What an image costs in batches of different sizes: why attacks take 128 rows a pass on a CPU.

    python benchmarks/speed/batch_sizes.py [--checkpoint FOLDER] [--data-dir DIR] [--steps 10]

Milliseconds for one step of a gradient attack (a forward and a backward to the image), an image.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from comparison import table_of
from machine import machine
from subject import Subject, add_arguments, chosen

from ensdef.losses import margin
from ensdef.target import Target

SIZES = (1, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, samples=max(SIZES))
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    subject = chosen(options)
    subject.warm_up()
    print(f"{machine()}; {subject}\n")
    print(table_of(costs(subject, options.steps)))


def costs(subject: Subject, steps: int) -> list[dict[str, str]]:
    """A row a batch size, a column a search mode."""
    targets = {mode: Target(subject.model, precision=mode) for mode in ("fp32", "bf16")}
    rows = []
    for size in SIZES:
        x = subject.x[torch.arange(size) % len(subject)].contiguous(memory_format=torch.channels_last)
        y = subject.y[torch.arange(size) % len(subject)]
        rows.append(
            {"rows": str(size), **{mode: f"{_milliseconds(targets[mode], x, y, steps):.2f}" for mode in targets}}
        )
    return rows


def _milliseconds(target: Target, x: torch.Tensor, y: torch.Tensor, steps: int) -> float:
    seconds = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        point = x.detach().requires_grad_()
        torch.autograd.grad(margin(target(point), y).sum(), point)
        target.forget()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[2:]) / len(x)


if __name__ == "__main__":
    main()

"""How cost grows: time over a decade of samples, members and steps, and peak memory over a decade of samples.

    python benchmarks/speed/scaling.py [--arch resnet8] [--samples 5000]

PGD with one restart on untrained networks and random images, labelled as the model answers, at a radius so small that
every image survives: nothing but the size changes. `slope` is that of log time over log size by least squares: 1 is
linear, less where something is paid once. Memory is the resident high-water mark of a fresh process less what it held
before the attack, data set included; `adversarial images` is the answer, as large as the data set.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch
from comparison import table_of
from machine import machine
from torch import Tensor

import ensdef
from ensdef.attack_spec import AttackSpec
from ensdef.harness import attack_model
from ensdef.planner.stopwatch import Stopwatch

CLASSES, SHAPE, MEMBERS = 10, (3, 32, 32), 3
BATCH, STEPS, DECADE, ROUNDS = 32, 5, (1.0, math.sqrt(10), 10.0), 3
MEGABYTE = 2**20


@dataclass(frozen=True)
class Load:
    """The size of one attack."""

    samples: int = BATCH
    members: int = MEMBERS
    steps: int = STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument("--samples", type=int, default=5000, help="largest number of images for the peak of memory")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(memory_of(options.arch, options.memory_of)))
        return
    print(f"{machine()}; {options.arch}\n", flush=True)
    print(table_of(time_growth(options.arch)), "\n", flush=True)
    print(table_of(memory_growth(options.arch, options.samples)))


def time_growth(arch: str, rounds: int = ROUNDS) -> list[dict[str, str]]:
    """A row for samples, members and steps each: seconds over a decade, and their slope."""
    axes = {
        "samples": [Load(samples=round(BATCH * factor)) for factor in DECADE],
        "members": [Load(members=round(factor)) for factor in DECADE],
        "steps": [Load(steps=round(2 * STEPS * factor)) for factor in DECADE],
    }
    rows = []
    for axis, loads in axes.items():
        sizes = [getattr(load, axis) for load in loads]
        taken: list[list[float]] = [[] for _ in loads]
        for _ in range(rounds):
            for load, seconds in zip(loads, taken, strict=True):
                seconds.append(seconds_of(arch, load))
        middle = [median(seconds) for seconds in taken]
        rows.append(
            {
                "grows": axis,
                "sizes": ", ".join(map(str, sizes)),
                "seconds": ", ".join(f"{seconds:.2f}" for seconds in middle),
                "slope": f"{slope(sizes, middle):.2f}",
            }
        )
    return rows


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log value over log size, by least squares."""
    across, up = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle, height = mean(across), mean(up)
    return sum((a - middle) * (b - height) for a, b in zip(across, up, strict=True)) / sum(
        (a - middle) ** 2 for a in across
    )


def seconds_of(arch: str, load: Load) -> float:
    """Seconds of one attack that no image falls to."""
    model, x, y = untrained(arch, load)
    began = time.perf_counter()
    attacked(model, x, y, load.steps, BATCH)
    return time.perf_counter() - began


def untrained(arch: str, load: Load) -> tuple[ensdef.EnsembleDefense, Tensor, Tensor]:
    """Networks, random images, and the answers of the networks as labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ensdef.create_defense(
            "nat", architecture=arch, members=load.members, num_classes=CLASSES, image_shape=SHAPE
        ).eval()
        x = torch.rand(load.samples, *SHAPE)
    with torch.no_grad():
        y = torch.cat([model(part).argmax(dim=1) for part in x.split(BATCH)])
    return model, x, y


def attacked(model: torch.nn.Module, x: Tensor, y: Tensor, steps: int, batch_size: int) -> None:
    """PGD at a radius that nobody notices."""
    spec = AttackSpec.create("pgd", {"steps": steps}, "linf", "1e-6")
    outcome = attack_model(model, x, y, spec, batch_size=batch_size, health="off")
    lost = int((~outcome.robust).sum())
    assert lost <= len(x) // 100, f"{lost} of {len(x)} images fell: sizes would not tell the cost"


def memory_growth(arch: str, samples: int) -> list[dict[str, str]]:
    """A row for a tenth of the samples and for all: megabytes, each measured in a process of its own."""
    rows = []
    for count in (samples // 10, samples):
        peak = memory_of_a_process(arch, count)
        images = count * math.prod(SHAPE) * 4 / MEGABYTE
        rows.append(
            {
                "samples": str(count),
                "data set MB": f"{images:.0f}",
                "peak beyond it MB": f"{peak:.0f}",
                "adversarial images MB": f"{images:.0f}",
                "the rest MB": f"{peak - images:.0f}",
            }
        )
    return rows


def memory_of_a_process(arch: str, samples: int) -> float:
    """:func:`memory_of` in a process that does nothing else."""
    command = [sys.executable, __file__, "--arch", arch, "--memory-of", str(samples)]
    return float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def memory_of(arch: str, samples: int) -> float:
    """Megabytes by which an attack raises the high-water mark of this process above what it holds before."""
    model, x, y = untrained(arch, Load(samples=samples))
    watch = Stopwatch()
    watch.begin_peak()
    before = watch.peak()
    attacked(model, x, y, 2, 128)
    return (watch.peak() - before) / MEGABYTE


if __name__ == "__main__":
    main()

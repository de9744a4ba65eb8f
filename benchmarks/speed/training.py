"""One training step of every adversarial defence: ensdef against plain loops, and against what its passes must cost.

    python benchmarks/speed/training.py [--methods soe,cce] [--batch-size 64] [--rounds 3]

Three members of a CIFAR-size ResNet, PGD-10 at 8/255, random images (time does not depend on what they show), one
process, the runs taken in turns. Columns:

- `plain s`: a step written as the released codes write it (`plain_loops.py`), fp32, batch norm in train mode;
- `train x`: plain over ours with attacks in train mode too (the same arithmetic);
- `eval x`: plain over ours as it trains by default, attacking folded eval-mode copies;
- `bf16 x`: plain over that in `--precision bf16`, where the CPU has instructions for it;
- `of bound`: our default step over the sum of (number of passes x measured time of such a pass), the four kinds of pass
  counted by `ensdef list methods --cost`: 1.0 would mean that nothing but the networks costs time;
- `spread`: the slowest over the fastest of our rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from comparison import Row
from machine import machine, multiplies_bf16
from plain_loops import STEPS, setup_for
from tabulate import tabulate
from torch import Tensor, nn

from ensdef.build import build_defense
from ensdef.cost import count_passes
from ensdef.data import Data, Split
from ensdef.folding import FoldedCopy
from ensdef.notation import parse_call, split_list
from ensdef.progress import Advance, Progress
from ensdef.registry import METHODS
from ensdef.specs import DataSpec, ModelSpec, Precision, Setting, TrainSpec
from ensdef.training import train

CLASSES, SHAPE, MEMBERS, K = 10, (3, 32, 32), 3, 10
#: Seconds.
WARM_UP = 5.0


#: Our step: batch norm of the attacked networks, precision, times faster than the plain loop that we aim at.
OURS: dict[str, tuple[str, Precision, float | None]] = {
    "attacks in train mode": ("train", "fp32", 1.6),
    "attacks on folded copies": ("eval", "fp32", 2.2),
    "attacks on folded copies, bf16": ("eval", "bf16", None),
}


class Stopwatch(Progress):
    """Notes when every batch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        yield lambda amount=1, note="": self.ends.append(time.perf_counter())


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step, medians.

    Args:
        plain: of the plain loop.
        ours: by the name of :data:`OURS`; None: not on this machine.
        bound: what the passes of our default step cost by themselves.
        spread: the slowest over the fastest of our default steps.
    """

    method: str
    plain: float
    ours: dict[str, float | None]
    bound: float
    spread: float

    def cells(self) -> dict[str, str]:
        """By column of this script's table."""
        faster = [None if seconds is None else self.plain / seconds for seconds in self.ours.values()]
        default = self.ours["attacks on folded copies"]
        assert default is not None
        return {
            "method": self.method,
            "plain s": f"{self.plain:.2f}",
            **{
                name: "n/a" if value is None else f"{value:.2f}"
                for name, value in zip(("train x", "eval x", "bf16 x"), faster, strict=True)
            },
            "of bound": f"{default / self.bound:.2f}",
            "spread": f"{self.spread:.2f}",
        }

    def rows(self) -> list[Row]:
        """Lines of the table of claims."""
        what = f"training step of {self.method}"
        against = "plain loop, train mode"
        rows = [Row(what, against, seconds=self.plain)]
        for name, seconds in self.ours.items():
            faster = None if seconds is None else self.plain / seconds
            rows.append(Row(what, f"ensdef, {name}", None, None, seconds, against, faster, OURS[name][2]))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(STEPS))
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}; {options.arch}, batches of {options.batch_size}\n", flush=True)
    rows = []
    for times in measure(split_list(options.methods), options.arch, options.batch_size, options.rounds):
        rows.append(times.cells())
        print(tabulate(rows[-1:], headers="keys", disable_numparse=True), flush=True)
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def measure(
    methods: Sequence[str], arch: str, batch_size: int, rounds: int, warm_up: float = WARM_UP
) -> Iterator[StepTimes]:
    """Steps of each method, the plain loop and ours in turns."""
    passes_of_one_member = passes_to_time(arch, batch_size)
    began = time.perf_counter()
    while time.perf_counter() - began < warm_up:  # a fresh process is two to three times slower at first
        for run in passes_of_one_member.values():
            run()
    usable = {name: how for name, how in OURS.items() if how[1] == "fp32" or multiplies_bf16()}
    for method in methods:
        taken: dict[str, list[float]] = {name: [] for name in ("plain", *usable, *passes_of_one_member)}
        for _ in range(rounds):
            for kind, run in passes_of_one_member.items():
                taken[kind] += [seconds_of(run) for _ in range(5)]
            taken["plain"].append(plain_step(method, arch, batch_size))
            for name, (mode, precision, _) in usable.items():
                taken[name].append(our_step(method, arch, batch_size, mode, precision))
        middle = {name: median(values) for name, values in taken.items()}
        passes = count_passes(method, MEMBERS, K)
        bound = sum(getattr(passes, kind) * middle[kind] for kind in passes_of_one_member)
        default = taken["attacks on folded copies"]
        ours = {name: middle.get(name) for name in OURS}
        yield StepTimes(method, middle["plain"], ours, bound, max(default) / min(default))


def specification(
    method: str, arch: str, batch_size: int, mode: str, precision: Precision = "fp32"
) -> tuple[TrainSpec, Data]:
    """A training of three batches of random images, and the images."""
    name, hyper = parse_call(method)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3 * batch_size, *SHAPE), generator=rng).to(torch.uint8)
    split = Split(pixels, torch.arange(len(pixels)) % CLASSES)
    data = Data("cifar10", split, split, tuple("abcdefghij"))
    spec = DataSpec("cifar10", None, None, None, split.checksum(), split.checksum(), SHAPE, CLASSES, (0.5,), (0.25,))
    attack = {"steps": K, "step_size": "eps/4", "batch_norm": mode}
    recipe = {
        "optimizer": "sgd",
        "lr": 1e-3,
        "epochs": 1,
        "batch_size": batch_size,
        "augment": "none",
        "attack": attack,
    }
    return TrainSpec.create(name, hyper, Setting(spec, arch, MEMBERS, "linf", "8/255", recipe, precision)), data


def our_step(method: str, arch: str, batch_size: int, mode: str, precision: Precision = "fp32") -> float:
    """Seconds of the second and third batch of a real training, their mean."""
    spec, data = specification(method, arch, batch_size, mode, precision)
    prerequisites = {role: build_defense(needed.model) for role, needed in spec.prerequisites.items()}
    watch = Stopwatch()
    train(spec, data, prerequisites, device="cpu", progress=watch)
    return (watch.ends[2] - watch.ends[0]) / 2


def plain_step(method: str, arch: str, batch_size: int) -> float:
    """Seconds of the second plain step."""
    name, _ = parse_call(method)
    count = specification(method, arch, batch_size, "eval")[0].model.members

    def network(outputs: int = CLASSES) -> nn.Module:
        params = dict(METHODS.get(name).network_params(METHODS.get(name).Hyper()))
        call = arch + "".join(f"[{key}={value}]" for key, value in params.items())
        spec = ModelSpec.create("nat", {}, call, 1, outputs, SHAPE, (0.5,), (0.25,))
        member: nn.Module = build_defense(spec).members[0]
        return member.train()

    setup = setup_for(name, [network() for _ in range(count)], network)
    x, y = torch.rand(batch_size, *SHAPE), torch.arange(batch_size) % CLASSES
    STEPS[method](setup, x, y)
    began = time.perf_counter()
    STEPS[method](setup, x, y)
    return time.perf_counter() - began


def passes_to_time(arch: str, batch_size: int) -> dict[str, Callable[[], None]]:
    """One pass of one member over one batch, by kind, in the layouts that training uses."""
    spec = ModelSpec.create("nat", {}, arch, 1, CLASSES, SHAPE, (0.5,), (0.25,))
    live: nn.Module = build_defense(spec).to(memory_format=torch.channels_last).members[0].train()  # type: ignore[call-overload]
    folded = FoldedCopy(live).module
    x = torch.rand(batch_size, *SHAPE).contiguous(memory_format=torch.channels_last)
    y = torch.arange(batch_size) % CLASSES

    def forward() -> None:
        with torch.no_grad():
            folded(x)

    def input_gradient() -> None:
        seen = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(folded(seen), y), seen)

    def training() -> None:
        live.zero_grad()
        F.cross_entropy(live(x), y).backward()

    def double_backward() -> None:
        live.zero_grad()
        seen = x.detach().requires_grad_()
        loss = F.cross_entropy(live(seen), y)
        gradient: Tensor = torch.autograd.grad(loss, seen, create_graph=True)[0]
        (loss + gradient.square().sum()).backward()

    return {run.__name__: run for run in (forward, input_gradient, training, double_backward)}


def seconds_of(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

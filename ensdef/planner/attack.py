"""What a cell will take: its attack's parts, each timed on the model at hand and multiplied by what will be left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ensdef.attack import Attack, CompositeAttack, IterativeAttack, WholeAttack
from ensdef.defense import EnsembleDefense
from ensdef.health import basic, full
from ensdef.health.ascent import climb
from ensdef.health.catalogue import Tier
from ensdef.health.observer import WATCHED
from ensdef.health.statistics import judged
from ensdef.losses import cross_entropy
from ensdef.planner.steps import StepRates, probe_steps
from ensdef.planner.stopwatch import Stopwatch
from ensdef.planner.survivors import Survivors, steps_to_fall
from ensdef.planner.whole import WholeRates, probe_whole
from ensdef.planner.work import Work
from ensdef.rows import SMALLEST_BATCH
from ensdef.specs import Cell
from ensdef.target import Target, Traits
from ensdef.threat import Threat

Rates = StepRates | WholeRates
#: Parts of a composite attack after which only images are left that withstand attacks on every view.
SOON = 6


@dataclass
class AttackedModel:
    """A defence on the device, as the harness attacks it, with what was timed of it.

    Args:
        x, y, ids: images that will be attacked, (N, ...), their labels and ids, (N,).
    """

    defense: EnsembleDefense
    combiner: str
    x: Tensor
    y: Tensor
    ids: Tensor
    batch_size: int
    watch: Stopwatch
    judge: Target = field(init=False)
    traits: Traits = field(init=False)
    #: seconds and member passes of one forward pass of the judge, an image; seconds to make it ready
    forward: float = field(init=False)
    members: float = field(init=False)
    ready: float = field(init=False)

    def __post_init__(self) -> None:
        began = self.watch.now()
        self.judge = Target(self.defense, combiner=self.combiner, fold=False, device=self.x.device)
        self.traits = self.judge.traits(self.x[:1])
        Target(self.defense, combiner=self.combiner, device=self.x.device)
        self.ready = self.watch.now() - began
        part = self.x[: self.batch_size].contiguous()
        for _ in range(2):  # the first warms up
            before, began = self.judge.passes.forwards, self.watch.now()
            with torch.no_grad():
                self.judge(part)
            self.judge.forget()
            self.forward = (self.watch.now() - began) / len(part)
        self.members = (self.judge.passes.forwards - before) / len(part)

    def ascent(self) -> float:
        """Seconds of one step of the health report's own attacks, an image."""
        x = self.x[: self.batch_size]
        with torch.no_grad():
            y = self.judge(x).argmax(dim=1)
        self.judge.forget()
        began = self.watch.now()
        climb(self.judge, x, y, Threat("linf", 0.0), cross_entropy, steps=3, step_size=0.0, batch_size=len(x))
        return (self.watch.now() - began) / 3 / len(x)

    def rates(self, part: Attack, cell: Cell, mode: str, rows: int, observed: bool, seconds: float = 0.1) -> Rates:
        """Time one part of an attack, on up to ``rows`` images at once, for about ``seconds`` if it can be cut."""
        target = Target(self.defense, combiner=self.combiner, precision=mode, device=self.x.device)
        if isinstance(part, WholeAttack):
            return probe_whole(
                part,
                cell.attack,
                self.judge,
                target,
                self.x,
                self.ids,
                self.watch,
                rows=rows,
                forward=self.forward,
            )
        assert isinstance(part, IterativeAttack)
        return probe_steps(
            part,
            cell.attack,
            self.judge,
            target,
            self.x,
            self.watch,
            rows=max(SMALLEST_BATCH, min(rows, self.batch_size)),
            observed=observed,
            seconds=seconds,
            num_classes=self.traits.num_classes,
        )


def parts_of(attack: Attack, name: str, traits: Traits) -> Sequence[tuple[str, Attack]]:
    """What an attack consists of."""
    return attack.parts(traits) if isinstance(attack, CompositeAttack) else [(name, attack)]


def cell_work(
    model: AttackedModel,
    attack: Attack,
    cell: Cell,
    survivors: Survivors,
    health: Tier,
    rates: Callable[[int, int, Attack, str, int], Rates],
) -> Work:
    """The whole cell.

    Args:
        attack: ready to be asked for its parts.
        rates: of a part by number, number of parts, attack, search mode and expected rows; may remember.
    """
    n = cell.samples
    modes = ["bf16", "fp32"] if cell.attack.search == "bf16+fp32" else [cell.attack.search]
    # clean images before, all points after
    seconds, forwards, backwards = model.ready + 2 * n * model.forward, 0.0, 0.0
    parts = parts_of(attack, cell.attack.call, model.traits)
    alive = n * survivors.clean
    for number, (mode, index) in enumerate((mode, index) for mode in modes for index in range(len(parts))):
        _, part = parts[index]
        left = min(alive, n * expected_left(survivors, number, len(parts)))
        batch = left if left >= 0.5 else alive
        known = rates(index, len(parts), part, mode, max(1, round(batch)))
        if isinstance(known, StepRates):
            assert isinstance(part, IterativeAttack)
            runs = part.runs(model.traits.num_classes)
            falls_after = steps_to_fall(part, known.steps)
            one = iterative_work(model, known, left, alive - left, runs, falls_after)
        else:
            one = whole_work(model, known, left, alive - left)
        seconds, forwards, backwards = seconds + one.seconds, forwards + one.forwards, backwards + one.backwards
        alive = left
    seconds += health_seconds(model, cell, survivors, health, forwards)
    return Work(seconds, forwards, backwards, model.watch.peak())


def expected_left(survivors: Survivors, number: int, parts: int) -> float:
    """Share of the images that withstand the parts up to ``number``, of ``parts``."""
    if parts == 1:
        return survivors.robust
    done = min(1.0, number / min(SOON, parts - 1))
    return survivors.robust + done * (survivors.hard - survivors.robust)


def iterative_work(
    model: AttackedModel, rates: StepRates, left: float, falling: float, runs: int, falls_after: float
) -> Work:
    """Runs of an iterative attack.

    Args:
        left, falling: numbers of images that withstand, and that do not.
        falls_after: steps spent on one that falls.
    """
    size = max(model.batch_size, SMALLEST_BATCH)
    steps = left * runs * rates.steps + falling * falls_after
    ends = left * runs + falling
    # a batch is kept full while there are images; the last ones go through their runs together
    longest = runs * rates.steps if left >= 0.5 else 2 * falls_after
    calls = max(steps / size, longest) if steps else 0.0
    seconds = rates.call * calls + rates.row * max(steps, SMALLEST_BATCH * calls)
    seconds += ends * model.forward * (1 + rates.start / max(model.members, 1.0))
    forwards = steps * rates.forwards + ends * (rates.start + model.members)
    return Work(seconds, forwards, steps * rates.backwards)


def whole_work(model: AttackedModel, rates: WholeRates, left: float, falling: float) -> Work:
    """A wrapped attack on all its images at once, and the judgement of what it offers."""
    rows = left + falling * rates.fooled
    seconds = rates.lasts(left) if left >= 0.5 else 0.0
    seconds += rates.fooled * rates.lasts(falling) if falling >= 0.5 else 0.0
    ends = left + falling
    return Work(seconds + ends * model.forward, rows * rates.forwards + ends * model.members, rows * rates.backwards)


def health_seconds(model: AttackedModel, cell: Cell, survivors: Survivors, health: Tier, forwards: float) -> float:
    """Of the health report on an attack of so many member passes."""
    if health == "off":
        return 0.0
    few = min(WATCHED, model.batch_size, cell.samples // 2)
    seconds = min(basic.ALLOWED * forwards / model.members, few * basic.PASSES) * model.forward
    if health == "full" and judged(cell.samples) and cell.attack.eps_value:
        sample = min(full.SAMPLE, survivors.clean * cell.samples)
        left = sample * survivors.robust / max(survivors.clean, 1e-9)
        runs = full.RESTARTS - 1 + len(full.STEP_SIZES) + len(full.RADII) + full.TARGETS + 2 + 2 * model.traits.members
        steps = left * full.STEPS * (4 + runs + 2) + sample * full.UNBOUNDED_STEPS / 4
        differences = 2 * len(full.LENGTHS) * full.DIRECTIONS * full.DIFFERENCED * 2
        asked = left * (full.DRAWS + full.QUERIES) + differences
        seconds += steps * model.ascent() + asked * model.forward
    return seconds

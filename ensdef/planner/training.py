"""What a training will take: a few of its own batches timed, times batches, times epochs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean

import torch

from ensdef import training_health
from ensdef.adversary import Adversary
from ensdef.build import build_defense
from ensdef.cost import Passes, count_passes
from ensdef.data import Data, Split
from ensdef.errors import TrainingDiverged
from ensdef.losses import cross_entropy
from ensdef.planner.stopwatch import Enough, Stopwatch
from ensdef.planner.work import Work
from ensdef.progress import Advance, Progress
from ensdef.recipe import InnerAttack, parse_train_eps
from ensdef.registry import METHODS
from ensdef.specs import TrainSpec
from ensdef.training import HOLDOUT, train

#: Batches of an epoch of the probe, and its epochs at most.
BATCHES, EPOCHS = 3, 8
#: Batches that only warm up; timed ones, unless that would take many times as long as the probe may.
WARM_UP, TIMED, PATIENCE = 2, 4, 6
#: Gradient steps timed on ``predict``, as the trainer attacks it to hold epochs against each other.
ASCENTS = 4
#: A forward pass as part of a gradient step.
FORWARD = 1 / 3


@dataclass(frozen=True)
class TrainingRates:
    """Seconds of what a training repeats.

    Args:
        setup: before the first batch.
        batch: one batch.
        epoch: what an epoch takes beside its batches.
        ascent: one gradient step on ``predict`` in eval mode, an image.
        memory: peak in bytes.
        passes: of one batch; None: they cannot be counted.
    """

    setup: float
    batch: float
    epoch: float
    ascent: float
    memory: int
    passes: Passes | None

    def work(self, spec: TrainSpec, images: int) -> Work:
        """The whole training.

        Args:
            images: of the training split.
        """
        recipe = spec.recipe
        held = round(HOLDOUT * images) if recipe.keep == "best" else 0
        trained = images - held
        batches = max(1, -(-trained // recipe.batch_size) - (trained % recipe.batch_size == 1))
        # clean passes, then two attacks and their judgements
        looked = min(training_health.CLEAN_SAMPLE, trained) * FORWARD
        if METHODS.get(spec.method).trains_on_attacks(spec.hyper) and recipe.attack.steps:
            steps = recipe.attack.steps + training_health.STRONG.steps + 2 * FORWARD
            looked += min(training_health.ATTACKED_SAMPLE, trained) * steps
        climbed = held * (recipe.attack.steps + FORWARD)
        seconds = self.setup + recipe.epochs * (batches * self.batch + self.epoch + climbed * self.ascent)
        forwards = backwards = 0.0
        if self.passes is not None:
            rows = recipe.epochs * min(trained, batches * recipe.batch_size)
            one = self.passes
            forwards = rows * (one.forward + one.input_gradient + one.training + one.double_backward)
            backwards = rows * (one.input_gradient + one.training + 2 * one.double_backward)
        return Work(seconds + looked * self.ascent, forwards, backwards, self.memory)


class _Ticks(Progress):
    """Notes when batches end, and ends the training when enough have."""

    def __init__(self, watch: Stopwatch, seconds: float) -> None:
        self.watch, self.seconds = watch, seconds
        self.began = watch.now()
        self.ends: list[float] = []

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        self.ends.append(self.watch.now())

        def advance(amount: float = 1, note: str = "") -> None:
            self.ends.append(self.watch.now())
            timed = len(self.ends) - 1 - WARM_UP
            slow = timed >= 1 and self.ends[-1] - self.ends[0] > PATIENCE * self.seconds
            if slow or (timed >= TIMED and self.ends[-1] - self.ends[WARM_UP] > self.seconds):
                raise Enough

        yield advance


def probe_training(spec: TrainSpec, data: Data, device: str, watch: Stopwatch, seconds: float) -> TrainingRates:
    """Begin the training on a few of its images, from untrained prerequisites; nothing is kept.

    Args:
        seconds: that the timed batches take, about.
    """
    size = spec.recipe.batch_size
    few = data.train.select(torch.arange(min(len(data.train), BATCHES * size)))
    recipe = dataclasses.replace(spec.recipe, epochs=EPOCHS, keep="last")
    prerequisites = {role: build_defense(needed.model) for role, needed in spec.prerequisites.items()}
    watch.begin_peak()
    ticks = _Ticks(watch, seconds)
    try:
        short = dataclasses.replace(spec, recipe=recipe)
        train(short, dataclasses.replace(data, train=few), prerequisites, device=device, progress=ticks)
    except (Enough, TrainingDiverged):  # diverging on a handful of images means nothing
        if len(ticks.ends) < 2:
            raise
    lasted = [later - earlier for earlier, later in zip(ticks.ends, ticks.ends[1:], strict=False)]
    begins = max(1, -(-len(few) // size) - (len(few) % size == 1))
    inside = [one for index, one in enumerate(lasted) if index >= WARM_UP and index % begins] or lasted[-1:]
    first = [one for index, one in enumerate(lasted) if index >= WARM_UP and index % begins == 0]
    batch = mean(inside) if begins > 1 else mean(first or lasted[-1:])
    epoch = max(0.0, mean(first) - batch) if first and begins > 1 else 0.0
    return TrainingRates(
        ticks.ends[0] - ticks.began, batch, epoch, _ascent(spec, few, device, watch), watch.peak(), _passes(spec)
    )


def _ascent(spec: TrainSpec, few: Split, device: str, watch: Stopwatch) -> float:
    """Seconds of one gradient step on ``predict``, an image."""
    defense = build_defense(spec.model).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    part = few.select(torch.arange(min(len(few), spec.recipe.batch_size))).to(torch.device(device))
    high = float(parse_train_eps(spec.setting.train_eps, spec.setting.norm)[1])
    taken = []
    for steps in (1, ASCENTS):
        adversary = Adversary(defense, InnerAttack(steps=steps), spec.setting.norm, (high, high))
        adversary.begin_batch(torch.Generator(device).manual_seed(0))
        began = watch.now()
        adversary(lambda x: cross_entropy(defense.predict(x), part.labels), part.x())
        taken.append(watch.now() - began)
    return taken[-1] / ASCENTS / len(part)


def _passes(spec: TrainSpec) -> Passes | None:
    try:
        return count_passes(spec.model.method_call, spec.model.members, spec.recipe.attack.steps)
    except Exception:  # a defence made of other parts than networks
        return None

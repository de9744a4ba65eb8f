"""What a wrapped attack takes: itself with fewer steps and queries, at two lengths, on a few images.

The passes of a library's attack on an image that is never fooled grow linearly with its steps and queries, so two
lengths tell them exactly, and what it does but once (its own checks, restarts of its parts) counts once.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from ensdef.attack import Attack, WholeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.planner.stopwatch import Stopwatch
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

A = TypeVar("A", bound=Attack)

#: Parameters that say how long an attack goes on.
LENGTHS = ("steps", "queries")
#: Steps that the short form keeps, how much shorter it is at most, seconds that the probe may take, and forward passes
#: that a step or a query costs, all roughly; images that are probed however long they take.
KEPT, SHORTER, SECONDS, CALLS, FEWEST = 4, 25, 6.0, 3, 2
#: Radius that fools nobody (and that no attack takes for none at all), and one at which every pixel can become grey.
TINY, GREY = 1e-6, 0.5


@dataclass(frozen=True)
class WholeRates:
    """Seconds of the whole attack on ``rows`` images that are never fooled, passes of one member for each.

    Args:
        fooled: part of the passes that an image costs which is fooled soon.
    """

    seconds: float
    rows: int
    forwards: float
    backwards: float
    fooled: float

    def lasts(self, rows: float) -> float:
        """On that many images; fewer than were timed take as long, because calls and not images cost then."""
        return self.seconds * max(1.0, rows / self.rows)

    def scaled(self, factor: float) -> WholeRates:
        """On a network whose passes take ``factor`` times as long."""
        return dataclasses.replace(self, seconds=self.seconds * factor)


def shortened(attack: A, times: int = 1) -> tuple[A, float]:
    """The same attack with fewer steps and queries (``times`` as many as the shortest form), and their part of all."""
    given = {name: getattr(attack.params, name, None) for name in LENGTHS}
    lengths = {name: value for name, value in given.items() if type(value) is int and value > 0}
    if not lengths:
        return attack, 1.0
    part = max(1, min(min(lengths.values()) // KEPT, SHORTER))
    fewer = {name: min(value, times * (value // part)) for name, value in lengths.items()}
    short = copy.copy(attack)
    short.warnings = []
    short.params = dataclasses.replace(attack.params, **fewer)
    return short, sum(fewer.values()) / sum(lengths.values())


def extrapolated(short: float, long: float, parts: tuple[float, float]) -> float:
    """A straight line through the values at two parts of the length, at the whole of it."""
    if parts[1] <= parts[0]:
        return long
    return max(long, short + (long - short) * (1 - parts[0]) / (parts[1] - parts[0]))


def probe_whole(
    attack: WholeAttack,
    spec: AttackSpec,
    judge: Target,
    target: Target,
    x: Tensor,
    ids: Tensor,
    watch: Stopwatch,
    *,
    rows: int,
    forward: float,
) -> WholeRates:
    """Run the short forms.

    Args:
        x, ids: images, (N, ...), and their ids, (N,).
        rows: that will be attacked at once, as far as is known; fewer are, where they would take too long.
        forward: seconds of one forward pass, an image.
    """
    forms = [shortened(attack, times) for times in (1, 2)]
    parts = forms[0][1], forms[1][1]
    calls = CALLS * sum(getattr(form.params, name, 0) or 0 for form, _ in forms for name in LENGTHS)
    affordable = SECONDS / max(calls * forward, 1e-9)
    count = min(rows, len(x), attack.batch_size, max(FEWEST, int(min(affordable, len(x)))))
    x, ids = x[:count], ids[:count]
    with torch.no_grad():
        y = judge(x).argmax(dim=1)
    judge.forget()
    target.memory.on = False

    def spent(form: WholeAttack, radius: float) -> tuple[float, float, float]:
        """Seconds, and passes for an image."""
        before, began = (target.passes.forwards, target.passes.backwards), watch.now()
        with torch.random.fork_rng():
            form.perturb(target, x, y, Threat(spec.norm, radius), KeyedRandom(spec.seed, ids))
        seconds = watch.now() - began
        made = target.passes.forwards - before[0], target.passes.backwards - before[1]
        return seconds, made[0] / count, made[1] / count

    grey = GREY * (math.sqrt(x[0].numel()) if spec.norm == "l2" else 1.0)
    # the easy ones first: they warm up
    passes = []
    for radius in (grey, TINY):
        runs = [spent(form, radius) for form, _ in forms]
        seconds, forwards, backwards = (
            extrapolated(*cast(tuple[float, float], pair), parts) for pair in zip(*runs, strict=True)
        )
        passes.append(forwards + backwards)
    return WholeRates(seconds, count, forwards, backwards, min(1.0, passes[0] / passes[1]) if passes[1] else 1.0)

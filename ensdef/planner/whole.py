"""What a wrapped attack takes: itself with fewer steps and queries on a few images, and by how much it is longer."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ensdef.attack import Attack, WholeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.planner.stopwatch import Stopwatch
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat

#: Parameters that say how long an attack goes on.
LENGTHS = ("steps", "queries")
#: Steps that the short form keeps, how much shorter it is at most, and seconds it may take.
KEPT, SHORTER, SECONDS = 4, 25, 4.0
#: Radius of the probe: one that fools nobody, and that no attack takes for none at all.
RADIUS = 1e-6


@dataclass(frozen=True)
class WholeRates:
    """Seconds of the whole attack on a batch of ``rows``, passes of one member for an image.

    Args:
        fooled: part of the passes that an image costs which is fooled at once.
    """

    seconds: float
    rows: int
    forwards: float
    backwards: float
    fooled: float

    def lasts(self, rows: float) -> float:
        """On that many images; fewer than were timed take as long, because calls and not images cost then."""
        return self.seconds * max(1.0, rows / self.rows)


def shortened(attack: Attack, kept: int = KEPT) -> tuple[Attack, float]:
    """The same attack with about ``kept`` steps or queries, and how many times as many the attack itself has."""
    given = {name: getattr(attack.params, name, None) for name in LENGTHS}
    lengths = {name: value for name, value in given.items() if type(value) is int and value > 0}
    if not lengths:
        return attack, 1.0
    part = max(1, min(min(lengths.values()) // kept, SHORTER))
    short = copy.copy(attack)
    short.warnings = []
    short.params = dataclasses.replace(attack.params, **{name: value // part for name, value in lengths.items()})
    return short, sum(lengths.values()) / sum(value // part for value in lengths.values())


def probe_whole(
    attack: WholeAttack,
    spec: AttackSpec,
    judge: Target,
    target: Target,
    traits: Traits,
    x: Tensor,
    ids: Tensor,
    watch: Stopwatch,
    *,
    rows: int,
    forward: float,
) -> WholeRates:
    """Run the short form.

    Args:
        x, ids: images, (N, ...), and their ids, (N,).
        rows: that will be attacked at once, as far as is known; fewer are, where they would take too long.
        forward: seconds of one forward pass, an image.
    """
    short, longer = shortened(attack)
    assert isinstance(short, WholeAttack)
    costs = attack.cost(traits), short.cost(traits)
    fooled = 1.0
    if costs[0] is not None and costs[1] is not None:
        longer = (costs[0].forwards + costs[0].backwards) / (costs[1].forwards + costs[1].backwards)
        fooled = costs[0].fooled
        calls = costs[1].forwards + 2 * costs[1].backwards
    else:
        calls = 3.0 * sum(getattr(short.params, name, 0) or 0 for name in LENGTHS)
    affordable = int(SECONDS / max(calls * forward, 1e-9))
    count = max(1, min(rows, len(x), attack.batch_size, max(affordable, 2)))
    x = x[:count]
    with torch.no_grad():
        y = judge(x).argmax(dim=1)
    judge.forget()
    target.memory.on = False
    before = target.passes.forwards, target.passes.backwards
    threat = Threat(spec.norm, RADIUS)
    began = watch.now()
    with torch.random.fork_rng():
        short.perturb(target, x, y, threat, KeyedRandom(spec.seed, ids[:count]))
    seconds = (watch.now() - began) * longer
    made = target.passes.forwards - before[0], target.passes.backwards - before[1]
    forwards, backwards = made[0] / count * longer, made[1] / count * longer
    if costs[0] is not None:
        members = max(1, traits.members)
        forwards, backwards = costs[0].forwards * members, costs[0].backwards * members
    return WholeRates(seconds, count, forwards, backwards, fooled)

"""What one step of an iterative attack takes: the real attack in the real session, on points that cannot be fooled.

The radius is 0 and the labels are the model's own decisions, so every row stays as long as it would on a robust image.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from ensdef.attack import IterativeAttack, State
from ensdef.attack_spec import AttackSpec
from ensdef.health.observer import WATCHED, Observer, spread
from ensdef.planner.stopwatch import Enough, Stopwatch
from ensdef.progress import Progress
from ensdef.rng import KeyedRandom
from ensdef.rows import SMALLEST_BATCH
from ensdef.session import Session
from ensdef.target import Target
from ensdef.threat import Threat

#: Steps of the probe at most, of which the first warms up; fewest, however long they take.
STEPS, FEWEST = 40, 3
#: Seconds of a step at which a second size of batch is not worth its time.
SLOW = 1.0


@dataclass(frozen=True)
class StepRates:
    """What an attack's run repeats; passes are of one member, for one image.

    Args:
        call, row: seconds of a step on no rows, and for every row more.
        steps: updates of a run whose image never falls.
        forwards, backwards: of a step.
        start: forwards before the first step.
    """

    call: float
    row: float
    steps: float
    forwards: float
    backwards: float
    start: float

    def seconds(self, rows: float) -> float:
        """One step on a batch of ``rows``."""
        return self.call + self.row * max(rows, SMALLEST_BATCH)

    def scaled(self, factor: float) -> StepRates:
        """On a network whose passes take ``factor`` times as long."""
        return dataclasses.replace(self, call=self.call * factor, row=self.row * factor)


class _Timed(IterativeAttack):
    """Another attack for a few steps, with a note of time and passes before each."""

    def __init__(self, attack: IterativeAttack, watch: Stopwatch, seconds: float) -> None:
        super().__init__(attack.params)
        self.attack, self.watch, self.seconds = attack, watch, seconds
        self.passes: list[tuple[int, int]] = []
        self.budget = attack.budget  # type: ignore[misc]
        self.entries: list[float] = []
        self.rows: list[int] = []
        self.ended = 0
        self.at_start = 0

    @property
    def steps(self) -> int:
        return min(STEPS, self.attack.steps)

    def runs(self, num_classes: int) -> int:
        return 1

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        state = self.attack.start(target, x, y, threat, rng)
        self.at_start = target.passes.forwards
        return state

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        self.entries.append(self.watch.now())
        self.passes.append((target.passes.forwards, target.passes.backwards))
        if len(self.entries) > FEWEST and self.entries[-1] - self.entries[0] > self.seconds:
            raise Enough
        real = round(len(x_adv) * target.passes.share)
        self.rows.append(real)
        moved, state = self.attack.step(target, x_adv, y, state, threat, rng)
        if "done" in state:
            self.ended += int(state["done"][:real].sum())
        return moved, state


def probe_steps(
    attack: IterativeAttack,
    spec: AttackSpec,
    judge: Target,
    target: Target,
    x: Tensor,
    watch: Stopwatch,
    *,
    rows: int,
    observed: bool,
    seconds: float,
    num_classes: int,
) -> StepRates:
    """Time a few steps at the smallest batch, and at one of ``rows`` where the time allows.

    Args:
        judge, target: of the same model; see :class:`ensdef.session.Session`.
        x: images, (N, ...); repeated where a batch is larger.
        observed: whether the health report looks on.
        seconds: that each of the two may take, once it has made a few steps.
    """
    small = _run(attack, spec, judge, target, x, watch, SMALLEST_BATCH, observed, seconds, num_classes)
    call, row = 0.0, small.typical / SMALLEST_BATCH
    if rows > SMALLEST_BATCH and small.typical * rows / SMALLEST_BATCH < SLOW:
        large = _run(attack, spec, judge, target, x, watch, rows, observed, seconds, num_classes)
        row = max(0.0, large.typical - small.typical) / (rows - SMALLEST_BATCH)
        call = max(0.0, small.typical - SMALLEST_BATCH * row)
    return StepRates(call, row, small.steps(attack.steps), small.forwards, small.backwards, small.start)


@dataclass(frozen=True)
class _Seen:
    """One probe: seconds of a step, rows of every step and how many ended by themselves, passes a row."""

    typical: float
    rows: list[int]
    ended: int
    forwards: float
    backwards: float
    start: float

    def steps(self, most: int) -> float:
        return min(float(most), sum(self.rows) / self.ended) if self.ended else float(most)


def _run(
    attack: IterativeAttack,
    spec: AttackSpec,
    judge: Target,
    target: Target,
    x: Tensor,
    watch: Stopwatch,
    size: int,
    observed: bool,
    seconds: float,
    num_classes: int,
) -> _Seen:
    x = x[torch.arange(size, device=x.device) % len(x)]
    with torch.no_grad():
        y = judge(x).argmax(dim=1)
    judge.forget()
    still = spec if spec.eps is None else dataclasses.replace(spec, eps="0")
    session = Session(still, judge, x, y, torch.arange(size, device=x.device), size, num_classes)
    everybody = torch.arange(size, device=x.device)
    if observed:
        session.observer = Observer(y, spread(everybody, WATCHED))
    before = target.passes.forwards, target.passes.backwards
    timed = _Timed(attack, watch, seconds)
    try:
        session.run(timed, target, everybody, Progress(), "probe")
        timed.entries.append(watch.now())
        timed.passes.append((target.passes.forwards, target.passes.backwards))
    except Enough:
        target.witness = None
        target.forget()
    lasted = [later - earlier for earlier, later in zip(timed.entries, timed.entries[1:], strict=False)]
    counted = [
        ((after[0] - now[0]) / rows, (after[1] - now[1]) / rows)
        for now, after, rows in zip(timed.passes, timed.passes[1:], timed.rows, strict=False)
    ]
    # the first step warms up; the last one ends with the judgement
    middle = lasted[1:-1] or lasted[-1:] or [0.0]
    return _Seen(
        mean(middle),
        timed.rows,
        timed.ended,
        mean(forwards for forwards, _ in counted) if counted else 0.0,
        mean(backwards for _, backwards in counted) if counted else 0.0,
        (timed.at_start - before[0]) / size,
    )

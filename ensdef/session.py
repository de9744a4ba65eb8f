"""One attack on one set of images: the queue that keeps batches full, and the place where success is judged.

Images whose clean prediction is right enter a queue of (image, run) items; a batch is kept full from it. After every
step a row that the search model takes for fooled is put aside, judged on the true model in a batch of such rows, and
goes back if it was not. A row at its last step is judged the same way; then the image's next run is queued. Nothing
depends on how rows meet in a batch: random numbers are keyed by image, and normalisation runs on stored statistics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ensdef.attack import Attack, IterativeAttack, State, WholeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.backend import free_memory, is_out_of_memory
from ensdef.errors import AttackError
from ensdef.health.observer import Observer
from ensdef.lookahead import Lookahead
from ensdef.progress import Advance, Progress
from ensdef.rng import KeyedRandom
from ensdef.rows import SMALLEST_BATCH, Rows, finish, padding
from ensdef.target import Target
from ensdef.threat import Threat

T = TypeVar("T")

#: Slack of the ball check, for the rounding of x + delta in float32.
BALL_SLACK = 1e-6


class Session:
    """One set of images and what became of them; ``run`` sends one attack after another at the survivors."""

    def __init__(
        self,
        spec: AttackSpec,
        judge: Target,
        x: Tensor,
        y: Tensor,
        ids: Tensor,
        batch_size: int,
        num_classes: int,
    ) -> None:
        self.spec = spec
        self.threat = Threat(spec.norm, spec.eps_value or 0.0)
        self.enter("", 0, "eps")
        self.judge = judge
        self.num_classes = num_classes
        self.x, self.y, self.ids = x, y, ids
        self.batch_size = max(batch_size, SMALLEST_BATCH)
        self.x_adv = x.clone()
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        #: which part of the attack fooled the image first, -1: none
        self.broken_by = torch.full((len(x),), -1, device=x.device)
        self.forwards = self.backwards = self.nonfinite = 0
        #: looks on for the health report; None: nobody does
        self.observer: Observer | None = None

    def enter(self, name: str, part: int, budget: str) -> None:
        """What is to be known of the attack that runs now."""
        self.name = name
        self.part = part
        self.min_norm = budget == "min_norm"
        #: what iterates are kept inside of: shortest-perturbation attacks are compared with eps, not projected
        self.bound = self.threat if budget == "eps" else Threat(None, 0.0)
        #: every part of a composite attack draws from a stream of its own
        self.seed = self.spec.seed + (part << 32)

    def run(self, attack: Attack, target: Target, alive: Tensor, progress: Progress, name: str, part: int = 0) -> None:
        """Attack the images at positions ``alive``; ``part`` numbers the attacks of a composite one."""
        self.enter(name, part, attack.budget)
        title = f"attack {name} eps {self.spec.written or '-'}"
        if isinstance(attack, WholeAttack):
            target.memory.on = False
            with progress.task(title, len(alive)) as advance:
                self._run_whole(attack, target, alive, advance)
        else:
            assert isinstance(attack, IterativeAttack)
            runs = attack.runs(self.num_classes)
            with progress.task(title, len(alive) * runs) as advance:
                self._run_iterative(attack, target, alive, runs, advance)
        self.forwards += target.passes.forwards
        self.backwards += target.passes.backwards

    def _run_whole(self, attack: WholeAttack, target: Target, alive: Tensor, advance: Advance) -> None:
        for rows in alive.split(attack.batch_size):
            x, y = self.x[rows], self.y[rows]
            with torch.random.fork_rng():
                x_adv = attack.perturb(target, x, y, self.threat, KeyedRandom(self.seed, self.ids[rows]))
            target.forget()
            candidate = self._checked(x_adv, x)
            ended = Rows(rows, rows, rows, torch.ones_like(rows, dtype=torch.bool), x, y, candidate, candidate)
            for part in self._split(ended):
                self._judge(part)
            advance(len(rows))

    def _run_iterative(
        self, attack: IterativeAttack, target: Target, alive: Tensor, runs: int, advance: Advance
    ) -> None:
        lookahead = Lookahead(attack, self.threat, self._checked, self.seed, self.ids, self.batch_size)
        lookahead.possible &= self.spec.success == "any"  # else the observer would miss points on the way
        waiting = deque((index, 0) for index in alive.tolist())
        active: list[Rows] = []
        aside: list[Rows] = []
        while waiting or active or aside:
            count = sum(map(len, active))
            room = self.batch_size - count
            # refilling by small portions would cost more in copies than the gaps cost in passes
            if waiting and (room >= self.batch_size // 4 or not count):
                taken = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                if (started := self._fitting(partial(self._start, attack, target, taken), target, advance)) is None:
                    waiting.extendleft(reversed(taken))
                    continue
                active.append(started)
            rows = Rows.join(active) if active else None
            active = []
            if rows is not None:
                done = rows.step >= attack.steps
                if bool(done.any()):  # an attack of no steps is judged where it starts
                    aside.append(finish(rows.select(done)))
                    rows = rows.select(~done)
                # rows that came back from judgement may be more than a batch
                for part in self._split(rows) if len(rows) > self.batch_size else [rows] if len(rows) else []:
                    lookahead.room = self.batch_size
                    step = partial(self._advance, attack, target, part, lookahead)
                    # once memory ran out, what was cut for larger batches waits to be cut anew
                    moved = self._fitting(step, target, advance) if len(part) <= self.batch_size else None
                    left, claimed = moved or (part, [])
                    aside += claimed
                    if len(left):
                        active.append(left)
            held, busy = sum(map(len, aside)), sum(map(len, active))
            # rows put aside are judged in full batches, or sooner when only their next runs could fill the batch
            starved = not waiting and (not busy or (busy <= 3 * self.batch_size // 4 and held >= SMALLEST_BATCH))
            if held >= self.batch_size or starved:
                judged, aside = self._split(Rows.join(aside)) if aside else [], []
                for part in judged:
                    settle = partial(self._settle, part, runs, waiting, advance)
                    settled = self._fitting(settle, target, advance) if len(part) <= self.batch_size else None
                    if settled is None:
                        aside.append(part)
                        continue
                    again, ended = settled
                    active += again
                    advance(0, f"{ended} judged, {int(self.fooled.sum())} fooled")

    def _fitting(self, work: Callable[[], T], target: Target, advance: Advance) -> T | None:
        """What ``work`` returns, or None: memory ran out, nothing happened, and batches are half as large now."""
        counters = [(passes, passes.forwards, passes.backwards) for passes in (target.passes, self.judge.passes)]
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.batch_size <= SMALLEST_BATCH:
                raise
        for passes, forwards, backwards in counters:
            passes.forwards, passes.backwards = forwards, backwards
        self.batch_size = max(self.batch_size // 2, SMALLEST_BATCH)
        for model in (target, self.judge):
            model.forget()
        free_memory()
        advance(0, f"out of memory: batches of {self.batch_size} now")
        return None

    def _start(self, attack: IterativeAttack, target: Target, items: list[tuple[int, int]]) -> Rows:
        index, run = torch.tensor(items, device=self.x.device).unbind(1)
        x, y = self.x[index].contiguous(memory_format=_layout(target, self.x)), self.y[index]
        rng = KeyedRandom(self.seed, self.ids[index], run)
        target.passes.share = 1.0
        # copies: an attack may keep what it is given in its state, and write there
        state = dict(attack.start(target, x.clone(), y.clone(), self.threat, rng))
        target.forget()
        x_adv = self._checked(state.pop("x_adv", x), x)
        zeros = torch.zeros_like(index)
        return Rows(index, run, zeros, zeros.bool(), x, y, x_adv, x_adv, self._kept(state, len(x)))

    def _advance(
        self, attack: IterativeAttack, target: Target, rows: Rows, lookahead: Lookahead
    ) -> tuple[Rows, list[Rows]]:
        """One step, or several where the attack can look ahead: the rows that go on, and those to be judged."""
        count = len(rows)
        depth = lookahead.depth(rows)
        asked = lookahead.extend(rows, depth) if depth > 1 else rows
        real = len(asked)
        if real < SMALLEST_BATCH:
            asked = asked.select(padding(asked))
        before = target.passes.forwards
        target.passes.share = real / len(asked)
        moved, claim, done = self._step(attack, target, asked, count)
        if real < len(asked):
            first = torch.arange(real, device=moved.index.device)
            asked, moved, claim, done = asked.select(first), moved.select(first), claim[:real], done[:real]
        if depth > 1:
            last, questions = lookahead.reached(asked, moved, claim | done, depth)
            # what was asked ahead in vain counts as little as padding does
            target.passes.forwards -= (target.passes.forwards - before) * (real - questions) // real
            moved, claim, done = moved.select(last), claim[last], done[last]
        aside = [moved.select(claim)] if bool(claim.any()) else []
        finished = done & ~claim
        if bool(finished.any()):
            aside.append(finish(moved.select(finished)))
        leaving = claim | done
        return (moved.select(~leaving) if bool(leaving.any()) else moved), aside

    def _step(self, attack: IterativeAttack, target: Target, rows: Rows, count: int) -> tuple[Rows, Tensor, Tensor]:
        """The rows after one step, which of them claim to have fooled, and which are at their end, (B,) bool.

        Args:
            count: rows of the batch that the observer is shown; the others are padding, or look ahead.
        """
        rng = KeyedRandom(self.seed, self.ids[rows.index], rows.run, rows.step + 1)
        given = (rows.x_adv, rows.y)
        versions = [tensor._version for tensor in given]
        remembered = {name: tensor._version for name, tensor in rows.state.items()}
        if self.observer is not None:
            self.observer.begin(target, rows, count)
        try:
            x_adv, state = attack.step(target, rows.x_adv, rows.y, rows.state, self.threat, rng)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and remembered != {name: one._version for name, one in rows.state.items()}:
                raise AttackError(
                    f"{self.name} ran out of memory after it had written into its state, so the step cannot be tried "
                    "again in a smaller batch; return new state tensors, or lower --batch-size"
                ) from error
            raise
        state = dict(state)
        stopped = state.pop("done", None)
        if versions != [tensor._version for tensor in given]:
            raise AttackError(f"{self.name} wrote into the points or labels it was given; return new points")
        x_adv = self._checked(x_adv, rows.x)
        scores = None
        if self.spec.success == "any":
            scores = target.scores_at(rows.x_adv)
            if scores is None:
                with torch.no_grad():
                    scores = target(rows.x_adv)
        if self.observer is not None:
            self.observer.end(target, rows, count, scores)
        target.forget()
        step, kept = rows.step + 1, self._kept(state, len(rows))
        if stopped is not None:  # should its claim be denied, it has no further step to take
            step = torch.where(stopped, attack.steps, step)
        moved = Rows(rows.index, rows.run, step, rows.final, rows.x, rows.y, x_adv, rows.x_adv.detach(), kept)
        claim = torch.zeros_like(moved.final) if scores is None else _claims(scores, moved.y)
        if self.min_norm:  # one that fools from too far away is no success yet
            claim &= self._near(moved.candidate, moved.x)
        return moved, claim, moved.step >= attack.steps

    def _settle(
        self, rows: Rows, runs: int, waiting: deque[tuple[int, int]], advance: Advance
    ) -> tuple[list[Rows], int]:
        """Judge rows on the true model; returns those that go on, and how many ended."""
        fooled = self._judge(rows)
        ended = int(fooled.sum())
        for run in rows.run[fooled].tolist():
            advance(runs - run)
        unconfirmed = rows.select(~fooled & ~rows.final)
        over = rows.select(~fooled & rows.final)
        for index, run in zip(over.index.tolist(), over.run.tolist(), strict=True):
            advance(1)
            if run + 1 < runs:
                waiting.append((index, run + 1))
            else:
                ended += 1
        return [unconfirmed] if len(unconfirmed) else [], ended

    def _judge(self, rows: Rows) -> Tensor:
        """Whether the candidates fool the true model, (B,); remembers the points."""
        count = len(rows)
        padded = padding(rows)
        self.judge.passes.share = count / len(padded)
        with torch.no_grad():
            scores = self.judge(rows.candidate[padded].contiguous())[:count]
        self.judge.forget()
        self.nonfinite += int((~torch.isfinite(scores).all(dim=1)).sum())
        if self.observer is not None:
            self.observer.judged(rows, scores)
        fooled = _claims(scores, rows.y)
        if self.min_norm:
            fooled &= self._near(rows.candidate, rows.x)
        keep = fooled if self.min_norm else fooled | rows.final
        self.x_adv[rows.index[keep]] = rows.candidate[keep].contiguous()
        fresh = rows.index[fooled]
        self.broken_by[fresh[~self.fooled[fresh]]] = self.part
        self.fooled[fresh] = True
        return fooled

    def _near(self, points: Tensor, x: Tensor) -> Tensor:
        return self.threat.distance(points, x) <= self.threat.eps + BALL_SLACK

    def _split(self, rows: Rows) -> list[Rows]:
        order = torch.arange(len(rows), device=rows.index.device)
        return [rows.select(part) for part in order.split(self.batch_size)]

    def _kept(self, state: State, count: int) -> State:
        """Memory by image, without gradient, or an error that names the attack."""
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != count:
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise AttackError(f"{self.name}: state {name!r} is {came}; expected one row for each of {count} images")
        return {name: value.detach() for name, value in state.items()}

    def _checked(self, x_adv: Any, x: Tensor) -> Tensor:
        """Inside ball and box, or an error that names the attack."""
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
            came = tuple(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
            raise AttackError(f"{self.name} returned {came} where points of shape {tuple(x.shape)} were expected")
        inside = self.bound.project(x_adv.detach(), x)
        if not bool(torch.isfinite(inside).all()):
            raise AttackError(f"{self.name} returned NaN; a division by a zero gradient norm is the usual cause")
        return inside


def _layout(target: Target, x: Tensor) -> torch.memory_format:
    return target.memory_format if x.dim() == 4 else torch.contiguous_format


def _claims(scores: Tensor, y: Tensor) -> Tensor:
    """Whether scores choose another class than the label, or are no numbers, (B,) bool."""
    return (scores.argmax(dim=1) != y) | ~torch.isfinite(scores).all(dim=1)

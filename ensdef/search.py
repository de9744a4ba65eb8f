"""One iterative attack on a set of images: the queue of (image, run) items that keeps batches full.

A batch is kept full from the items that wait. After every step a row that the search model takes for fooled is put
aside, judged on the true model in a batch of such rows, and goes back if it was not. A row at its last step is judged
the same way; then the image's next run is queued.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ensdef.attack import IterativeAttack, State
from ensdef.backend import free_memory, is_out_of_memory
from ensdef.errors import AttackError
from ensdef.lookahead import Lookahead
from ensdef.progress import Advance
from ensdef.rng import KeyedRandom
from ensdef.rows import SMALLEST_BATCH, Rows, finish, padding
from ensdef.scores import claims
from ensdef.target import Target

if TYPE_CHECKING:
    from ensdef.session import Session

T = TypeVar("T")


@dataclass
class UnderWay:
    """What an attack has in hand between two batches; of any batch size.

    Args:
        waiting: items (image, run) not begun; a whole attack's have run 0.
        active, aside: rows to be moved on, and to be judged.
        surprises: what the search has learned about looking ahead.
        forwards, backwards: member passes that the attack made so far.
    """

    waiting: Sequence[tuple[int, int]]
    active: list[Rows] = field(default_factory=list)
    aside: list[Rows] = field(default_factory=list)
    surprises: float = 1.0
    forwards: int = 0
    backwards: int = 0

    def left(self, runs: int) -> int:
        """Runs that are not judged yet, if no image falls, of ``runs`` an image."""
        begun = [run for rows in (*self.active, *self.aside) for run in rows.run.tolist()]
        return sum(runs - run for run in (*(run for _, run in self.waiting), *begun))


class Search:
    """An iterative attack at work.

    Args:
        session: what becomes of the images.
        attack: whose steps are made on ``target``.
        begun: where to begin, or to go on.
    """

    def __init__(self, session: Session, attack: IterativeAttack, target: Target, begun: UnderWay) -> None:
        self.session = session
        self.attack = attack
        self.target = target
        self.runs = attack.runs(session.num_classes)
        self.lookahead = Lookahead(
            attack, session.threat, session.checked, session.seed, session.ids, session.batch_size
        )
        self.lookahead.possible &= session.spec.success == "any"  # else the observer would miss points on the way
        self.lookahead.surprises = begun.surprises
        self.waiting = deque(begun.waiting)
        self.active = list(begun.active)
        self.aside = list(begun.aside)

    def under_way(self) -> UnderWay:
        """Where the search stands; between two batches."""
        passes = self.target.passes
        return UnderWay(
            list(self.waiting), self.active, self.aside, self.lookahead.surprises, passes.forwards, passes.backwards
        )

    def run(self, advance: Advance) -> None:
        """Until every run is judged."""
        session = self.session
        while self.waiting or self.active or self.aside:
            count = sum(map(len, self.active))
            room = session.batch_size - count
            # refilling by small portions would cost more in copies than the gaps cost in passes
            if self.waiting and (room >= session.batch_size // 4 or not count):
                taken = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
                if (started := self._fitting(partial(self._start, taken), advance)) is None:
                    self.waiting.extendleft(reversed(taken))
                    continue
                self.active.append(started)
            rows = Rows.join(self.active) if self.active else None
            self.active = []
            if rows is not None:
                done = rows.step >= self.attack.steps
                if bool(done.any()):  # an attack of no steps is judged where it starts
                    self.aside.append(finish(rows.select(done)))
                    rows = rows.select(~done)
                # rows that came back from judgement may be more than a batch
                for part in session.split(rows) if len(rows) > session.batch_size else [rows] if len(rows) else []:
                    self.lookahead.room = session.batch_size
                    step = partial(self._advance, part)
                    # once memory ran out, what was cut for larger batches waits to be cut anew
                    moved = self._fitting(step, advance) if len(part) <= session.batch_size else None
                    left, claimed = moved or (part, [])
                    self.aside += claimed
                    if len(left):
                        self.active.append(left)
            held, busy = sum(map(len, self.aside)), sum(map(len, self.active))
            # rows put aside are judged in full batches, or sooner when only their next runs could fill the batch
            few = not busy or (busy <= 3 * session.batch_size // 4 and held >= SMALLEST_BATCH)
            starved = few and not self.waiting
            if held >= session.batch_size or starved:
                judged, self.aside = session.split(Rows.join(self.aside)) if self.aside else [], []
                for part in judged:
                    settle = partial(self._settle, part, advance)
                    settled = self._fitting(settle, advance) if len(part) <= session.batch_size else None
                    if settled is None:
                        self.aside.append(part)
                        continue
                    again, ended = settled
                    self.active += again
                    advance(0, f"{ended} judged, {int(session.fooled.sum())} fooled")
            session.moment()

    def _fitting(self, work: Callable[[], T], advance: Advance) -> T | None:
        """What ``work`` returns, or None: memory ran out, nothing happened, and batches are half as large now."""
        models = (self.target, self.session.judge)
        counters = [(model.passes, model.passes.forwards, model.passes.backwards) for model in models]
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.session.batch_size <= SMALLEST_BATCH:
                raise
        for passes, forwards, backwards in counters:
            passes.forwards, passes.backwards = forwards, backwards
        self.session.batch_size = max(self.session.batch_size // 2, SMALLEST_BATCH)
        for model in models:
            model.forget()
        free_memory()
        advance(0, f"out of memory: batches of {self.session.batch_size} now")
        return None

    def _start(self, items: list[tuple[int, int]]) -> Rows:
        session, target = self.session, self.target
        index, run = torch.tensor(items, device=session.x.device).unbind(1)
        x, y = session.images(index, target), session.y[index]
        rng = KeyedRandom(session.seed, session.ids[index], run)
        target.passes.share = 1.0
        # copies: an attack may keep what it is given in its state, and write there
        state = dict(self.attack.start(target, x.clone(), y.clone(), session.threat, rng))
        target.forget()
        x_adv = session.checked(state.pop("x_adv", x), x)
        zeros = torch.zeros_like(index)
        return Rows(index, run, zeros, zeros.bool(), x, y, x_adv, x_adv, self._kept(state, len(x)))

    def _advance(self, rows: Rows) -> tuple[Rows, list[Rows]]:
        """One step, or several where the attack can look ahead: the rows that go on, and those to be judged."""
        target, lookahead, count = self.target, self.lookahead, len(rows)
        depth = lookahead.depth(rows)
        asked = lookahead.extend(rows, depth) if depth > 1 else rows
        real = len(asked)
        if real < SMALLEST_BATCH:
            asked = asked.select(padding(asked))
        before = target.passes.forwards
        target.passes.share = real / len(asked)
        moved, claim, done = self._step(asked, count)
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

    def _step(self, rows: Rows, count: int) -> tuple[Rows, Tensor, Tensor]:
        """The rows after one step, which of them claim to have fooled, and which are at their end, (B,) bool.

        Args:
            count: rows of the batch that the observer is shown; the others are padding, or look ahead.
        """
        session, target, name = self.session, self.target, self.session.name
        rng = KeyedRandom(session.seed, session.ids[rows.index], rows.run, rows.step + 1)
        given = (rows.x_adv, rows.y)
        versions = [tensor._version for tensor in given]
        remembered = {part: tensor._version for part, tensor in rows.state.items()}
        if session.observer is not None:
            session.observer.begin(target, rows, count)
        try:
            x_adv, state = self.attack.step(target, rows.x_adv, rows.y, rows.state, session.threat, rng)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and remembered != {part: one._version for part, one in rows.state.items()}:
                raise AttackError(
                    f"{name} ran out of memory after it had written into its state, so the step cannot be tried "
                    "again in a smaller batch; return new state tensors, or lower --batch-size"
                ) from error
            raise
        state = dict(state)
        stopped = state.pop("done", None)
        if versions != [tensor._version for tensor in given]:
            raise AttackError(f"{name} wrote into the points or labels it was given; return new points")
        x_adv = session.checked(x_adv, rows.x)
        scores = None
        if session.spec.success == "any":
            scores = target.scores_at(rows.x_adv)
            if scores is None:
                with torch.no_grad():
                    scores = target(rows.x_adv)
        if session.observer is not None:
            session.observer.end(target, rows, count, scores)
        target.forget()
        step, kept = rows.step + 1, self._kept(state, len(rows))
        if stopped is not None:  # should its claim be denied, it has no further step to take
            step = torch.where(stopped, self.attack.steps, step)
        moved = Rows(rows.index, rows.run, step, rows.final, rows.x, rows.y, x_adv, rows.x_adv.detach(), kept)
        claim = torch.zeros_like(moved.final) if scores is None else claims(scores, moved.y)
        if session.min_norm:  # one that fools from too far away is no success yet
            claim &= session.near(moved.candidate, moved.x)
        return moved, claim, moved.step >= self.attack.steps

    def _settle(self, rows: Rows, advance: Advance) -> tuple[list[Rows], int]:
        """Judge rows on the true model; returns those that go on, and how many ended."""
        fooled = self.session.judged(rows)
        ended = int(fooled.sum())
        for run in rows.run[fooled].tolist():
            advance(self.runs - run)
        unconfirmed = rows.select(~fooled & ~rows.final)
        over = rows.select(~fooled & rows.final)
        for index, run in zip(over.index.tolist(), over.run.tolist(), strict=True):
            advance(1)
            if run + 1 < self.runs:
                self.waiting.append((index, run + 1))
            else:
                ended += 1
        return [unconfirmed] if len(unconfirmed) else [], ended

    def _kept(self, state: State, count: int) -> State:
        """Memory by image, without gradient, or an error that names the attack."""
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != count:
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise AttackError(
                    f"{self.session.name}: state {name!r} is {came}; expected one row for each of {count} images"
                )
        return {name: value.detach() for name, value in state.items()}

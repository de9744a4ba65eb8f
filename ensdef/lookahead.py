"""Several questions of one run in one batch: what it would ask next is asked along, in case an answer changes nothing.

A random search that is refused stays where it was, so its next question is known before the answer to this one. A
batch with room is filled with such questions. What a step really returned is compared with what was guessed, bit by
bit, and everything after the first difference is thrown away: a wrong guess costs time and cannot change a result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensdef.attack import IterativeAttack
from ensdef.rng import KeyedRandom
from ensdef.rows import SMALLEST_BATCH, Rows
from ensdef.threat import Threat

#: Looking ahead stops where this many of a run's questions ahead are expected to be thrown away.
EXPECTED_SURPRISES = 0.25
#: Weight of the latest batch in the running share of surprises.
FRESH = 0.1


class Lookahead:
    """How far one attack on one target looks ahead, and what became of it.

    Args:
        attack: looked ahead of where it has a ``foresee``.
        threat: norm and radius, as ``attack.step`` is told them.
        checked: keeps points near their clean images, or refuses them.
        seed: of the random numbers of ``attack``.
        ids: image ids by index, (N,).
        room: rows that a batch may be filled up to.
    """

    def __init__(
        self,
        attack: IterativeAttack,
        threat: Threat,
        checked: Callable[[Tensor, Tensor], Tensor],
        seed: int,
        ids: Tensor,
        room: int,
    ) -> None:
        self.attack = attack
        self.threat = threat
        self.checked = checked
        self.seed = seed
        self.ids = ids
        self.room = room
        self.possible = type(attack).foresee is not IterativeAttack.foresee
        #: share of questions after which a run did not stand where it was expected
        self.surprises = 1.0

    def depth(self, rows: Rows) -> int:
        """Questions a run in a batch of these runs; 1: none ahead. None is asked beyond the attack's last step."""
        if not self.possible:
            return 1
        count = len(rows)
        hopeful = max(int(EXPECTED_SURPRISES / self.surprises), 2)  # one ahead, to notice when surprises get rare
        wanted = max(hopeful, -(-SMALLEST_BATCH // count))
        left = self.attack.steps - int(rows.step.max())
        return max(min(wanted, self.room // count, left), 1)

    def extend(self, rows: Rows, depth: int) -> Rows:
        """``rows`` and, behind them, the same runs 1, 2, ... depth - 1 steps on, if nothing changes; (depth * B)."""
        count = len(rows)
        ahead = rows.select(torch.arange(count, device=rows.index.device).repeat(depth))
        ahead.step = ahead.step + torch.arange(depth, device=rows.index.device).repeat_interleave(count)
        later = ahead.select(torch.arange(count, len(ahead), device=rows.index.device))
        rng = KeyedRandom(self.seed, self.ids[later.index], later.run, later.step)
        guess = self.checked(self.attack.foresee(later.x_adv, later.state, self.threat, rng), later.x)
        ahead.x_adv = torch.cat([rows.x_adv, guess.to(rows.x_adv.dtype)])
        return ahead

    def reached(self, asked: Rows, moved: Rows, leaving: Tensor, depth: int) -> tuple[Tensor, int]:
        """Where every run stands now.

        Args:
            asked: what ``extend`` returned.
            moved: the same after the step.
            leaving: rows that ended or were put aside, (depth * B,) bool.
        Returns:
            row numbers in ``moved``, (B,), and how many questions led there.
        """
        count = len(asked) // depth
        surprised = leaving.view(depth, count).clone()
        surprised[:-1] |= _differ(asked.x_adv[count:], moved.x_adv[:-count]).view(depth - 1, count)
        for name, value in moved.state.items():
            surprised[:-1] |= _differ(asked.state[name][count:], value[:-count]).view(depth - 1, count)
        early = surprised.any(dim=0)
        last = torch.where(early, surprised.int().argmax(dim=0), depth - 1)
        questions = int((last + 1).sum())
        share = max(int(early.sum()), 0.5) / questions
        self.surprises += FRESH * (min(share, 1.0) - self.surprises)
        return last * count + torch.arange(count, device=last.device), questions


def _differ(guess: Tensor, came: Tensor) -> Tensor:
    """Rows in which two tensors differ, (B,) bool; a NaN differs from everything."""
    return (guess != came).flatten(1).any(dim=1) if guess.dim() > 1 else guess != came

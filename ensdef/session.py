"""One attack after another on one set of images, and what became of each: the place where success is judged.

Images whose clean prediction is right are attacked; what fools the search model is judged on the true one. Nothing
depends on how rows meet in a batch: random numbers are keyed by image, and normalisation runs on stored statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ensdef.attack import Attack, IterativeAttack, WholeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.errors import AttackError
from ensdef.health.observer import Observer
from ensdef.progress import Advance, Progress
from ensdef.rng import KeyedRandom
from ensdef.rows import SMALLEST_BATCH, Rows, padding
from ensdef.scores import claims
from ensdef.search import Search, UnderWay
from ensdef.target import Target
from ensdef.threat import Threat

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
        #: is called whenever the state is one that an attack can go on from; see ``session_state``
        self.moment: Callable[[], object] = lambda: None
        #: what the present attack has in hand at such a moment; None: it has ended, or not begun
        self.under_way: Callable[[], UnderWay] | None = None

    def enter(self, name: str, part: int, budget: str) -> None:
        """What is to be known of the attack that runs now."""
        self.name = name
        self.part = part
        self.min_norm = budget == "min_norm"
        #: what iterates are kept inside of: shortest-perturbation attacks are compared with eps, not projected
        self.bound = self.threat if budget == "eps" else Threat(None, 0.0)
        #: every part of a composite attack draws from a stream of its own
        self.seed = self.spec.seed + (part << 32)

    def run(
        self,
        attack: Attack,
        target: Target,
        alive: Tensor,
        progress: Progress,
        name: str,
        part: int = 0,
        begun: UnderWay | None = None,
    ) -> None:
        """Attack the images at positions ``alive``.

        Args:
            part: numbers the attacks of a composite one.
            begun: where the attack goes on, in place of ``alive``.
        """
        self.enter(name, part, attack.budget)
        begun = begun or UnderWay([(index, 0) for index in alive.tolist()])
        target.passes.forwards += begun.forwards
        target.passes.backwards += begun.backwards
        runs = attack.runs(self.num_classes) if isinstance(attack, IterativeAttack) else 1
        with progress.task(f"attack {name} eps {self.spec.written or '-'}", begun.left(runs)) as advance:
            if isinstance(attack, WholeAttack):
                target.memory.on = False
                self._run_whole(attack, target, begun, advance)
            else:
                assert isinstance(attack, IterativeAttack)
                search = Search(self, attack, target, begun)
                self.under_way = search.under_way
                search.run(advance)
        self.under_way = None
        self.forwards += target.passes.forwards
        self.backwards += target.passes.backwards

    def _run_whole(self, attack: WholeAttack, target: Target, begun: UnderWay, advance: Advance) -> None:
        left = [index for index, _ in begun.waiting]

        def under_way() -> UnderWay:
            waiting = [(index, 0) for index in left]
            return UnderWay(waiting, forwards=target.passes.forwards, backwards=target.passes.backwards)

        self.under_way = under_way
        while left:
            rows = torch.tensor(left[: attack.batch_size], device=self.x.device)
            x, y = self.x[rows], self.y[rows]
            with torch.random.fork_rng():
                x_adv = attack.perturb(target, x, y, self.threat, KeyedRandom(self.seed, self.ids[rows]))
            target.forget()
            candidate = self.checked(x_adv, x)
            ended = Rows(rows, rows, rows, torch.ones_like(rows, dtype=torch.bool), x, y, candidate, candidate)
            for part in self.split(ended):
                self.judged(part)
            left = left[attack.batch_size :]
            advance(len(rows))
            self.moment()

    def images(self, index: Tensor, target: Target) -> Tensor:
        """Clean images at these positions, (B, ...), in the layout that the target likes best."""
        layout = target.memory_format if self.x.dim() == 4 else torch.contiguous_format
        return self.x[index].contiguous(memory_format=layout)

    def judged(self, rows: Rows) -> Tensor:
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
        fooled = claims(scores, rows.y)
        if self.min_norm:
            fooled &= self.near(rows.candidate, rows.x)
        keep = fooled if self.min_norm else fooled | rows.final
        self.x_adv[rows.index[keep]] = rows.candidate[keep].contiguous()
        fresh = rows.index[fooled]
        self.broken_by[fresh[~self.fooled[fresh]]] = self.part
        self.fooled[fresh] = True
        return fooled

    def near(self, points: Tensor, x: Tensor) -> Tensor:
        """Whether points are within the radius, (B,) bool."""
        return self.threat.distance(points, x) <= self.threat.eps + BALL_SLACK

    def split(self, rows: Rows) -> list[Rows]:
        """In batches."""
        order = torch.arange(len(rows), device=rows.index.device)
        return [rows.select(part) for part in order.split(self.batch_size)]

    def checked(self, x_adv: Any, x: Tensor) -> Tensor:
        """Inside ball and box, or an error that names the attack."""
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
            came = tuple(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
            raise AttackError(f"{self.name} returned {came} where points of shape {tuple(x.shape)} were expected")
        inside = self.bound.project(x_adv.detach(), x)
        if not bool(torch.isfinite(inside).all()):
            raise AttackError(f"{self.name} returned NaN; a division by a zero gradient norm is the usual cause")
        return inside

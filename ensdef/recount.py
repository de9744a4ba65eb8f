"""Forward passes over clean images and stored points: what a record counts, counted again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ensdef.attack_spec import AttackSpec
from ensdef.harness import exact_arithmetic
from ensdef.judging import is_borderline, is_right, scores_of
from ensdef.points import StoredPoints, judged, outside
from ensdef.records import Record
from ensdef.target import Target
from ensdef.threat import Threat


@dataclass(frozen=True)
class Failure:
    """Something that is not as the record says.

    Args:
        ids: of the images it is true of, if it is about images.
    """

    reason: str
    ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.ids:
            return self.reason
        more = f" and {len(self.ids) - 5} more" if len(self.ids) > 5 else ""
        return f"{self.reason}: image{'s' * (len(self.ids) > 1)} {', '.join(map(str, self.ids[:5]))}{more}"


@dataclass(frozen=True)
class Counts:
    """What was counted, in images.

    Args:
        n: images; ``right`` on the clean image; ``robust``, those that are right at their stored point too.
        rounded: points stored in steps of 1/255; ``exact``: in float32.
        borderline: verdicts that rounding decides; the record's were taken.
    """

    n: int
    right: int
    robust: int
    rounded: int
    exact: int
    borderline: int


@dataclass
class Recount:
    """A model, its images and its points, against a record.

    Args:
        x, y: clean images (N, ...) and labels (N,), in the order of the record's outcomes.
        batch_size: of the passes; not the attack's.
    """

    record: Record
    model: nn.Module
    spec: AttackSpec
    x: Tensor
    y: Tensor
    points: StoredPoints
    batch_size: int
    device: torch.device
    borderline: int = 0
    _found: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def failures(self) -> Iterator[Failure]:
        """Everything that is not as the record says, image by image."""
        threat = Threat(self.spec.norm, self.spec.eps_value or 0.0)
        judge = Target(self.model, combiner=self.spec.combiner, fold=False, device=self.device)
        ids, clean, robust = (torch.tensor(self.record.outcomes[name]) for name in ("ids", "clean", "robust"))
        ball = f"{self.spec.norm} {self.spec.written}"
        with exact_arithmetic(self.device):
            for rows in torch.arange(len(ids)).split(self.batch_size):
                right = self._judge(judge, self.x[rows], self.y[rows], clean[rows].bool())
                self._note("right in the record, but wrong on the clean image", ids[rows], clean[rows].bool() & ~right)
                self._note("wrong in the record, but right on the clean image", ids[rows], ~clean[rows].bool() & right)
            for rows in clean.nonzero().squeeze(1).split(self.batch_size):
                points = self.points.at(ids[rows].tolist(), self.x[rows])
                for reason, where in outside(points, self.x[rows], threat).items():
                    told = f"{reason} of {ball} around the image" if "ball" in reason else reason
                    self._note(f"the stored point is {told}", ids[rows], where)
                right = self._judge(judge, judged(points.nan_to_num()), self.y[rows], robust[rows].bool())
                fooled = "fooled in the record, but the stored point does not fool"
                self._note(fooled, ids[rows], ~robust[rows].bool() & right)
                self._note("robust in the record, but the stored point fools", ids[rows], robust[rows].bool() & ~right)
        for reason, images in self._found.items():
            yield Failure(reason, tuple(images))

    def counts(self) -> Counts:
        """What was counted, once there was nothing to say against it."""
        outcomes = self.record.outcomes
        right, exact = sum(outcomes["clean"]), self.points.exact
        return Counts(self.record.n, right, sum(outcomes["robust"]), right - exact, exact, self.borderline)

    def _judge(self, judge: Target, points: Tensor, y: Tensor, told: Tensor) -> Tensor:
        """Whether the answers are right, (B,); where rounding decides, what the record tells."""
        y = y.to(self.device)
        scores = scores_of(judge, points.to(self.device), self.batch_size, check=False)
        right, borderline = is_right(scores, y).cpu(), is_borderline(scores, y).cpu()
        self.borderline += int(borderline.sum())
        return torch.where(borderline, told, right)

    def _note(self, reason: str, ids: Tensor, rows: Tensor) -> None:
        if bool(rows.any()):
            self._found[reason] += ids[rows].tolist()

"""Looks over an attack's shoulder: what the run's own passes tell about gradients, on a few images.

The session announces every step (:meth:`Observer.begin`, :meth:`Observer.end`); in between the target shows each pass
that will be differentiated to a :class:`Glance`, which hooks the gradients. Nothing is asked of the attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ensdef.health.statistics import judged
from ensdef.losses import margin
from ensdef.rows import Rows
from ensdef.target import Target

#: Images looked at in every step, and those whose selection is asked for (a pass of its own).
WATCHED, CHURNED = 64, 12
#: Part of the attack's passes that may go into asking.
ASKED = 0.07
#: Steps of a run whose gain is compared with what the gradient promised.
EARLY = 3
#: Part of the promise that must be kept.
KEPT = 0.1
#: What an observer counts, by image or watched image.
_SEEN = (
    *("ever_wrong", "seen", "zero", "tiny", "kept", "broken", "alike", "against"),
    *("selections", "changes", "selected"),
)


def spread(positions: Tensor, count: int) -> Tensor:
    """At most ``count`` of the positions, evenly spread, (M,)."""
    if len(positions) <= count:
        return positions
    chosen = torch.arange(count, device=positions.device) * len(positions) // count
    return positions[chosen]


@dataclass
class Glance:
    """One step of an attack on the watched rows of one batch.

    Args:
        rows: their row numbers, (M,).
        slots: their numbers among the watched images, (M,).
        batch: rows of the batch, padding included.
        gradients: of whatever the attack differentiates, with respect to the point, (M, D) each.
        slopes: the same with respect to the scores of a view, (M, C) each.
    """

    rows: Tensor
    slots: Tensor
    batch: int
    points: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)

    def saw(self, x: Tensor, result: Tensor) -> None:
        """A pass that keeps a graph from ``x`` to ``result``."""
        if len(x) != self.batch:
            return  # several points an image: no telling which gradient is followed
        if all(x is not point for point in self.points):
            self.points.append(x)
            x.register_hook(lambda gradient: self.gradients.append(gradient.detach()[self.rows].flatten(1).float()))
        self.results.append(result)
        if result.dim() == 2:
            result.register_hook(lambda slope: self.slopes.append(slope.detach()[self.rows].float()))

    @property
    def single(self) -> bool:
        """Whether one loss of one reading at one point was differentiated once."""
        return [len(part) for part in (self.points, self.results, self.gradients, self.slopes)] == [1, 1, 1, 1]


@dataclass
class Memory:
    """Where each watched image was at its last step; leading dimension W."""

    run: Tensor
    step: Tensor
    x: Tensor
    gradient: Tensor
    scores: Tensor
    slope: Tensor
    margin: Tensor
    decides: Tensor


class Observer:
    """What was seen, by watched image (W,) and by image (N,).

    Args:
        y: labels, (N,).
        watched: positions of the images looked at, (W,).
    """

    def __init__(self, y: Tensor, watched: Tensor) -> None:
        self.y = y
        self.watched = watched
        self.slot = torch.full_like(y, -1)
        self.slot[watched] = torch.arange(len(watched), device=y.device)
        #: fooled at some point on the way, by image
        self.ever_wrong = torch.zeros_like(y, dtype=torch.bool)
        count = torch.zeros(len(watched), dtype=torch.int64, device=y.device)
        #: steps with a gradient; those with a zero one, and with one below 1e-12, at points that are right
        self.seen, self.zero, self.tiny = count.clone(), count.clone(), count.clone()
        #: early steps that kept their promise, or broke it
        self.kept, self.broken = count.clone(), count.clone()
        #: steps on which loss and margin moved alike, or against each other
        self.alike, self.against = count.clone(), count.clone()
        #: pairs of steps with a selection, and those between which it changed
        self.selections, self.changes = count.clone(), count.clone()
        self.selected = torch.full_like(count, -1)
        #: member passes made for the observer's sake
        self.spent = 0
        self._asks_selection = judged(len(y))
        self._glance: Glance | None = None
        self._memory: Memory | None = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was seen so far, between two steps: tensors and JSON values that :meth:`restore` takes."""
        tensors = {name: getattr(self, name) for name in _SEEN}
        if self._memory is not None:
            tensors |= {f"memory.{item.name}": getattr(self._memory, item.name) for item in fields(Memory)}
        return tensors, {"spent": self.spent, "asks_selection": self._asks_selection}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what an observer of the same watched images had seen."""
        for name in _SEEN:
            getattr(self, name).copy_(tensors[name])
        self.spent, self._asks_selection = values["spent"], values["asks_selection"]
        if "memory.run" in tensors:
            self._memory = Memory(**{item.name: tensors[f"memory.{item.name}"] for item in fields(Memory)})

    def begin(self, target: Target, rows: Rows, count: int) -> None:
        """Before a step on ``rows``, of which the first ``count`` are real."""
        slots = self.slot[rows.index[:count]]
        found = (slots >= 0).nonzero().squeeze(1)
        self._glance = Glance(found, slots[found], len(rows)) if len(found) else None
        target.witness = self._glance.saw if self._glance else None

    def end(self, target: Target, rows: Rows, count: int, scores: Tensor | None) -> None:
        """After the step, before the target forgets.

        Args:
            scores: of ``predict`` at the points the step was given, if known, (B, C).
        """
        target.witness = None
        if scores is None:
            scores = target.scores_at(rows.x_adv)
        if scores is not None:
            index = rows.index[:count]
            self.ever_wrong[index] |= scores[:count].argmax(dim=1) != rows.y[:count]
        glance, self._glance = self._glance, None
        if glance is None:
            return
        self._look_at_selection(target, rows, glance)
        if glance.gradients:
            right = None if scores is None else scores[glance.rows].argmax(dim=1) == rows.y[glance.rows]
            largest = torch.stack([part.abs().amax(dim=1) for part in glance.gradients]).amax(dim=0)
            at_stake = torch.ones_like(glance.slots, dtype=torch.bool) if right is None else right
            self.seen[glance.slots] += 1
            self.zero[glance.slots] += ((largest == 0) & at_stake).long()
            self.tiny[glance.slots] += ((largest < 1e-12) & at_stake).long()
        self._remember(target, rows, glance, scores)

    def judged(self, rows: Rows, scores: Tensor) -> None:
        """The last point of a run was judged: the one that no step evaluates."""
        memory = self._memory
        if memory is None:
            return
        slots = self.slot[rows.index]
        found = ((slots >= 0) & rows.final).nonzero().squeeze(1)
        slots = slots[found]
        follows = (memory.step[slots] == rows.step[found] - 1) & (memory.run[slots] == rows.run[found])
        found, slots = found[follows & memory.decides[slots]], slots[follows & memory.decides[slots]]
        if len(found):
            self._compare(slots, rows.candidate[found].flatten(1).float(), scores[found].float(), None)

    def _look_at_selection(self, target: Target, rows: Rows, glance: Glance) -> None:
        few = glance.slots < CHURNED
        if not self._asks_selection or not bool(few.any()):
            return
        before, share = target.passes.forwards, target.passes.share
        slots = glance.slots[few]
        if self.spent + len(slots) * len(getattr(target.module, "members", ())) > ASKED * before:
            self.selected[slots] = -1
            return
        target.passes.share = 1.0
        with torch.no_grad():
            selection = target.selection(rows.x_adv[glance.rows[few]])
        made, target.passes.forwards, target.passes.share = target.passes.forwards - before, before, share
        self.spent += made
        if selection is None or selection.shape[1] < 2:
            self._asks_selection = False
            return
        chosen = selection.argmax(dim=1)
        continues = (rows.step[glance.rows[few]] > 0) & (self.selected[slots] >= 0)
        self.selections[slots] += continues.long()
        self.changes[slots] += (continues & (self.selected[slots] != chosen)).long()
        self.selected[slots] = chosen

    def _remember(self, target: Target, rows: Rows, glance: Glance, scores: Tensor | None) -> None:
        """Compare with the step before, and become the step before."""
        own = rows.x_adv[glance.rows].flatten(1)
        single = glance.single and glance.results[0].dim() == 2
        if single:  # a transformed or a look-ahead point is not where the step starts
            single = torch.equal(glance.points[0].detach()[glance.rows].flatten(1), own)
        if not single:
            if self._memory is not None:
                self._memory.step[glance.slots] = -2
            return
        seen = glance.results[0].detach()
        known = target.scores_at(rows.x_adv)
        decides = known is not None and known.data_ptr() == seen.data_ptr()
        here = seen[glance.rows].float()
        y = rows.y[glance.rows]
        margins = None if scores is None else margin(scores[glance.rows].float(), y)
        memory = self._memory
        if memory is None or memory.scores.shape[1] != here.shape[1]:
            memory = self._memory = self._blank(own, here)
        follows = (memory.step[glance.slots] == rows.step[glance.rows] - 1) & (
            memory.run[glance.slots] == rows.run[glance.rows]
        )
        if bool(follows.any()):
            moved = None if margins is None else margins[follows]
            self._compare(glance.slots[follows], own[follows].float(), here[follows], moved)
        memory.run[glance.slots] = rows.run[glance.rows]
        memory.step[glance.slots] = rows.step[glance.rows]
        memory.x[glance.slots] = own.float()
        memory.gradient[glance.slots] = glance.gradients[0]
        memory.scores[glance.slots] = here
        memory.slope[glance.slots] = glance.slopes[0]
        memory.margin[glance.slots] = torch.full_like(here[:, 0], torch.nan) if margins is None else margins
        memory.decides[glance.slots] = decides

    def _compare(self, slots: Tensor, x: Tensor, scores: Tensor, margins: Tensor | None) -> None:
        """What the last step of these images promised, and what it gave.

        To first order in the scores an attack gains (slope of its loss in the scores) * (change of the scores); the
        gradient promised (gradient in the image) * (step). For a linear model both are the same number.
        """
        memory = self._memory
        assert memory is not None
        promise = (memory.gradient[slots].double() * (x - memory.x[slots]).double()).sum(dim=1)
        gain = (memory.slope[slots].double() * (scores - memory.scores[slots]).double()).sum(dim=1)
        towards = promise.sign()
        meant = torch.isfinite(promise) & torch.isfinite(gain) & (promise != 0)
        early = meant & (memory.step[slots] < EARLY)
        kept = gain * towards > KEPT * promise.abs()
        self.kept[slots] += (early & kept).long()
        self.broken[slots] += (early & ~kept).long()
        if margins is not None:
            change = (margins - memory.margin[slots]).double()
            told = meant & kept & torch.isfinite(change) & (change != 0)
            same = change > 0  # whichever way the attack goes, it means the margin to rise
            self.alike[slots] += (told & same).long()
            self.against[slots] += (told & ~same).long()

    def _blank(self, points: Tensor, scores: Tensor) -> Memory:
        w = len(self.watched)
        number = torch.full((w,), -2, dtype=torch.int64, device=points.device)
        wide, narrow = points.new_zeros(w, points.shape[1]), scores.new_zeros(w, scores.shape[1])
        wide = wide.float()
        return Memory(
            number.clone(),
            number.clone(),
            wide,
            wide.clone(),
            narrow,
            narrow.clone(),
            narrow[:, 0] * torch.nan,
            number > 0,
        )

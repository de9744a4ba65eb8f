"""Attacks made for ensembles: per-image worst case over many differentiable views of one ensemble, after On Adaptive
Attacks to Adversarial Example Defenses (Tramer, Carlini, Brendel, Madry; NeurIPS 2020, arXiv:2002.08347).

Which parts there are follows from what a defence declares (its views, its combiner, its selection), so that a new one
gets them for free. Every part attacks what those before it left; success is judged on ``predict`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from ensdef.attacks import _objectives as objectives
from ensdef.attacks._autoattack import AutoAttack
from ensdef.attacks._objectives import Objective, Reading
from torch import Tensor

from ensdef.attack import Attack, CompositeAttack, IterativeAttack, State, register_attack, require_gradient
from ensdef.combine import log_probs
from ensdef.errors import UsageError
from ensdef.losses import cross_entropy, margin, targeted_margin
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat

#: What is raised: target, points (B, ...), labels, classes aimed at, shares of the run done, each (B,) -> (B,).
Value = Callable[[Target, Tensor, Tensor, Tensor, Tensor], Tensor]

#: Wrong classes that targeted parts aim at, as in AutoAttack.
TARGETS = 9
#: Passes over a random defence whose mean is followed.
DRAWS = 10


@dataclass(frozen=True)
class AdaptiveParams:
    """Settings of ``adaptive``.

    Args:
        budget: ``quick``: runs of ``steps``; ``full``: more steps, restarts and weights, then AutoAttack itself on what
            is left.
        steps: gradient steps of a part; targeted parts of the decision take twice, ``full`` takes four times as many.
    """

    budget: Literal["quick", "full"] = "quick"
    steps: int = 20

    def __post_init__(self) -> None:
        at_least("", steps=(self.steps, 1))


@register_attack("adaptive")
class Adaptive(CompositeAttack):
    """Worst case over many views of one ensemble: its decision, its members, and what its combiner hides."""

    Params = AdaptiveParams

    def fits(self, traits: Traits) -> None:
        if not traits.differentiable:
            require_gradient("predict", traits)

    def parts(self, traits: Traits) -> Sequence[tuple[str, Attack]]:
        effort = 1 if self.params.budget == "quick" else 4
        found = list(_parts(traits, effort, self.params.steps))
        if self.params.budget == "full":
            last = AutoAttack()
            last.warnings = self.warnings
            try:
                last.fits(traits)
                found.append(("autoattack", last))
            except UsageError as error:
                self.warnings.append(f"left out: {error}")
        return found


@dataclass(frozen=True)
class PartParams:
    """Settings of one part.

    Args:
        steps: gradient steps of a run.
        restarts: runs from other random starts.
        targets: runs for that many wrong classes, the likeliest first; 0: untargeted.
    """

    steps: int
    restarts: int = 1
    targets: int = 0


class Part(IterativeAttack):
    """Projected ascent on one value with steps that shrink along a half cosine, from a random start."""

    Params = PartParams

    def __init__(self, params: PartParams, value: Value) -> None:
        super().__init__(params)
        self.value = value

    def runs(self, num_classes: int) -> int:
        return int(self.params.restarts) * max(1, int(self.params.targets))

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        state = {"x_adv": threat.random_start(x, rng), "wrong": y}
        if self.params.targets:
            with torch.no_grad():
                logits = target.member_logits(x)
                scores = target(x) if logits is None else log_probs(logits).mean(dim=0)
            ranked = scores.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
            state["wrong"] = ranked.gather(1, (rng.run % self.params.targets)[:, None]).squeeze(1)
        return state

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        progress = (rng.step - 1) / self.steps
        point = x_adv.detach().requires_grad_()
        raised = self.value(target, point, y, state["wrong"], progress)
        if not raised.requires_grad:  # members without gradient behind a view that has one
            return x_adv.detach(), {**state, "done": torch.ones_like(y, dtype=torch.bool)}
        gradient = torch.autograd.grad(raised.sum(), point)[0]
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        # from the radius down to a fiftieth of it: far first, exact in the end
        size = threat.eps * (0.02 + 0.49 * (1 + torch.cos(math.pi * progress)))
        return x_adv.detach() + size.view(-1, *[1] * (x_adv.dim() - 1)) * threat.ascent(gradient), state


def _parts(traits: Traits, effort: int, steps: int) -> Iterator[tuple[str, Attack]]:
    targets = min(TARGETS, traits.num_classes - 1)

    def part(value: Value, targeted: bool = False, longer: int = 1) -> Part:
        return Part(PartParams(steps * effort * longer, 1 if targeted else effort, targets if targeted else 0), value)

    # the decision, every other view of it, and each member alone
    for view in sorted(traits.differentiable, key=lambda name: name != "predict"):
        if view == "predict" and traits.random:
            yield "predict, mean of draws", part(_expected)
        if view == "predict":
            yield "predict, cross-entropy", part(_of_view(view, cross_entropy))
        yield f"{view}, margin", part(_of_view(view, margin))
        if view == "predict":
            yield "predict, targeted", part(_of_view(view, None), targeted=True, longer=2)
    if traits.members < 2:
        return
    for name, objective in _suite(traits):
        yield name, part(_of_members(objective))
    for name, objective in _targeted_suite(traits):
        yield name, part(_of_members(objective), targeted=True)
    if traits.selects:
        for name, objective in _choosing_suite(traits, effort):
            yield name, part(_of_members(objective, selects=True))
        for member in range(traits.members):
            chosen = _of_members(objectives.sure_and_wrong(member), selects=True)
            yield f"member{member} chosen and wrong", part(chosen, targeted=True)


def _suite(traits: Traits) -> Iterator[tuple[str, Objective]]:
    """Untargeted objectives: those of every ensemble, then those of its combiner."""
    yield "members, cross-entropy", objectives.summed_cross_entropy
    yield "members, margins", objectives.summed_margins
    yield "members still right", objectives.members_still_right
    yield "easiest member first", objectives.easiest_first
    yield "hardest member first", objectives.hardest_first
    if traits.combiner == "vote":
        yield "cheapest majority", objectives.cheapest_majority
        for temperature in (0.2, 5.0):
            yield f"soft vote at {temperature:g}", objectives.soft_vote(temperature)
    if traits.combiner == "max":
        yield "nobody sure of the truth", objectives.nobody_sure_of_the_truth
        for temperature in (0.3, 0.1):
            yield f"smooth maximum at {temperature:g}", objectives.smooth_maximum(temperature)
    if traits.selects:
        yield "all members wrong", objectives.all_wrong


def _choosing_suite(traits: Traits, effort: int) -> Iterator[tuple[str, Objective]]:
    """Untargeted objectives against selectors and gates, which look at the choice besides."""
    gate = traits.combiner == "gate"
    yield "soft choice, hardening", objectives.soft_choice(1.0, 0.01)
    yield "soft choice at 10", objectives.soft_choice(10.0, 10.0)
    for member in range(traits.members):
        for weight in (1.0,) if effort == 1 else (0.1, 1.0, 10.0):
            yield (
                f"fool member{member}, have it chosen ({weight:g})",
                objectives.fool_and_select(member, weight, gate=gate),
            )
        yield (
            f"have member{member} chosen, then fool it",
            objectives.fool_and_select(member, 1.0, steer=0.4, gate=gate),
        )


def _targeted_suite(traits: Traits) -> Iterator[tuple[str, Objective]]:
    """Objectives that aim at a class."""
    yield "members, one class", objectives.shared_class
    if traits.combiner == "vote":
        yield "cheapest majority, one class", objectives.cheapest_majority_for_a_class
    for member in range(traits.members):
        if traits.combiner == "max":
            yield f"member{member} the loudest", objectives.loudest_member(member)


def _of_view(view: str, loss: Callable[[Tensor, Tensor], Tensor] | None) -> Value:
    """A loss of the scores of a view; None: the margin to the class aimed at."""

    def value(target: Target, x: Tensor, y: Tensor, wrong: Tensor, progress: Tensor) -> Tensor:
        scores = target.views[view](x)
        return targeted_margin(scores, y, wrong) if loss is None else loss(scores, y)

    return value


def _expected(target: Target, x: Tensor, y: Tensor, wrong: Tensor, progress: Tensor) -> Tensor:
    """Mean margin over draws of a random defence (expectation over transformation, Athalye et al., ICML 2018)."""
    return torch.stack([margin(target(x), y) for _ in range(DRAWS)]).mean(dim=0)


def _of_members(objective: Objective, selects: bool = False) -> Value:
    def value(target: Target, x: Tensor, y: Tensor, wrong: Tensor, progress: Tensor) -> Tensor:
        with target.sharing():
            logits = target.member_logits(x)
            selection = target.selection(x) if selects else None
        assert logits is not None
        raised: Tensor = objective(Reading(logits, selection, y, wrong, progress))
        return raised

    return value

"""Member passes: counted once, remembered for a second reading, shared where one backward pass serves several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensdef.attack import IterativeAttack, State, register_attack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.harness import attack_model
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat

MEMBERS = 3


class Mean(EnsembleDefense):
    """A plain ensemble of linear members."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError


def target() -> Target:
    generator = torch.Generator().manual_seed(0)
    return Target(Mean([LinearClassifier(torch.randn(4, 64, generator=generator)) for _ in range(MEMBERS)]))


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_second_reading_of_one_point_costs_no_pass() -> None:
    model, x = target(), images()
    with torch.no_grad():
        logits = model.member_logits(x)
        scores = model(x)
    assert model.passes.forwards == 5 * MEMBERS
    assert logits is not None
    fresh = target()
    assert torch.equal(scores, fresh(x))


def test_the_verdict_is_read_off_the_pass_that_gave_the_gradient() -> None:
    model, x = target(), images()
    point = x.detach().requires_grad_()
    torch.autograd.grad(model.views["mean_logit"](point).sum(), point)
    with torch.no_grad():
        scores = model(x)
    assert (model.passes.forwards, model.passes.backwards) == (5 * MEMBERS, 5 * MEMBERS)
    assert not scores.requires_grad


def test_a_second_gradient_takes_a_second_pass() -> None:
    model, point = target(), images().requires_grad_()
    first = torch.autograd.grad(model.views["mean_logit"](point).sum(), point)[0]
    second = torch.autograd.grad(model.views["mean_logit"](point).sum(), point)[0]
    assert torch.equal(first, second)
    assert model.passes.forwards == 10 * MEMBERS


def test_readings_that_share_take_one_pass_and_one_backward() -> None:
    model, point = target(), images().requires_grad_()
    with model.sharing():
        value = model.member_logits(point).sum() + model(point).sum()  # type: ignore[union-attr]
    gradient = torch.autograd.grad(value, point)[0]
    assert (model.passes.forwards, model.passes.backwards) == (5 * MEMBERS, 5 * MEMBERS)
    apart = target()
    expected = sum(
        torch.autograd.grad(read(point).sum(), point)[0]  # type: ignore[misc]
        for read in (apart.member_logits, apart)
    )
    torch.testing.assert_close(gradient, expected)


def test_a_pass_without_graph_is_not_shared_with_who_needs_one() -> None:
    model, point = target(), images().requires_grad_()
    with torch.no_grad():
        model(point)
    with model.sharing():
        gradient = torch.autograd.grad(model(point).sum(), point)[0]
    assert bool((gradient != 0).any())


@pytest.mark.parametrize("change", ["copy", "written", "forgotten", "off"])
def test_nothing_is_remembered_of(change: str) -> None:
    model, x = target(), images()
    if change == "off":
        model.memory.on = False
    with torch.no_grad():
        model(x)
        if change == "copy":
            x = x.clone()
        if change == "written":
            x.add_(0.1)
        if change == "forgotten":
            model.forget()
        model(x)
    assert model.passes.forwards == 10 * MEMBERS


def test_an_answer_somebody_wrote_into_is_asked_for_again() -> None:
    class Scaling(Mean):
        def member_logits(self, x: Tensor) -> Tensor:
            return torch.stack([member(x).mul_(2) for member in self.members])

    made = target()
    model = Target(Scaling(list(made.module.members)))
    x = images()
    with torch.no_grad():
        first, second = model.member_logits(x), model.member_logits(x)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert model.passes.forwards == 10 * MEMBERS


def test_a_member_asked_another_question_answers_anew() -> None:
    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, both: bool = False) -> Any:
            logits = self.inner(x)
            return (logits, logits.sum(dim=1)) if both else logits

    class Pairs(Mean):
        def predict(self, x: Tensor) -> Tensor:
            return torch.stack([member(x, both=True)[0] for member in self.members]).mean(dim=0)

    model = Target(Pairs([Pair(member) for member in target().module.members]))
    x = images()
    with torch.no_grad():
        model.member_logits(x)
        model(x)
        model(x)
    assert model.passes.forwards == 10 * MEMBERS


def test_a_run_may_end_early() -> None:
    name = "toy_impatient"

    class Impatient(IterativeAttack):
        """Ends the run of every second image after its first step."""

        random = False

        @property
        def steps(self) -> int:
            return 5

        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
            return {"odd": rng.ids % 2 == 1}

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            target(x_adv)
            return x_adv, {**state, "done": state["odd"]}

    register_attack(name)(Impatient)
    try:
        model = target().module.members[0]
        x = images(40)
        with torch.no_grad():
            y = model(x).argmax(dim=1)
        outcome = attack_model(model, x, y, AttackSpec.create(name, {}, "linf", 0.1))
    finally:
        ATTACKS._registered.pop(name)
    assert bool(outcome.robust.all())
    # a pass a step, and one by the judge at the end of the run
    assert outcome.forwards == 20 * (5 + 1) + 20 * (1 + 1)

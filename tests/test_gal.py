"""Gradient alignment: the smooth maximum of the cosines between members' input gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.gal import DiversityTraining, GalHyper, coherence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys_defense import ARCHITECTURE, CLASSES, SHAPE, generator, number, spread
from toys_gradients import moved_by, per_image_gradients, slopes

from ensdef.build import create_defense
from ensdef.defense import Batch
from ensdef.errors import UsageError
from ensdef.gradients import pairwise_cosines
from ensdef.losses import cross_entropy, member_cross_entropy

quick = settings(deadline=None, max_examples=60, derandomize=True)


def defense_of(members: int = 3, architecture: str = ARCHITECTURE, **hyper: Any) -> DiversityTraining:
    """In eval mode and float64."""
    defense = create_defense(
        "gal", architecture=architecture, members=members, num_classes=CLASSES, image_shape=SHAPE, **hyper
    )
    assert isinstance(defense, DiversityTraining)
    spread(defense)
    return defense.double()


def batch(count: int = 6, dtype: torch.dtype = torch.float64) -> Batch:
    x = torch.rand(count, *SHAPE, generator=generator(), dtype=dtype)
    return Batch(x, torch.arange(count) % CLASSES, torch.arange(count), (), generator())


class Stub:
    """Stands in for the trainer's adversary: mirrors the images and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor]] = []

    def __call__(self, objective: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        assert not any(options.values())
        self.calls.append((objective, x, y))
        return 1 - x


def plain_gal(defense: DiversityTraining, x: Tensor, y: Tensor, weight: float) -> dict[str, float]:
    """The loss as the paper writes it, image by image and pair by pair."""
    ce, lse = 0.0, 0.0
    gradients = [
        per_image_gradients(lambda image, label, m=m: -m(image).softmax(dim=1)[0, label].log().sum(), x, y).numpy()
        for m in defense.members
    ]
    for b in range(len(x)):
        probabilities = [member(x[b : b + 1]).softmax(dim=1)[0, y[b]] for member in defense.members]
        ce += sum(-math.log(number(p)) for p in probabilities) / len(probabilities)
        terms = []
        for i in range(len(gradients)):
            for j in range(i + 1, len(gradients)):
                g, h = gradients[i][b], gradients[j][b]
                terms.append(math.exp(g @ h / np.linalg.norm(g) / np.linalg.norm(h)))
        lse += math.log(sum(terms) + 1e-20)
    return {"ce": ce / len(x), "coherence": weight * lse / len(x)}


# --- the smooth maximum ---------------------------------------------------------------------------


def test_three_cosines_give_the_worked_example() -> None:
    assert number(coherence(torch.tensor([[0.5], [0.0], [-0.5]])).squeeze()) == pytest.approx(1.180270, abs=1e-6)


BOUNDS = [(2, -1.0, 1.0), (3, 0.5986, 2.0986), (5, 2.0526, 3.3026), (8, 3.1893, 4.3322)]


@pytest.mark.parametrize(("members", "low", "high"), BOUNDS)
def test_it_is_bounded_by_the_number_of_members(members: int, low: float, high: float) -> None:
    pairs = members * (members - 1) / 2
    assert math.log(pairs) - 1 / (members - 1) == pytest.approx(low, abs=1e-4)
    assert math.log(pairs) + 1 == pytest.approx(high, abs=1e-4)
    gradients = torch.randn(members, 200, members + 1, generator=generator(), dtype=torch.float64)
    values = coherence(pairwise_cosines(gradients))
    assert bool((values >= low - 1e-4).all())
    assert bool((values <= high + 1e-4).all())


@pytest.mark.parametrize(("members", "low", "high"), BOUNDS)
def test_equal_gradients_reach_the_upper_bound_and_a_simplex_the_lower(members: int, low: float, high: float) -> None:
    equal = torch.randn(1, 4, 9, generator=generator()).expand(members, 4, 9)
    assert coherence(pairwise_cosines(equal)).tolist() == pytest.approx([high] * 4, abs=1e-4)
    simplex = (torch.eye(members) - 1 / members)[:, None]
    assert coherence(pairwise_cosines(simplex)).tolist() == pytest.approx([low], abs=1e-4)


@quick
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=10))
def test_it_is_a_sum_over_pairs_not_their_mean(cosines: list[float]) -> None:
    value = number(coherence(torch.tensor(cosines, dtype=torch.float64)[:, None]).squeeze())
    assert value == pytest.approx(math.log(sum(math.exp(cosine) for cosine in cosines) + 1e-20), abs=1e-12)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [2, 3, 4])
def test_the_terms_are_those_of_a_plain_rewrite(members: int) -> None:
    defense, given_batch = defense_of(members, coherence_weight=0.7), batch()
    terms = defense.loss(given_batch, 0.0)
    assert {name: number(value) for name, value in terms.items()} == pytest.approx(
        plain_gal(defense, given_batch.x, given_batch.y, 0.7), rel=1e-9
    )


def test_the_sum_over_members_is_an_option() -> None:
    mean, summed = (defense_of(reduction=how, adversarial=True) for how in ("mean", "sum"))
    for defense in (mean, summed):
        defense._adversary = Stub()
    ours, theirs = mean.loss(batch(), 0.0), summed.loss(batch(), 0.0)
    torch.testing.assert_close(3 * ours["ce"], theirs["ce"])
    torch.testing.assert_close(3 * ours["adv_ce"], theirs["adv_ce"])
    torch.testing.assert_close(ours["coherence"], theirs["coherence"])


def test_without_weight_the_loss_is_the_members_mean_cross_entropy() -> None:
    defense, given_batch = defense_of(coherence_weight=0.0), batch()
    expected = member_cross_entropy(defense.member_logits(given_batch.x), given_batch.y).mean()
    torch.testing.assert_close(torch.stack(list(defense.loss(given_batch, 0.0).values())).sum(), expected)


@pytest.mark.parametrize("members", [2, 4])
def test_identical_members_reach_the_upper_bound(members: int) -> None:
    defense = defense_of(members, coherence_weight=1.0)
    defense.members = nn.ModuleList(copy.deepcopy(defense.members[0]) for _ in range(members))
    pairs = members * (members - 1) / 2
    assert number(defense.loss(batch(), 0.0)["coherence"]) == pytest.approx(math.log(pairs) + 1, abs=1e-12)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_the_order_of_members_changes_nothing(order: list[int]) -> None:
    defense = defense_of()
    before = defense.loss(batch(), 0.0)
    defense.members = nn.ModuleList(defense.members[i] for i in order)
    torch.testing.assert_close(defense.loss(batch(), 0.0), before)


def test_the_coherence_moves_every_parameter_of_every_member() -> None:
    defense = defense_of()
    assert moved_by(defense.loss(batch(), 0.0)["coherence"], defense.members) == [True] * 3


@pytest.mark.parametrize("name", ["ce", "coherence"])
def test_no_part_of_the_loss_is_detached(name: str) -> None:
    defense, given_batch = defense_of(2), batch(4)
    by_autograd, by_differences = slopes(defense, lambda: defense.loss(given_batch, 0.0)[name])
    assert by_autograd == pytest.approx(by_differences, rel=1e-4)
    assert abs(by_autograd) > 1e-3


def test_a_step_along_the_gradient_turns_the_members_apart() -> None:
    defense, given_batch = defense_of(), batch()
    before = defense.loss(given_batch, 0.0)["coherence"]
    parameters = list(defense.members.parameters())
    gradients = torch.autograd.grad(before, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(1e-3 * gradient)
    assert number(defense.loss(given_batch, 0.0)["coherence"]) < number(before)


@pytest.mark.parametrize("height", [1e2, 1e4])
def test_images_of_near_certain_class_give_finite_values_and_slopes(height: float) -> None:
    defense, given_batch = defense_of().float(), batch(dtype=torch.float32)
    with torch.no_grad():
        for member in defense.members:
            member.classifier.weight.mul_(height)
    terms = defense.loss(given_batch, 0.0)
    gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(defense.parameters()))
    assert all(bool(torch.isfinite(value).all()) for value in [*terms.values(), *gradients])


# --- the defence ----------------------------------------------------------------------------------


def test_one_pass_over_the_images_serves_both_terms() -> None:
    defense = defense_of().train()
    passes = [0, 0, 0]
    for index, member in enumerate(defense.members):
        member.register_forward_hook(lambda *_, index=index: passes.__setitem__(index, passes[index] + 1))
    defense.loss(batch(), 0.0)
    assert passes == [1, 1, 1]


def test_the_batch_is_left_as_it_was() -> None:
    defense, given_batch = defense_of(), batch()
    before = given_batch.x.clone()
    sum(defense.loss(given_batch, 0.0).values()).backward()  # type: ignore[union-attr]
    assert not given_batch.x.requires_grad
    assert given_batch.x.grad is None
    assert torch.equal(given_batch.x, before)


def test_adversarial_training_adds_the_cross_entropy_on_examples_against_the_ensemble() -> None:
    plain, defense, stub, given_batch = defense_of(), defense_of(adversarial=True), Stub(), batch()
    defense._adversary = stub
    terms, expected = defense.loss(given_batch, 0.0), plain.loss(given_batch, 0.0)
    assert terms.keys() == {"ce", "coherence", "adv_ce"}
    assert [objective for objective, _, _ in stub.calls] == [defense]
    assert torch.equal(stub.calls[0][1], given_batch.x)
    assert torch.equal(stub.calls[0][2], given_batch.y)
    for name, value in expected.items():  # the coherence stays that of clean images
        torch.testing.assert_close(terms[name], value)
    losses = [cross_entropy(member(1 - given_batch.x), given_batch.y).mean() for member in defense.members]
    torch.testing.assert_close(terms["adv_ce"], torch.stack(losses).mean())


def test_only_adversarial_training_meets_attacks() -> None:
    assert not DiversityTraining.trains_on_attacks(GalHyper())
    assert DiversityTraining.trains_on_attacks(GalHyper(adversarial=True))


def activations(defense: DiversityTraining) -> set[type]:
    return {type(part) for part in defense.modules() if isinstance(part, nn.ReLU | nn.LeakyReLU)}


def test_members_have_leaky_relus_unless_the_user_says_otherwise() -> None:
    assert activations(defense_of()) == {nn.LeakyReLU}
    assert activations(defense_of(architecture="small_resnet[width=4,activation=relu]")) == {nn.ReLU}


def test_the_members_probabilities_are_averaged() -> None:
    defense, x = defense_of(), batch().x
    mean = torch.stack([member(x).softmax(dim=1) for member in defense.members]).mean(dim=0)
    torch.testing.assert_close(defense(x).exp(), mean)


def test_one_member_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gal with 1 member has no two gradients.*at least 2"):
        defense_of(members=1)


def test_a_negative_weight_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"gal: coherence_weight is -0\.5; expected at least 0"):
        defense_of(coherence_weight=-0.5)

"""The undefended ensemble and adversarial training: sums of members' cross-entropies, on clean or crafted images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.baseline import Adversarial, AdversarialEnsemble, AdversarialHyper, Natural, NaturalHyper
from torch import Tensor, nn
from toys_defense import CLASSES, SHAPE, generator, number, spread

from ensdef.build import create_defense
from ensdef.defense import Batch, EnsembleDefense
from ensdef.losses import cross_entropy
from ensdef.recipe import InnerAttack
from ensdef.testing import LinearClassifier, lend_adversary

EPS = 0.1


def linear(seed: int, classes: int = 3, size: int = 4) -> LinearClassifier:
    return LinearClassifier(torch.randn(classes, size, generator=generator(seed)))


def constant(*logits: float) -> LinearClassifier:
    return LinearClassifier(torch.zeros(len(logits), 4), torch.tensor(logits, dtype=torch.float32))


def batch(count: int = 16, classes: int = 3, shape: tuple[int, ...] = (4,), seed: int = 0) -> Batch:
    x = torch.rand(count, *shape, generator=generator(seed))
    return Batch(x, torch.arange(count) % classes, torch.arange(count), (), generator(seed))


def total(defense: EnsembleDefense, given: Batch) -> Tensor:
    terms: Any = defense.loss(given, 0.0)
    return torch.stack(list(terms.values())).sum()


def numpy_cross_entropy(members: list[LinearClassifier], x: Tensor, y: Tensor) -> np.ndarray:
    """(K, B) by the textbook: minus the logarithm of the softmax."""
    losses = []
    for member in members:
        scores = x.double().numpy() @ member.weight.detach().double().numpy().T + member.bias.detach().double().numpy()
        probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        losses.append(-np.log(probabilities[np.arange(len(y)), y.numpy()]))
    return np.array(losses)


def network(name: str, members: int = 2, **hyper: Any) -> EnsembleDefense:
    defense = create_defense(
        name,
        architecture="small_resnet[width=4]",
        members=members,
        num_classes=CLASSES,
        image_shape=SHAPE,
        **hyper,
    )
    spread(defense)
    return defense


class Crafting:
    """Stands in for the trainer's adversary: returns the given images and remembers how it was called."""

    def __init__(self, x_adv: Tensor) -> None:
        self.x_adv = x_adv
        self.calls: list[tuple[Any, Tensor, Tensor | None, dict[str, Any]]] = []

    def __call__(self, objective: Any, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        self.calls.append((objective, x, y, {name: value for name, value in options.items() if value}))
        return self.x_adv


# --- the undefended ensemble ----------------------------------------------------------------------


def test_the_natural_loss_is_the_sum_over_members_of_the_mean_cross_entropy() -> None:
    members, given = [linear(0), linear(1), linear(2)], batch()
    terms = Natural(members, NaturalHyper()).loss(given, 0.0)
    assert list(terms) == ["ce"]
    expected = numpy_cross_entropy(members, given.x, given.y).mean(axis=1).sum()
    assert number(terms["ce"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cls", [Natural, AdversarialEnsemble])
def test_the_mean_reduction_divides_by_the_number_of_members(cls: Any) -> None:
    members, given = [linear(0), linear(1), linear(2)], batch()
    losses = []
    for reduction in ("sum", "mean"):
        defense = cls(members, cls.Hyper(reduction=reduction))
        lend_adversary(defense, EPS)
        losses.append(number(total(defense, given)))
    assert losses[0] == pytest.approx(3 * losses[1], rel=1e-5)


def test_a_member_s_loss_gives_no_other_member_a_gradient() -> None:
    members, given = [linear(0), linear(1)], batch()
    alone = Natural(members[:1], NaturalHyper())
    assert torch.autograd.grad(total(alone, given), members[1].weight, allow_unused=True) == (None,)
    together = torch.autograd.grad(total(Natural(members, NaturalHyper()), given), members[0].weight)[0]
    torch.testing.assert_close(together, torch.autograd.grad(total(alone, given), members[0].weight)[0])


def test_a_change_of_one_member_leaves_the_other_s_gradient_alone() -> None:
    given, gradients = batch(), []
    for seed in (1, 2):
        first = linear(0)
        loss = total(Natural([first, linear(seed)], NaturalHyper()), given)
        gradients.append(torch.autograd.grad(loss, first.weight)[0])
    assert torch.equal(*gradients)


def test_one_member_answers_with_its_own_softmax() -> None:
    member, x = linear(0), batch().x
    torch.testing.assert_close(Natural([member], NaturalHyper()).predict(x).exp(), member(x).softmax(dim=1))


def test_the_prediction_is_the_logarithm_of_the_averaged_probability() -> None:
    defense = Natural([constant(2, 0, 0), constant(0, 1, 0)], NaturalHyper())
    x, y = torch.rand(1, 4), torch.tensor([0])
    assert number(cross_entropy(defense.predict(x), y)) == pytest.approx(0.694220, abs=1e-6)
    assert number(defense.loss(Batch(x, y, y), 0.0)["ce"]) / 2 == pytest.approx(0.895495, abs=1e-6)


@pytest.mark.parametrize("cls", [Natural, AdversarialEnsemble])
def test_the_order_of_members_does_not_change_the_prediction(cls: Any) -> None:
    members, x = [linear(0), linear(1), linear(2)], batch().x
    scores = [cls(order, cls.Hyper()).predict(x) for order in (members, members[::-1], [*members[1:], members[0]])]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_only_the_undefended_ensemble_trains_without_attacks() -> None:
    assert not Natural.trains_on_attacks(NaturalHyper())
    assert AdversarialEnsemble.trains_on_attacks(AdversarialHyper())
    defense = Natural([linear(0)], NaturalHyper())
    defense.loss(batch(), 0.0)  # would raise: no adversary was lent


# --- adversarial training -------------------------------------------------------------------------


def test_the_whole_ensemble_is_attacked_once_with_the_true_labels() -> None:
    given = batch()
    defense = AdversarialEnsemble([linear(0), linear(1)], AdversarialHyper())
    crafting = Crafting(given.x)
    defense._adversary = crafting
    defense.loss(given, 0.0)
    ((objective, x, y, options),) = crafting.calls
    assert objective is defense
    assert x is given.x
    assert y is given.y
    assert not options


def test_the_adversarial_loss_is_the_sum_of_the_members_own_losses_on_the_crafted_images() -> None:
    members, given = [linear(0), linear(1), linear(2)], batch()
    x_adv = batch(seed=9).x
    defense = AdversarialEnsemble(members, AdversarialHyper())
    defense._adversary = Crafting(x_adv)
    terms = defense.loss(given, 0.0)
    assert list(terms) == ["adv_ce"]
    expected = numpy_cross_entropy(members, x_adv, given.y).mean(axis=1)
    assert number(terms["adv_ce"]) == pytest.approx(expected.sum(), rel=1e-5)
    singles = []
    for member in members:
        single = AdversarialEnsemble([member], AdversarialHyper())
        single._adversary = Crafting(x_adv)
        singles.append(number(total(single, given)))
    assert singles == pytest.approx(list(expected), rel=1e-5)


def test_the_adversarial_loss_is_not_that_of_the_averaged_prediction() -> None:
    defense = AdversarialEnsemble([constant(2, 0, 0), constant(0, 1, 0)], AdversarialHyper())
    lend_adversary(defense, EPS)
    loss = number(total(defense, Batch(torch.rand(1, 4), torch.tensor([0]), torch.tensor([0]))))
    assert loss == pytest.approx(2 * 0.895495, abs=2e-6)
    assert abs(loss - 2 * 0.694220) > 0.1


def test_an_ensemble_of_one_member_trains_like_a_single_adversarially_trained_network() -> None:
    given, losses = batch(), []
    for cls in (AdversarialEnsemble, Adversarial):
        defense = cls([linear(0)], AdversarialHyper(clean_term=True))
        lend_adversary(defense, EPS, seed=4)
        losses.append(defense.loss(given, 0.0))
    assert losses[0].keys() == losses[1].keys() == {"adv_ce", "ce"}
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_a_single_network_stays_single_whatever_number_of_members_is_asked_for() -> None:
    assert len(network("adv", members=3).members) == 1
    assert len(network("adv_en", members=3).members) == 3


@pytest.mark.parametrize("members", [1, 2])
def test_with_a_clean_term_and_radius_zero_the_loss_is_twice_the_cross_entropy(members: int) -> None:
    networks, given = [linear(seed) for seed in range(members)], batch()
    defense = AdversarialEnsemble(networks, AdversarialHyper(clean_term=True))
    lend_adversary(defense, eps=0.0)
    expected = 2 * numpy_cross_entropy(networks, given.x, given.y).mean(axis=1).sum()
    assert number(total(defense, given)) == pytest.approx(expected, rel=1e-5)


def test_without_the_clean_term_radius_zero_gives_the_undefended_loss() -> None:
    members, given = [linear(0), linear(1)], batch()
    defense = AdversarialEnsemble(members, AdversarialHyper())
    lend_adversary(defense, eps=0.0)
    torch.testing.assert_close(total(defense, given), total(Natural(members, NaturalHyper()), given))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_training_images_stay_in_the_ball_and_in_the_box(norm: str) -> None:
    defense, given = network("adv_en"), batch(12, CLASSES, SHAPE)
    given.x[0], given.x[1] = 0.0, 1.0
    x_adv = lend_adversary(defense, EPS, norm)(defense, given.x, given.y)
    delta = (x_adv - given.x).flatten(1)
    size = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert number(size.max()) <= EPS + 1e-6
    assert number(size.max()) > 0.5 * EPS
    assert number(x_adv.min()) >= 0
    assert number(x_adv.max()) <= 1
    assert not x_adv.requires_grad


def test_crafted_images_are_harder_than_clean_ones() -> None:
    defense, given = network("adv_en").eval(), batch(20, CLASSES, SHAPE)
    x_adv = lend_adversary(defense, EPS, attack=InnerAttack(steps=10))(defense, given.x, given.y)
    with torch.no_grad():
        harder = cross_entropy(defense(x_adv), given.y) >= cross_entropy(defense(given.x), given.y)
    assert harder.float().mean() > 0.9


def test_the_attack_moves_along_the_sign_of_the_gradient_of_the_averaged_probability() -> None:
    members = [constant(1, 0, 0), linear(3), linear(4)]
    defense = AdversarialEnsemble(members, AdversarialHyper())
    given = batch()
    x = 0.3 + 0.4 * given.x  # away from the box
    attack = InnerAttack(steps=1, step_size="eps", start="zero")
    x_adv = lend_adversary(defense, 0.01, attack=attack)(defense, x, given.y)
    probe = x.clone().requires_grad_()
    mean = torch.stack([member(probe).softmax(dim=1) for member in members]).mean(dim=0)
    loss = -mean[torch.arange(len(x)), given.y].log()
    direction = torch.autograd.grad(loss.sum(), probe)[0].sign()
    torch.testing.assert_close(x_adv, x + 0.01 * direction, rtol=0, atol=1e-6)


def test_clean_and_crafted_images_do_not_share_batch_statistics() -> None:
    """The first convolution's batch norm sees each kind of image in a pass of its own."""
    defense, given = network("adv_en", clean_term=True).train(), batch(12, CLASSES, SHAPE)
    defense._adversary = Crafting(1 - given.x)
    sizes: list[int] = []
    norm = next(part for part in defense.modules() if isinstance(part, nn.BatchNorm2d))
    handle = norm.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    defense.loss(given, 0.0)
    handle.remove()
    assert sizes == [12, 12]


def test_no_gradient_flows_back_through_the_making_of_the_images() -> None:
    members, given = [linear(0), linear(1)], batch()
    defense = AdversarialEnsemble(members, AdversarialHyper())
    x_adv = lend_adversary(defense, EPS, seed=3)(defense, given.x, given.y)
    gradients = []
    for crafting in (lend_adversary(defense, EPS, seed=3), Crafting(x_adv)):
        defense._adversary = crafting
        gradients.append(torch.autograd.grad(total(defense, given), members[0].weight)[0])
    torch.testing.assert_close(*gradients)


def test_equal_probabilities_cost_the_logarithm_of_the_number_of_classes() -> None:
    defense = AdversarialEnsemble([constant(0, 0, 0)] * 2, AdversarialHyper(clean_term=True))
    lend_adversary(defense, EPS)
    terms = defense.loss(batch(), 0.0)
    assert number(terms["ce"]) == pytest.approx(2 * math.log(3), rel=1e-6)
    assert number(terms["adv_ce"]) == pytest.approx(2 * math.log(3), rel=1e-6)

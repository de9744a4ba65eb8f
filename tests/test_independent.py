"""Networks trained apart: what the ensemble learns is what each would learn alone; and one network of equal cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys_defense import CLASSES, SHAPE, generator, number, same_weights, spread, toy_data, toy_spec

from ensdef.build import create_defense
from ensdef.cost import Passes, count_passes, multiplications
from ensdef.defense import Batch, EnsembleDefense
from ensdef.losses import cross_entropy
from ensdef.recipe import InnerAttack
from ensdef.testing import lend_adversary
from ensdef.training import train


def network(name: str, architecture: str = "small_resnet[width=4]", members: int = 3, **hyper: Any) -> EnsembleDefense:
    made = create_defense(
        name, architecture=architecture, members=members, num_classes=CLASSES, image_shape=SHAPE, **hyper
    )
    spread(made)
    return made.train()


def batch() -> Batch:
    x = torch.rand(12, *SHAPE, generator=generator(3))
    return Batch(x, torch.arange(12) % CLASSES, torch.arange(12), (), generator(4))


def gradients(defense: EnsembleDefense) -> list[torch.Tensor]:
    lend_adversary(defense, attack=InnerAttack(steps=3, start="zero"))
    defense.zero_grad()
    terms: Any = defense.loss(batch(), 0.0)
    torch.stack(list(terms.values())).sum().backward()
    return [parameter.grad for parameter in defense.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("clean_term", [False, True])
def test_every_member_gets_the_gradient_that_it_would_have_alone(clean_term: bool) -> None:
    together = network("independent", clean_term=clean_term)
    expected = []
    for member in together.members:
        alone = network("adv", members=1, clean_term=clean_term)
        alone.members[0].load_state_dict(member.state_dict())
        expected += gradients(alone)
    found = gradients(together)
    assert len(found) == len(expected) == len(list(together.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_optimiser_step_of_the_whole_is_one_of_each_member() -> None:
    """Momentum and weight decay keep state by parameter, so whole trainings agree too."""
    data = toy_data()
    recipe = {"batch_size": 8, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-3, "lr": 0.02}
    attack = {"steps": 1, "start": "zero"}
    one = train(toy_spec("independent", data, members=1, **recipe, attack=attack), data).defense
    other = train(toy_spec("adv", data, **recipe, attack=attack), data).defense
    assert same_weights(one.members[0], other.members[0])


def test_the_loss_is_the_members_cross_entropy_on_examples_against_themselves() -> None:
    # two of the same weights: a pass in train mode moves the running statistics that attacks see
    defense, same, given = network("independent"), network("independent"), batch()
    adversary = lend_adversary(same, attack=InnerAttack(steps=3, start="zero"))
    crafted = [adversary(member, given.x, given.y) for member in same.members]
    expected = sum(
        number(cross_entropy(member(x), given.y).mean()) for member, x in zip(same.members, crafted, strict=True)
    )
    lend_adversary(defense, attack=InnerAttack(steps=3, start="zero"))
    terms: Any = defense.loss(given, 0.0)
    assert {name: number(value) for name, value in terms.items()} == {"adv_ce": pytest.approx(expected, rel=1e-4)}


def test_the_answer_is_the_mean_probability() -> None:
    defense, x = network("independent").eval(), batch().x
    expected = torch.stack([member(x).softmax(dim=1) for member in defense.members]).mean(dim=0)
    torch.testing.assert_close(defense.predict(x).exp(), expected)


def test_it_costs_as_much_as_the_networks_apart() -> None:
    alone = count_passes("adv", steps=7)
    assert count_passes("independent", members=3, steps=7) == Passes(
        input_gradient=3 * alone.input_gradient, training=3 * alone.training
    )


def test_one_network_of_width_28_has_the_multiplications_of_three_of_width_16() -> None:
    three = network("independent", "small_resnet")
    one = network("adv", "small_resnet[width=28]", members=1)
    ratio = multiplications(one, SHAPE) / multiplications(three, SHAPE)
    assert ratio == pytest.approx(1, abs=0.02)
    for width in (27, 29):
        other = network("adv", f"small_resnet[width={width}]", members=1)
        assert abs(multiplications(other, SHAPE) / multiplications(three, SHAPE) - 1) > abs(ratio - 1)

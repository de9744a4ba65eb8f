"""Adversarial and distilled images: every image, through all steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_defense import CLASSES, SHAPE, Plain, generator, number, same_weights, spread

from ensdef.architecture import Network
from ensdef.build import create_defense
from ensdef.defense import EnsembleDefense
from ensdef.diagnostics import craft, craft_on_each, distill
from ensdef.diagnostics.crafting import network_of
from ensdef.errors import UsageError
from ensdef.harness import BALL_SLACK
from ensdef.losses import cross_entropy
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat

EPS = 0.1
DIMENSIONS = 12


def linear(members: int = 2) -> Plain:
    """Two-class linear members with different weights."""
    rng = generator(1)
    return Plain([LinearClassifier(torch.randn(2, DIMENSIONS, generator=rng)) for _ in range(members)])


def network_defense(method: str = "nat", members: int = 2) -> EnsembleDefense:
    defense = create_defense(
        method, architecture="small_resnet[width=4]", members=members, num_classes=CLASSES, image_shape=SHAPE
    )
    spread(defense)
    return defense


def vectors(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.rand(count, DIMENSIONS, generator=generator(seed)), torch.arange(count) % 2


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed))


def corner(member: LinearClassifier, x: Tensor, y: Tensor) -> Tensor:
    """The point of ball and box where a two-class linear member does worst."""
    against = member.weight.detach()[1 - y] - member.weight.detach()[y]
    return (x + EPS * against.sign()).clamp(0, 1)


# --- adversarial images ---------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["pgd", "bim", "mim"])
@pytest.mark.parametrize("member", [0, 1])
def test_a_linear_member_ends_in_the_corner_of_its_own_worst_case(attack: str, member: int) -> None:
    defense, (x, y) = linear(), vectors()
    crafted = craft(defense, x, y, eps=EPS, attack=attack, view=f"member{member}", steps=20)
    torch.testing.assert_close(crafted, corner(defense.members[member], x, y))


def test_images_that_are_wrong_already_are_perturbed_like_all_others() -> None:
    defense, (x, _) = linear(), vectors()
    wrong = 1 - defense.members[0](x).argmax(dim=1)
    crafted = craft(defense, x, wrong, eps=EPS, view="member0")
    torch.testing.assert_close(crafted, corner(defense.members[0], x, wrong))


@pytest.mark.parametrize("attack", ["pgd", "bim", "mim"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_points_stay_in_ball_and_box(attack: str, norm: str) -> None:
    x, y = images(), torch.arange(6) % CLASSES
    crafted = craft(network_defense(), x, y, eps="8/255", norm=norm, attack=attack, steps=3, step_size="eps")
    distance = Threat(norm, 0).distance(crafted, x)
    assert bool((distance <= 8 / 255 + BALL_SLACK).all())
    assert bool((distance > 0.5 * 8 / 255).all())
    assert 0 <= number(crafted.min()) <= number(crafted.max()) <= 1


def plain_attack(raised: Callable[[Tensor], Tensor], x: Tensor, steps: int, size: float, momentum: float) -> Tensor:
    """Sign steps along gradients, image by image, without a random start."""
    rows = []
    for image in x:
        point, velocity = image[None].clone(), torch.zeros_like(image[None])
        for _ in range(steps):
            point.requires_grad_()
            gradient = torch.autograd.grad(raised(point).sum(), point)[0]
            velocity = momentum * velocity + gradient / gradient.abs().sum()
            point = (image + (point.detach() + size * velocity.sign() - image).clamp(-EPS, EPS)).clamp(0, 1)
        rows.append(point[0])
    return torch.stack(rows)


@pytest.mark.parametrize(("attack", "momentum"), [("bim", 0.0), ("mim", 1.0)])
def test_a_network_is_attacked_as_in_a_plain_rewrite(attack: str, momentum: float) -> None:
    defense, x = network_defense(), images(3).double()
    defense.double()
    y = torch.tensor([0, 0, 0])
    expected = plain_attack(lambda z: cross_entropy(defense(z), y[:1]), x, 4, EPS / 2, momentum)
    crafted = craft(defense, x, y, eps=EPS, attack=attack, steps=4, step_size="eps/2")
    torch.testing.assert_close(crafted, expected)


def test_the_seed_decides_where_pgd_starts() -> None:
    defense, x, y = network_defense(), images(), torch.arange(6) % CLASSES
    first, again, other = (craft(defense, x, y, eps=EPS, steps=0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=EPS / 2)
    assert torch.equal(craft(defense, x, y, eps=EPS, steps=0, attack="bim"), x)


def test_different_batches_start_at_different_points() -> None:
    x = images(1).expand(4, *SHAPE)
    crafted = craft(network_defense(), x, torch.zeros(4, dtype=torch.int64), eps=EPS, steps=0, batch_size=1)
    assert not any(torch.equal(crafted[0], crafted[row]) for row in (1, 2, 3))


def test_without_a_random_start_the_batch_size_changes_nothing() -> None:
    defense, x, y = network_defense().double(), images().double(), torch.arange(6) % CLASSES
    one, other = (craft(defense, x, y, eps=EPS, attack="mim", steps=3, batch_size=size) for size in (2, 100))
    torch.testing.assert_close(one, other)


def test_the_defence_is_left_as_it_was_and_attacked_in_eval_mode() -> None:
    defense, twin, y = network_defense(), network_defense(), torch.arange(6) % CLASSES
    expected = craft(twin, images(), y, eps=EPS, steps=3)
    assert torch.equal(craft(defense.train(), images(), y, eps=EPS, steps=3), expected)
    assert same_weights(defense, twin)
    assert all(module.training for module in defense.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in defense.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"view": "gate"}, "no view 'gate'; it has: predict, .*member1"),
        ({"attack": "cw"}, "attack is 'cw'; expected one of pgd, bim, mim"),
        ({"eps": "8"}, "did you mean '8/255'"),
        ({"steps": -1}, "steps is -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    x, y = vectors()
    with pytest.raises(UsageError, match=message):
        craft(linear(), x, y, **{"eps": EPS, **settings})


def test_every_member_and_the_ensemble_get_images_of_their_own() -> None:
    defense, (x, y) = linear(3), vectors()
    crafted = craft_on_each(defense, x, y, eps=EPS, steps=4, seed=3)
    assert list(crafted) == [0, 1, 2, "en"]
    for key, view in ((0, "member0"), (1, "member1"), (2, "member2"), ("en", "predict")):
        assert torch.equal(crafted[key], craft(defense, x, y, eps=EPS, steps=4, seed=3, view=view))
    assert not torch.equal(crafted[0], crafted[1])
    other = craft_on_each(defense, x, y, eps=EPS, steps=4, seed=3, view="member2")
    assert torch.equal(other["en"], crafted[2])


# --- distilled images -----------------------------------------------------------------------------


def distance(network: Any, x: Tensor, target: Tensor, layer: int) -> Tensor:
    return (network.features(x, layer) - network.features(target, layer)).square().flatten(1).mean(dim=1)


@pytest.mark.parametrize("layer", [1, 3, 6])
def test_distillation_is_the_plain_rewrite_of_a_descent_with_momentum(layer: int) -> None:
    network = network_defense().members[0].double()
    x, target = images(3).double(), images(3, seed=1).double()
    for row in range(3):
        source, wanted = x[row : row + 1], target[row : row + 1]

        def raised(z: Tensor, wanted: Tensor = wanted) -> Tensor:
            return -distance(network, z, wanted, layer)

        expected = plain_attack(raised, source, 5, EPS / 5, 1.0)
        torch.testing.assert_close(distill(network, source, wanted, layer, eps=EPS, steps=5), expected)
        batch = distill(network, x, target, layer, eps=EPS, steps=5)
        torch.testing.assert_close(batch[row : row + 1], expected)


@pytest.mark.parametrize("layer", [1, 4, 6])
def test_distilled_images_are_near_their_source_and_look_like_their_target(layer: int) -> None:
    network, x, target = network_defense().members[0], images(), images(seed=1)
    distilled = distill(network, x, target, layer, eps="0.07", steps=10)
    assert bool((Threat("linf", 0).distance(distilled, x) <= 0.07 + BALL_SLACK).all())
    assert 0 <= number(distilled.min()) <= number(distilled.max()) <= 1
    assert bool((distance(network, distilled, target, layer) < distance(network, x, target, layer)).all())


def test_the_layer_decides_what_is_distilled() -> None:
    network, x, target = network_defense().members[0], images(), images(seed=1)
    assert not torch.equal(distill(network, x, target, 1), distill(network, x, target, 6))


def test_a_source_is_its_own_distillation() -> None:
    network, x = network_defense().members[0], images()
    assert torch.equal(distill(network, x, x, 3), x)


def test_a_member_in_train_mode_is_distilled_in_eval_mode_and_left_untouched() -> None:
    one, other = network_defense().members[0], network_defense().members[0]
    expected = distill(one, images(), images(seed=1), 3)
    assert torch.equal(distill(other.train(), images(), images(seed=1), 3), expected)
    assert same_weights(one, other)
    assert all(part.training for part in other.modules())


def test_the_network_inside_a_member_is_found() -> None:
    member = network_defense("soe").members[0]
    assert not isinstance(member, Network)
    assert network_of(member) is member.network


def test_a_member_without_a_network_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Flatten contains no ensdef\.architecture\.Network"):
        distill(nn.Flatten(), images(), images(), 1)

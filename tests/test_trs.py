"""TRS: orthogonal input gradients, and short ones where they are longest in a growing ball."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.trs import TransferabilityReducedSmooth, TrsHyper, smoothness
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
from ensdef.recipe import InnerAttack
from ensdef.testing import lend_adversary
from ensdef.threat import Threat

quick = settings(deadline=None, max_examples=60, derandomize=True)


def defense_of(members: int = 3, architecture: str = ARCHITECTURE, **hyper: Any) -> TransferabilityReducedSmooth:
    """In eval mode and float64."""
    defense = create_defense(
        "trs", architecture=architecture, members=members, num_classes=CLASSES, image_shape=SHAPE, **hyper
    )
    assert isinstance(defense, TransferabilityReducedSmooth)
    spread(defense)
    return defense.double()


def batch(count: int = 6) -> Batch:
    x = torch.rand(count, *SHAPE, generator=generator(), dtype=torch.float64)
    return Batch(x, torch.arange(count) % CLASSES, torch.arange(count), (), generator())


def twice(once: Batch) -> Batch:
    return Batch(once.x.repeat(2, 1, 1, 1), once.y.repeat(2), once.ids.repeat(2), (), generator())


def member_gradients(defense: TransferabilityReducedSmooth, x: Tensor, y: Tensor) -> Tensor:
    """(K, B, D), each image by itself."""
    return torch.stack(
        [
            per_image_gradients(lambda image, label, m=m: cross_entropy(m(image), label), x, y)  # type: ignore[misc]
            for m in defense.members
        ]
    )


def plain_trs(defense: TransferabilityReducedSmooth, x: Tensor, y: Tensor, x_smooth: Tensor) -> dict[str, float]:
    """The loss as the released code computes it, with a sum over pairs where it writes out three of them."""
    weights = defense.hyper
    ce = sum(number(cross_entropy(member(x), y).mean()) for member in defense.members)
    g, h = (member_gradients(defense, at, y).numpy() for at in (x, x_smooth))
    cosines = [
        abs(g[i, b] @ g[j, b]) / np.linalg.norm(g[i, b]) / np.linalg.norm(g[j, b])
        for i in range(len(g))
        for j in range(i + 1, len(g))
        for b in range(len(x))
    ]
    squares = [2 * sum(value**2 for value in h[i, b]) for i in range(len(h)) for b in range(len(x))]
    return {
        "ce": ce,
        "similarity": weights.scale * weights.similarity_weight * float(np.mean(cosines)),
        "smoothness": weights.scale * weights.smoothness_weight * float(np.mean(squares)),
    }


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: number(value) for name, value in terms.items()}


class Stub:
    """Stands in for the trainer's adversary: mirrors the images and remembers what it was asked."""

    def __init__(self, eps: float = 0.2, norm: str = "linf") -> None:
        self.threat = Threat(norm, eps)
        self.calls: list[dict[str, Any]] = []

    def __call__(self, objective: Any, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        self.calls.append({"x": x, **{name: value for name, value in options.items() if value}})
        return 1 - x

    def as_attacked(self, module: nn.Module) -> nn.Module:
        return module


def stubbed(stub: Stub | None = None, **hyper: Any) -> tuple[TransferabilityReducedSmooth, Stub]:
    defense, stub = defense_of(adversarial=True, **hyper), stub or Stub()
    defense._adversary = stub
    return defense, stub


# --- the two regularisers -------------------------------------------------------------------------


def test_two_gradients_give_the_worked_example() -> None:
    gradients = torch.tensor([[[1.0, 0.0]], [[-1.0, 1.0]]])
    assert pairwise_cosines(gradients).abs().tolist() == [[pytest.approx(0.707107, abs=1e-6)]]
    assert [number(smoothness(alone[None]).squeeze()) for alone in gradients] == [2.0, 4.0]
    assert number(smoothness(gradients).squeeze()) == 3.0


@quick
@given(st.integers(2, 5), st.integers(0, 10**6))
def test_smoothness_is_the_average_over_pairs_of_both_squared_lengths(members: int, seed: int) -> None:
    gradients = torch.randn(members, 3, 7, generator=generator(seed), dtype=torch.float64)
    lengths = gradients.norm(dim=2)
    pairs = [(i, j) for i in range(members) for j in range(i + 1, members)]
    expected = sum(lengths[i] ** 2 + lengths[j] ** 2 for i, j in pairs) / len(pairs)
    torch.testing.assert_close(smoothness(gradients), torch.as_tensor(expected))
    assert bool((smoothness(gradients) > 0).all())


def test_no_gradient_is_perfectly_smooth() -> None:
    assert smoothness(torch.zeros(3, 2, 5)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_the_similarity_lies_between_zero_and_one(seed: int) -> None:
    defense = defense_of(scale=1.0, similarity_weight=1.0)
    spread(defense, seed)
    assert 0 <= number(defense.loss(batch(), 0.0)["similarity"]) <= 1


@pytest.mark.parametrize("members", [2, 4])
def test_identical_members_have_similarity_one(members: int) -> None:
    defense = defense_of(members, scale=1.0, similarity_weight=1.0)
    defense.members = nn.ModuleList(copy.deepcopy(defense.members[0]) for _ in range(members))
    assert number(defense.loss(batch(), 0.0)["similarity"]) == pytest.approx(1, abs=1e-12)


def test_opposite_gradients_are_as_similar_as_equal_ones() -> None:
    """Members that mirror each other's scores have opposite gradients on two classes."""
    defense = create_defense("trs", architecture=ARCHITECTURE, members=2, num_classes=2, image_shape=SHAPE)
    spread(defense).double()
    mirrored = copy.deepcopy(defense.members[0])
    with torch.no_grad():
        mirrored.classifier.weight.neg_()
        mirrored.classifier.bias.neg_()
    defense.members = nn.ModuleList([defense.members[0], mirrored])
    given_batch = batch()
    given_batch = Batch(given_batch.x, given_batch.y % 2, given_batch.ids, (), generator())
    cosines = pairwise_cosines(member_gradients(defense, given_batch.x, given_batch.y))  # type: ignore[arg-type]
    torch.testing.assert_close(cosines, torch.full_like(cosines, -1.0))
    assert number(defense.loss(given_batch, 0.0)["similarity"]) == pytest.approx(10, abs=1e-9)  # type: ignore[index]


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [2, 3, 4])
def test_the_terms_are_those_of_a_plain_rewrite(members: int) -> None:
    defense, given_batch = defense_of(members), batch()
    assert values(defense.loss(given_batch, 0.0)) == pytest.approx(
        plain_trs(defense, given_batch.x, given_batch.y, given_batch.x), rel=1e-9
    )


def test_adversarial_training_measures_smoothness_alone_on_half_moved_images() -> None:
    (defense, _), given_batch = stubbed(), batch()
    x_smooth = torch.cat([given_batch.x[:3], 1 - given_batch.x[3:]])
    assert values(defense.loss(given_batch, 0.0)) == pytest.approx(
        plain_trs(defense, given_batch.x, given_batch.y, x_smooth), rel=1e-9
    )


def test_weights_scale_their_own_term() -> None:
    given_batch = batch()
    one = defense_of(scale=1.0, similarity_weight=1.0, smoothness_weight=1.0).loss(given_batch, 0.0)
    other = defense_of(scale=3.0, similarity_weight=0.5, smoothness_weight=4.0).loss(given_batch, 0.0)
    for name, factor in {"ce": 1.0, "similarity": 1.5, "smoothness": 12.0}.items():
        torch.testing.assert_close(other[name], factor * one[name])


def test_without_scale_the_loss_is_that_of_the_undefended_ensemble() -> None:
    defense, given_batch = defense_of(scale=0.0), batch()
    natural = create_defense("nat", architecture=ARCHITECTURE, num_classes=CLASSES, image_shape=SHAPE)
    natural.members = defense.members
    ours = torch.stack(list(defense.loss(given_batch, 0.0).values())).sum()
    torch.testing.assert_close(ours, natural.loss(given_batch, 0.0)["ce"])  # type: ignore[index]


def test_the_mean_over_members_is_an_option() -> None:
    given_batch = batch()
    mean, summed = (defense_of(reduction=how).loss(given_batch, 0.0) for how in ("mean", "sum"))
    torch.testing.assert_close(3 * mean["ce"], summed["ce"])
    torch.testing.assert_close(mean["smoothness"], summed["smoothness"])


def test_gradients_of_the_examples_do_not_depend_on_the_size_of_the_batch() -> None:
    defense = defense_of()
    torch.testing.assert_close(defense.loss(twice(batch()), 0.0), defense.loss(batch(), 0.0))


def test_gradients_of_the_batch_mean_shrink_the_smoothness_with_its_square() -> None:
    defense, once = defense_of(gradient="batch_mean"), batch()
    ours, per_example = defense.loss(once, 0.0), defense_of().loss(once, 0.0)
    torch.testing.assert_close(36 * ours["smoothness"], per_example["smoothness"])
    torch.testing.assert_close(ours["similarity"], per_example["similarity"])
    torch.testing.assert_close(4 * defense.loss(twice(once), 0.0)["smoothness"], ours["smoothness"])


def test_gradients_of_the_batch_mean_are_the_released_code_s() -> None:
    defense, given_batch = defense_of(gradient="batch_mean", smoothness_weight=2.0), batch()
    x = given_batch.x.clone().requires_grad_()
    gradients = [
        torch.autograd.grad(cross_entropy(member(x), given_batch.y).mean(), x)[0].flatten(1)
        for member in defense.members
    ]
    expected = sum(2 * gradient.square().sum(dim=1).mean() for gradient in gradients) / 3
    torch.testing.assert_close(defense.loss(given_batch, 0.0)["smoothness"].detach(), 10 * torch.as_tensor(expected))


def test_constant_members_have_nothing_to_lose_but_their_cross_entropy() -> None:
    """Why the weights must not outgrow it."""
    defense, given_batch = defense_of(), batch()
    with torch.no_grad():
        for member in defense.members:
            member.classifier.weight.zero_()
    terms = defense.loss(given_batch, 0.0)
    assert number(terms["similarity"]) == number(terms["smoothness"]) == 0
    assert number(terms["ce"]) > 0


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_the_order_of_members_changes_nothing(order: list[int]) -> None:
    defense, _ = stubbed()
    before = defense.loss(batch(), 0.0)
    defense.members = nn.ModuleList(defense.members[i] for i in order)
    torch.testing.assert_close(defense.loss(batch(), 0.0), before)


@pytest.mark.parametrize("adversarial", [False, True])
def test_each_regulariser_moves_every_parameter_of_every_member(adversarial: bool) -> None:
    defense = stubbed()[0] if adversarial else defense_of()
    terms = defense.loss(batch(), 0.0)
    for name in ("similarity", "smoothness"):
        assert moved_by(terms[name], defense.members) == [True] * 3, name


@pytest.mark.parametrize("name", ["ce", "similarity", "smoothness"])
def test_no_part_of_the_loss_is_detached(name: str) -> None:
    (defense, _), given_batch = stubbed(members=2, architecture="small_resnet[width=4,activation=leaky_relu]"), batch(4)
    by_autograd, by_differences = slopes(defense, lambda: defense.loss(given_batch, 0.0)[name])
    assert by_autograd == pytest.approx(by_differences, rel=1e-4)
    assert abs(by_autograd) > 1e-3


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "radii"),
    [
        ({}, [0.1, 0.15, 0.2]),
        ({"delta_start": "0.1", "delta_end": 0.3}, [0.1, 0.2, 0.3]),
        ({"delta_start": "2*eps", "delta_end": "eps/4"}, [0.4, 0.225, 0.05]),
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ball_grows_with_training(hyper: dict[str, Any], radii: list[float], norm: str) -> None:
    defense, stub = stubbed(Stub(0.2, norm), **hyper)
    for progress in (0.0, 0.5, 1.0):
        defense.loss(batch(), progress)
    assert [call["threat"].eps for call in stub.calls] == pytest.approx(radii)
    assert [call["step_size"] for call in stub.calls] == pytest.approx([radius / 3 for radius in radii])
    assert {call["threat"].norm for call in stub.calls} == {norm}
    assert {call["steps"] for call in stub.calls} == {6}


def test_the_second_half_of_the_batch_is_searched_and_the_first_left_alone() -> None:
    (defense, stub), given_batch = stubbed(), batch(7)
    moved = defense.half_moved(given_batch, 0.0)
    assert torch.equal(stub.calls[0]["x"], given_batch.x[3:])
    assert torch.equal(moved, torch.cat([given_batch.x[:3], 1 - given_batch.x[3:]]))


def plain_search(defense: TransferabilityReducedSmooth, x: Tensor, y: Tensor, radius: float, steps: int) -> Tensor:
    """Sign ascent on the members' mean squared gradient, from the images themselves."""
    z = x.clone()
    for _ in range(steps):
        z = z.detach().requires_grad_()
        total = torch.zeros((), dtype=x.dtype)
        for member in defense.members:
            loss = -member(z).softmax(dim=1).log()[range(len(y)), y].sum()
            total = total + torch.autograd.grad(loss, z, create_graph=True)[0].square().sum()
        z = z.detach() + radius / 3 * torch.autograd.grad(total, z)[0].sign()
        z = torch.minimum(torch.maximum(z, x - radius), x + radius).clamp(0, 1)
    return z.detach()


def test_the_search_follows_the_gradient_of_the_squared_gradient() -> None:
    defense, given_batch = defense_of(adversarial=True), batch()
    lend_adversary(defense, eps=0.2, attack=InnerAttack(start="zero"))
    moved = defense.half_moved(given_batch, 0.5)[3:]
    expected = plain_search(defense, given_batch.x[3:], given_batch.y[3:], radius=0.15, steps=6)
    torch.testing.assert_close(moved, expected)
    assert bool((moved != given_batch.x[3:]).any())


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_the_search_finds_longer_gradients_inside_ball_and_box(batch_norm: Any) -> None:
    defense, given_batch = defense_of(adversarial=True), batch(16)
    lend_adversary(defense, eps=0.2, attack=InnerAttack(batch_norm=batch_norm))
    moved = defense.half_moved(given_batch, 1.0)
    assert not moved.requires_grad
    assert float((moved - given_batch.x).abs().max()) <= 0.2 + 1e-9
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    before, after = (smoothness(member_gradients(defense, x, given_batch.y))[8:] for x in (given_batch.x, moved))
    assert number(after.mean()) > 1.5 * number(before.mean())


def test_more_steps_find_longer_gradients() -> None:
    found = []
    for steps in (0, 1, 6):
        defense, given_batch = defense_of(adversarial=True, steps=steps), batch(16)
        lend_adversary(defense, eps=0.2, attack=InnerAttack(start="zero"))
        found.append(number(defense.loss(given_batch, 1.0)["smoothness"]))
    assert found == sorted(set(found))


def test_a_ball_of_radius_zero_leaves_the_images_as_they_are() -> None:
    defense, given_batch = defense_of(adversarial=True, delta_start="0", delta_end="0"), batch()
    lend_adversary(defense, eps=0.2)
    assert torch.equal(defense.half_moved(given_batch, 0.7), given_batch.x)
    torch.testing.assert_close(defense.loss(given_batch, 0.7), defense_of().loss(given_batch, 0.7))


# --- the defence ----------------------------------------------------------------------------------


def test_one_pass_over_clean_images_serves_all_terms() -> None:
    for adversarial, expected in ((False, 1), (True, 2)):
        defense = stubbed()[0] if adversarial else defense_of()
        passes = []
        defense.members[0].register_forward_hook(lambda *_, passes=passes: passes.append(1))
        defense.train().loss(batch(), 0.0)
        assert len(passes) == expected


def test_the_batch_is_left_as_it_was() -> None:
    defense, given_batch = stubbed()[0], batch()
    sum(defense.loss(given_batch, 0.0).values()).backward()  # type: ignore[union-attr]
    assert not given_batch.x.requires_grad
    assert given_batch.x.grad is None


def test_only_adversarial_training_meets_attacks() -> None:
    assert not TransferabilityReducedSmooth.trains_on_attacks(TrsHyper())
    assert TransferabilityReducedSmooth.trains_on_attacks(TrsHyper(adversarial=True))


def test_the_members_probabilities_are_averaged() -> None:
    defense, x = defense_of(), batch().x
    mean = torch.stack([member(x).softmax(dim=1) for member in defense.members]).mean(dim=0)
    torch.testing.assert_close(defense(x).exp(), mean)


def test_the_cross_entropies_are_those_of_clean_images() -> None:
    (defense, _), given_batch = stubbed(), batch()
    expected = member_cross_entropy(defense.member_logits(given_batch.x), given_batch.y).mean(dim=1).sum()
    torch.testing.assert_close(defense.loss(given_batch, 0.0)["ce"], expected)


def test_one_member_is_refused() -> None:
    with pytest.raises(UsageError, match=r"trs with 1 member has no two gradients.*at least 2"):
        defense_of(members=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", -1.0), ("similarity_weight", -0.5), ("smoothness_weight", -2.0), ("steps", -1), ("delta_end", "-0.1")],
)
def test_a_negative_hyper_parameter_is_refused_by_name(name: str, value: float | str) -> None:
    with pytest.raises(UsageError, match=rf"trs: {name} is {value}; expected at least 0"):
        defense_of(**{name: value})


def test_a_radius_that_is_no_radius_is_refused() -> None:
    with pytest.raises(UsageError, match=r"delta_start is 'eps\*eps'; expected a number"):
        defense_of(delta_start="eps*eps")

"""Synergy of experts: the soft minimum over members, the confidence heads, and who answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.soe import (
    SynergyOfExperts,
    confidence_loss,
    released_terms,
    soft_minimum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys_defense import CLASSES, SHAPE, generator, number, spread

from ensdef import combine
from ensdef.build import create_defense
from ensdef.defense import Batch
from ensdef.errors import UsageError
from ensdef.losses import cross_entropy, member_cross_entropy
from ensdef.testing import lend_adversary

quick = settings(deadline=None, max_examples=60, derandomize=True)
LOSSES = torch.tensor([[1.0], [2.0], [3.0]])
VARIANTS = ("paper", "code")


def defense_of(members: int = 3, **hyper: Any) -> SynergyOfExperts:
    defense = create_defense(
        "soe",
        architecture="small_resnet[width=4]",
        members=members,
        num_classes=CLASSES,
        image_shape=SHAPE,
        **hyper,
    )
    assert isinstance(defense, SynergyOfExperts)
    spread(defense)
    with torch.no_grad():  # heads that disagree from image to image
        for member, seen in zip(defense.members, defense.outputs(images(64, seed=7))[1], strict=True):
            member.head.weight.div_(seen.std())
            member.head.bias.sub_(seen.mean()).div_(seen.std())
    return defense


def images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed))


def batch(count: int = 12, seed: int = 0) -> Batch:
    return Batch(images(count, seed), torch.arange(count) % CLASSES, torch.arange(count), (), generator())


def drawn(members: int, count: int, seed: int, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Member logits, confidence logits and labels."""
    rng = generator(seed)
    return (
        2 * torch.randn(members, count, classes, generator=rng),
        torch.randn(members, count, generator=rng),
        torch.randint(classes, (count,), generator=rng),
    )


class Stub:
    """Stands in for the trainer's adversary: mirrors the images and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor]] = []

    def __call__(self, objective: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        assert not any(options.values())
        self.calls.append((objective, x, y))
        return 1 - x


def stubbed(**hyper: Any) -> tuple[SynergyOfExperts, Stub]:
    defense, stub = defense_of(**hyper), Stub()
    defense._adversary = stub
    return defense, stub


# --- the soft minimum -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "surrogate", "bound"),
    [(0.1, 0.999995, 0.890139), (0.5, 0.928534, 0.450694), (1, 0.592394, -0.098612), (3, -1.405935, -2.295837)],
)
def test_three_losses_give_the_worked_example(sigma: float, surrogate: float, bound: float) -> None:
    value = number(soft_minimum(LOSSES, sigma).squeeze())
    assert value == pytest.approx(surrogate, abs=1e-6)
    assert 1 - sigma * math.log(3) == pytest.approx(bound, abs=1e-6)
    assert bound <= value <= 1


@pytest.mark.parametrize(("sigma", "weights"), [(0.5, (0.86681, 0.11731, 0.01588)), (1.0, (0.66524, 0.24473, 0.09003))])
def test_a_member_s_share_of_an_image_is_the_softmax_of_its_negative_loss(
    sigma: float, weights: tuple[float, ...]
) -> None:
    losses = LOSSES.clone().requires_grad_()
    share = torch.autograd.grad(soft_minimum(losses, sigma).sum(), losses)[0].squeeze(1)
    assert share.tolist() == pytest.approx(list(weights), abs=1e-5)
    assert number(share.sum()) == pytest.approx(1, abs=1e-6)


@quick
@given(st.lists(st.floats(0, 50), min_size=1, max_size=6), st.floats(1e-3, 20))
def test_the_soft_minimum_lies_at_most_sigma_ln_m_below_the_minimum(losses: list[float], sigma: float) -> None:
    value = number(soft_minimum(torch.tensor(losses, dtype=torch.float64)[:, None], sigma).squeeze())
    assert min(losses) - sigma * math.log(len(losses)) - 1e-9 <= value <= min(losses) + 1e-9
    naive = -sigma * np.log(np.sum(np.exp(-(np.array(losses) - min(losses)) / sigma))) + min(losses)
    assert value == pytest.approx(naive, rel=1e-9, abs=1e-9)


@quick
@given(st.floats(0, 50), st.integers(1, 6), st.floats(0.01, 20))
def test_equal_losses_are_lowered_by_exactly_sigma_ln_m(loss: float, members: int, sigma: float) -> None:
    losses = torch.full((members, 1), loss, dtype=torch.float64)
    assert number(soft_minimum(losses, sigma).squeeze()) == pytest.approx(loss - sigma * math.log(members), abs=1e-9)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 1, 3, 100])
def test_one_member_has_its_own_loss(sigma: float) -> None:
    losses = torch.rand(1, 7, generator=generator()) * 5
    torch.testing.assert_close(soft_minimum(losses, sigma), losses[0])


def test_at_sigma_1_the_surrogate_is_the_averaged_ensemble_s_loss_minus_ln_m() -> None:
    logits, _, y = drawn(3, 8, seed=0)
    averaged = cross_entropy(combine.mean_of_probabilities(logits), y)
    torch.testing.assert_close(soft_minimum(member_cross_entropy(logits, y), 1.0), averaged - math.log(3))


def test_a_small_sigma_gives_the_minimum_without_overflow() -> None:
    losses = (torch.tensor([[4.0], [1.0], [60.0]])).requires_grad_()
    value = soft_minimum(losses, 1e-4)
    assert number(value.squeeze()) == pytest.approx(1.0, abs=1e-6)
    assert torch.autograd.grad(value.sum(), losses)[0].squeeze(1).tolist() == [0.0, 1.0, 0.0]


def test_a_large_sigma_gives_the_mean_up_to_its_constant() -> None:
    losses = LOSSES.double() ** 2
    sigma = 1e5
    shifted = number(soft_minimum(losses, sigma).squeeze()) + sigma * math.log(3)
    assert shifted == pytest.approx(float(losses.mean()), abs=1e-3)


def test_the_surrogate_may_be_negative() -> None:
    assert number(soft_minimum(torch.zeros(3, 1), 0.5).squeeze()) == pytest.approx(-0.5 * math.log(3))


# --- the confidence heads -------------------------------------------------------------------------


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_a_head_s_loss_is_the_cross_entropy_of_its_confidence_against_the_true_class_probability() -> None:
    logits = torch.tensor([[[math.log(0.8), math.log(0.2)]]])
    y = torch.tensor([0])
    loss = confidence_loss(torch.tensor([[logit(0.6)]]), logits, y)
    assert loss.tolist() == pytest.approx([0.591919], abs=1e-6)
    best = min(number(confidence_loss(torch.tensor([[logit(g)]]), logits, y)) for g in np.linspace(0.01, 0.99, 99))
    assert best == pytest.approx(0.500402, abs=1e-6)
    assert number(confidence_loss(torch.tensor([[logit(0.8)]]), logits, y)) == pytest.approx(best, abs=1e-6)


def test_the_heads_losses_are_summed_over_members() -> None:
    logits, confidence, y = drawn(3, 5, seed=1)
    alone = [confidence_loss(confidence[m : m + 1], logits[m : m + 1], y) for m in range(3)]
    torch.testing.assert_close(confidence_loss(confidence, logits, y), torch.stack(alone).sum(dim=0))


def test_the_heads_loss_gives_the_logits_no_gradient() -> None:
    logits, confidence, y = drawn(3, 5, seed=1)
    logits.requires_grad_()
    confidence.requires_grad_()
    loss = confidence_loss(confidence, logits, y).sum()
    of_confidence, of_logits = torch.autograd.grad(loss, [confidence, logits], allow_unused=True)
    assert of_logits is None
    target = logits.detach().softmax(dim=2).gather(2, y.repeat(3, 1)[..., None]).squeeze(2)
    torch.testing.assert_close(of_confidence, confidence.detach().sigmoid() - target)


def gradient_of_confidence(defense: SynergyOfExperts) -> tuple[bool, bool]:
    """Whether the confidence terms move the heads, and whether they move anything else."""
    defense.train()
    lend_adversary(defense)
    terms = defense.loss(batch(), 0.0)
    loss = torch.stack([value for name, value in terms.items() if name.endswith("confidence")]).sum()
    heads = [parameter for member in defense.members for parameter in member.head.parameters()]
    rest = [parameter for member in defense.members for parameter in member.network.parameters()]
    gradients = torch.autograd.grad(loss, [*heads, *rest], allow_unused=True)
    moved = [gradient is not None and bool((gradient != 0).any()) for gradient in gradients]
    return all(moved[: len(heads)]), any(moved[len(heads) :])


def test_in_the_paper_s_variant_the_confidence_term_moves_the_heads_alone() -> None:
    assert gradient_of_confidence(defense_of()) == (True, False)


def test_an_attached_head_also_moves_the_network() -> None:
    assert gradient_of_confidence(defense_of(detach_head=False)) == (True, True)


def test_in_the_code_s_variant_the_confidence_term_always_moves_the_network() -> None:
    assert gradient_of_confidence(defense_of(variant="code", detach_head=True)) == (True, True)


def test_the_surrogate_moves_every_member_and_no_head() -> None:
    defense = defense_of().train()
    lend_adversary(defense)
    surrogate = defense.loss(batch(), 0.0)["surrogate"]
    for member in defense.members:
        of_network, of_head = torch.autograd.grad(
            surrogate,
            [member.network.classifier.weight, member.head.weight],
            retain_graph=True,
            allow_unused=True,
        )
        assert bool((of_network != 0).any())
        assert of_head is None


def test_a_head_adds_one_linear_output_to_a_member() -> None:
    plain = create_defense("nat", architecture="small_resnet", members=1, num_classes=CLASSES, image_shape=SHAPE)
    with_head = create_defense("soe", architecture="small_resnet", members=1, num_classes=CLASSES, image_shape=SHAPE)
    sizes = [sum(parameter.numel() for parameter in defense.parameters()) for defense in (plain, with_head)]
    assert sizes[1] - sizes[0] == 32 + 1


def test_a_member_alone_still_maps_images_to_logits() -> None:
    member, x = defense_of().members[0], images()
    torch.testing.assert_close(member(x), member.network(x))
    torch.testing.assert_close(member(x), member(x, with_confidence=True)[0])


def test_attacks_in_eval_mode_can_see_the_network_through_a_detached_head() -> None:
    defense, x = defense_of(), images().requires_grad_()
    confidence = defense.selection(x)
    assert bool((torch.autograd.grad(confidence.sum(), x)[0] != 0).any())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_head_weight_scales_the_confidence_terms_alone(variant: str) -> None:
    terms = []
    for weight in (1.0, 3.0):
        defense, _ = stubbed(variant=variant, head_weight=weight)
        terms.append(defense.eval().loss(batch(), 0.0))
    for name in terms[0]:
        factor = 3.0 if name.endswith("confidence") else 1.0
        torch.testing.assert_close(terms[1][name], factor * terms[0][name])


# --- the released code's loss ---------------------------------------------------------------------


def numpy_released(logits: Tensor, confidence: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (K, B), weighted cross-entropy (B,) and score loss (B,)."""
    z, g = logits.double().numpy(), 1 / (1 + np.exp(-confidence.double().numpy()))
    p = np.exp(z) / np.exp(z).sum(axis=2, keepdims=True)
    score = p.max(axis=2) * g
    weights = np.exp(score) / np.exp(score).sum(axis=0)
    true = p[:, np.arange(len(y)), y.numpy()]
    head = -(true * np.log(score) + (1 - true) * np.log(1 - score))
    return weights, (weights * -np.log(true)).sum(axis=0), head.mean(axis=0)


@quick
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_the_released_terms_are_those_of_a_plain_rewrite(members: int, seed: int) -> None:
    logits, confidence, y = drawn(members, 6, seed)
    _, weighted, head = numpy_released(logits, confidence, y)
    ours = released_terms(logits, confidence, y)
    np.testing.assert_allclose(ours[0].numpy(), weighted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours[1].numpy(), head, rtol=1e-4, atol=1e-6)


def released_weights(logits: Tensor, confidence: Tensor, y: Tensor) -> Tensor:
    """The weights, read from the loss: its slope in a member's cross-entropy is that member's weight."""
    logits = logits.double().requires_grad_()
    weighted, _ = released_terms(logits, confidence.double(), y)
    slope = torch.autograd.grad(weighted.sum(), logits)[0]
    own = torch.autograd.grad(member_cross_entropy(logits, y).sum(), logits)[0]
    return (slope * own).sum(dim=2) / own.square().sum(dim=2)


@quick
@given(st.integers(0, 10**6), st.floats(0.1, 20))
def test_the_released_weights_are_detached_and_lie_in_a_narrow_range(seed: int, scale: float) -> None:
    logits, confidence, y = drawn(3, 6, seed)
    logits, confidence = logits.clamp(-5, 5), scale * confidence
    weights = released_weights(logits, confidence, y)
    # were the weights not detached, the slopes would not be the weights of the plain rewrite
    np.testing.assert_allclose(weights.numpy(), numpy_released(logits, confidence, y)[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(6, dtype=torch.float64))
    assert float(weights.min()) >= 0.155
    assert float(weights.max()) <= 0.577


def test_the_released_weights_reach_the_ends_of_their_range() -> None:
    logits = torch.full((3, 1, 4), -40.0)
    logits[:, :, 0] = 0.0
    y = torch.tensor([1])
    low = released_weights(logits, torch.tensor([[-40.0], [40.0], [40.0]]), y)
    high = released_weights(logits, torch.tensor([[40.0], [-40.0], [-40.0]]), y)
    assert float(low[0, 0]) == pytest.approx(1 / (1 + 2 * math.e), abs=1e-6)
    assert float(high[0, 0]) == pytest.approx(math.e / (math.e + 2), abs=1e-6)


def test_the_score_loss_moves_the_classifier_on_images_it_gets_wrong_and_only_on_those() -> None:
    logits, confidence, y = drawn(3, 40, seed=3)
    logits.requires_grad_()
    confidence.requires_grad_()
    _, head = released_terms(logits, confidence, y)
    of_logits, of_confidence = torch.autograd.grad(head.sum(), [logits, confidence])
    moved = (of_logits != 0).any(dim=2)
    right = logits.argmax(dim=2) == y
    assert right.any()
    assert not right.all()
    assert torch.equal(moved, ~right)
    assert bool((of_confidence != 0).all())


def test_the_score_loss_s_target_is_detached() -> None:
    """With the score's own path cut, nothing is left: the true-class probability gives no gradient."""
    logits, confidence, y = drawn(2, 6, seed=4)
    right = torch.zeros_like(logits)
    right[:, torch.arange(6), y] = 5.0  # every member is right, so the largest probability is detached
    right.requires_grad_()
    _, head = released_terms(right, confidence.requires_grad_(), y)
    gradient = torch.autograd.grad(head.sum(), right, allow_unused=True)[0]
    assert gradient is None or not bool((gradient != 0).any())


def test_the_code_s_variant_adds_clean_and_crafted_losses() -> None:
    defense, stub = stubbed(variant="code")
    given_batch = batch()
    terms = defense.eval().loss(given_batch, 0.0)
    assert terms.keys() == {"weighted_ce", "confidence", "adv_weighted_ce", "adv_confidence"}
    for prefix, x in (("", given_batch.x), ("adv_", 1 - given_batch.x)):
        _, weighted, head = numpy_released(*(part.detach() for part in defense.outputs(x)), given_batch.y)
        assert number(terms[f"{prefix}weighted_ce"]) == pytest.approx(weighted.mean(), rel=1e-4)
        assert number(terms[f"{prefix}confidence"]) == pytest.approx(head.mean(), rel=1e-4)
    assert [objective for objective, _, _ in stub.calls] == [defense]


# --- who is attacked ------------------------------------------------------------------------------


def test_by_default_both_phases_run_in_every_batch() -> None:
    defense, stub = stubbed()
    given_batch = batch()
    terms = defense.loss(given_batch, 0.0)
    assert terms.keys() == {"surrogate", "confidence"}
    assert [objective for objective, _, _ in stub.calls[:3]] == list(defense.members)
    assert all(x is given_batch.x and y is given_batch.y for _, x, y in stub.calls[:3])
    assert sum(len(x) for _, x, _ in stub.calls[3:]) == len(given_batch.x)


def test_the_submodel_phase_attacks_every_member_with_the_whole_batch() -> None:
    defense, stub = stubbed(phases="submodel")
    defense.loss(batch(), 0.0)
    assert [objective for objective, _, _ in stub.calls] == list(defense.members)
    assert [len(x) for _, x, _ in stub.calls] == [12] * 3


def test_the_collaboration_phase_attacks_each_image_once_through_its_most_confident_member() -> None:
    defense, stub = stubbed(phases="collaboration")
    given_batch = batch(40)
    chosen = defense.eval().selection(given_batch.x).argmax(dim=1)
    assert len(chosen.unique()) > 1, "the toy's heads must disagree"
    defense.train().loss(given_batch, 0.0)
    members = list(defense.members)
    for objective, x, y in stub.calls:
        rows = chosen == members.index(objective)
        assert torch.equal(x, given_batch.x[rows])
        assert torch.equal(y, given_batch.y[rows])
    assert len(stub.calls) == len(chosen.unique())


def test_a_member_that_nobody_selects_is_not_attacked_in_the_collaboration_phase() -> None:
    defense, stub = stubbed(phases="collaboration")
    with torch.no_grad():
        defense.members[1].head.bias.fill_(100.0)
    defense.loss(batch(), 0.0)
    assert [objective for objective, _, _ in stub.calls] == [defense.members[1]]


def test_the_crafted_images_come_back_in_the_batch_s_order() -> None:
    defense, _ = stubbed(phases="collaboration")
    x, y = batch(40).x, batch(40).y
    torch.testing.assert_close(defense._attack_selected(x, y), 1 - x)


@pytest.mark.parametrize("frozen", [False, True], ids=["all train", "one member frozen"])
def test_choosing_the_member_leaves_modes_and_running_statistics_alone(frozen: bool) -> None:
    defense, _ = stubbed()
    defense.train()
    defense.members[1].train(not frozen)  # the trainer keeps what is not trainable in eval mode
    modes = [module.training for module in defense.modules()]
    before = {name: buffer.clone() for name, buffer in defense.named_buffers()}
    defense._attack_selected(images(), batch().y)
    assert [module.training for module in defense.modules()] == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in defense.named_buffers())


def test_reselecting_attacks_the_ensemble_itself_so_that_the_choice_follows_every_step() -> None:
    defense, stub = stubbed(phases="collaboration", reselect=True)
    defense.loss(batch(), 0.0)
    ((objective, x, _),) = stub.calls
    assert objective is defense
    assert len(x) == 12


@pytest.mark.parametrize(("attack", "calls"), [("together", 1), ("one_by_one", 3)])
def test_the_code_s_variant_attacks_the_collaboration_or_every_member(attack: str, calls: int) -> None:
    defense, stub = stubbed(variant="code", attack=attack)
    seen: list[int] = []
    outputs = defense.outputs
    defense.outputs = lambda x: (seen.append(len(x)), outputs(x))[1]  # type: ignore[method-assign]
    defense.loss(batch(), 0.0)
    expected = [defense] if attack == "together" else list(defense.members)
    assert [objective for objective, _, _ in stub.calls] == expected
    assert seen == [12, 12 * calls]


def test_the_phases_are_averaged_with_equal_weight() -> None:
    values = {}
    for phases in ("both", "submodel", "collaboration"):
        defense, _ = stubbed(phases=phases)
        values[phases] = defense.eval().loss(batch(), 0.0)
    for name in ("surrogate", "confidence"):
        mean = (values["submodel"][name] + values["collaboration"][name]) / 2
        torch.testing.assert_close(values["both"][name], mean)


def test_the_submodel_phase_averages_over_the_attacked_members() -> None:
    """Each member's images are the same here, so the average is the loss on one of them."""
    defense, _ = stubbed(phases="submodel", sigma=0.7)
    given_batch = batch()
    terms = defense.eval().loss(given_batch, 0.0)
    logits, confidence = defense.outputs(1 - given_batch.x)
    losses = -logits.log_softmax(dim=2).gather(2, given_batch.y.repeat(3, 1)[..., None]).squeeze(2)
    torch.testing.assert_close(terms["surrogate"], -0.7 * (-losses / 0.7).exp().sum(dim=0).log().mean())
    torch.testing.assert_close(terms["confidence"], confidence_loss(confidence, logits, given_batch.y).mean())


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"phases": "submodel"},
        {"phases": "collaboration"},
        {"phases": "collaboration", "reselect": True},
        {"reselect": True},
        {"variant": "code"},
        {"variant": "code", "attack": "one_by_one"},
    ],
    ids=lambda hyper: ",".join(f"{key}={value}" for key, value in hyper.items()) or "defaults",
)
def test_every_option_gives_finite_terms_under_the_real_adversary(hyper: dict[str, Any]) -> None:
    defense = defense_of(**hyper).train()
    lend_adversary(defense)
    terms = defense.loss(batch(), 0.0)
    assert all(bool(torch.isfinite(value)) and value.requires_grad for value in terms.values())


@pytest.mark.parametrize(("name", "value"), [("sigma", 0), ("sigma", -0.5), ("head_weight", -1)])
def test_an_impossible_hyper_parameter_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"soe: {name} is"):
        defense_of(**{name: value})


# --- who answers ----------------------------------------------------------------------------------


def score(defense: SynergyOfExperts, x: Tensor) -> Tensor:
    """What selects, (K, B)."""
    logits, confidence = defense.outputs(x)
    largest = logits.softmax(dim=2).amax(dim=2) if defense.hyper.variant == "code" else 1.0
    return largest * confidence.sigmoid()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_most_confident_member_answers(variant: str) -> None:
    defense, x = defense_of(variant=variant), images(40)
    chosen = score(defense, x).argmax(dim=0)
    assert len(chosen.unique()) > 1, "the toy's heads must disagree"
    expected = torch.stack([defense.members[int(k)](x[i : i + 1]).softmax(dim=1)[0] for i, k in enumerate(chosen)])
    torch.testing.assert_close(defense.predict(x).exp(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_selection_holds_a_log_weight_of_every_member_for_every_image(variant: str) -> None:
    defense, x = defense_of(variant=variant), images()
    assert defense.selection(x).shape == (12, 3)
    torch.testing.assert_close(defense.selection(x).exp(), score(defense, x).T)
    assert defense.combiner == "select"


def test_the_two_variants_can_choose_differently() -> None:
    logits = torch.tensor([[[0.0, 0.0]], [[9.0, 0.0]]])
    confidence = torch.tensor([[0.3], [0.0]])
    chosen = [
        int(defense_of(members=2, variant=variant).log_selection(logits, confidence).argmax()) for variant in VARIANTS
    ]
    assert chosen == [0, 1]


def test_the_views_add_softened_selections_to_the_usual_ones() -> None:
    assert defense_of().views().keys() == {
        "predict",
        "mean_probability",
        "mean_logit",
        "member0",
        "member1",
        "member2",
        "soft_selection",
        "sharp_selection",
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_soft_selection_weighs_members_by_their_scores(variant: str) -> None:
    defense, x = defense_of(variant=variant), images()
    weights = score(defense, x) / score(defense, x).sum(dim=0)
    probabilities = defense.member_logits(x).softmax(dim=2)
    expected = (weights[..., None] * probabilities).sum(dim=0)
    torch.testing.assert_close(defense.views()["soft_selection"](x).exp(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_softened_selections_agree_with_the_prediction_as_the_temperature_falls(variant: str) -> None:
    defense, x = defense_of(variant=variant), images(40)
    with torch.no_grad():
        answer = defense.predict(x).exp()
        logits, confidence = defense.outputs(x)
        weights = defense.log_selection(logits, confidence)
        distances = [
            number((combine.mixture(logits, weights / t).exp() - answer).abs().mean()) for t in (1.0, 0.1, 1e-2, 1e-5)
        ]
        views = [
            number((defense.views()[view](x).exp() - answer).abs().mean())
            for view in ("soft_selection", "sharp_selection")
        ]
    assert views == pytest.approx(distances[:2], rel=1e-4)
    assert distances == sorted(distances, reverse=True)
    assert distances[1] < distances[0] / 2
    assert distances[-1] < 1e-3


def test_the_softened_selections_give_the_heads_a_gradient_that_the_prediction_hides() -> None:
    defense, x = defense_of(), images()
    head = defense.members[0].head.weight
    y = batch().y
    assert torch.autograd.grad(cross_entropy(defense(x), y).sum(), head, allow_unused=True)[0] is None
    for view in ("soft_selection", "sharp_selection"):
        gradient = torch.autograd.grad(cross_entropy(defense.views()[view](x), y).sum(), head)[0]
        assert bool((gradient != 0).any())

"""Conditional label dependency learning: soft labels from a shared label model that differ between members."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.cldl import (
    CldlHyper,
    ConditionalLabelDependencyLearning,
    LabelConfusion,
    jensen_shannon,
    log_mean_exp,
    soft_labels,
    wrong_classes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys_defense import ARCHITECTURE, CLASSES, SHAPE, generator, number, spread
from toys_gradients import moved_by, per_image_gradients, slopes

from ensdef.build import create_defense
from ensdef.defense import Batch
from ensdef.errors import UsageError
from ensdef.gradients import pairwise_cosines
from ensdef.losses import member_cross_entropy

quick = settings(deadline=None, max_examples=60, derandomize=True)
VARIANTS = ("code", "paper")
NEVER = -1e4  # the logarithm of a probability that is 0 in every float format


def defense_of(members: int = 3, architecture: str = ARCHITECTURE, **hyper: Any) -> ConditionalLabelDependencyLearning:
    """In eval mode and float64."""
    defense = create_defense(
        "cldl", architecture=architecture, members=members, num_classes=CLASSES, image_shape=SHAPE, **hyper
    )
    assert isinstance(defense, ConditionalLabelDependencyLearning)
    spread(defense)
    with torch.no_grad():  # spread class embeddings give confusions near 0 and 1; bring them back
        defense.label_model.mix.weight.mul_(0.05)
    return defense.double()


def batch(count: int = 6, seed: int = 0) -> Batch:
    x = torch.rand(count, *SHAPE, generator=generator(seed), dtype=torch.float64)
    return Batch(x, torch.arange(count) % CLASSES, torch.arange(count), (), generator())


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: number(value) for name, value in terms.items()}


class Stub:
    """Stands in for the trainer's adversary: mirrors the images and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor]] = []

    def __call__(self, objective: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        assert not any(options.values())
        self.calls.append((objective, x, y))
        return 1 - x


# --- a plain rewrite ------------------------------------------------------------------------------


def softmax(values: np.ndarray) -> np.ndarray:
    return np.exp(values - values.max()) / np.exp(values - values.max()).sum()


def plain_confusion(defense: ConditionalLabelDependencyLearning, member: nn.Module, image: Tensor) -> np.ndarray:
    """u of one image: every class's embedding, through tanh of a linear layer, times the feature; mixed; softmax."""
    model = defense.label_model
    (feature,) = member(image, with_feature=True)[1].detach().numpy()
    weight, bias = model.project.weight.detach().numpy(), model.project.bias.detach().numpy()
    products = [np.tanh(weight @ embedding + bias) @ feature for embedding in model.classes.weight.detach().numpy()]
    return softmax(model.mix.weight.detach().numpy() @ np.array(products) + model.mix.bias.detach().numpy())


def plain_jsd(p: np.ndarray, q: np.ndarray) -> float:
    """Entry by entry, in bits."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        mean = (a + b) / 2
        total += 0.5 * (a * math.log2(a / mean) + b * math.log2(b / mean))
    return total


def plain_cldl(defense: ConditionalLabelDependencyLearning, x: Tensor, y: Tensor) -> dict[str, float]:
    """The loss as written, image by image; in the code's variant with its offset of 1e-6."""
    hyper, members = defense.hyper, list(defense.members)
    count, size = len(members), len(x)
    u = [[plain_confusion(defense, member, x[b : b + 1]) for b in range(size)] for member in members]
    s = [[softmax(u[i][b] + hyper.one_hot_weight * np.eye(CLASSES)[y[b]]) for b in range(size)] for i in range(count)]
    kl = 0.0
    for i, member in enumerate(members):
        for b in range(size):
            (p,) = member(x[b : b + 1]).softmax(dim=1).detach().numpy()
            kl += sum(s[i][b] * (np.log(s[i][b]) - np.log(p))) / count / size
    g = [plain_gradients(defense, member, x, y).numpy() for member in members]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = np.array(
        [[g[i][b] @ g[j][b] / np.linalg.norm(g[i][b]) / np.linalg.norm(g[j][b]) for b in range(size)] for i, j in pairs]
    )
    if hyper.variant == "paper":
        kept = [[np.delete(s[i][b], s[i][b].argmax()) for b in range(size)] for i in range(count)]
        diversity = np.mean(
            [math.log(np.mean([math.exp(plain_jsd(kept[i][b], kept[j][b])) for i, j in pairs])) for b in range(size)]
        )
        alignment = 2 / (count * (count - 1)) * cosines.mean(axis=1).sum()
    else:
        kept = [[np.delete(u[i][b], y[b]) for b in range(size)] for i in range(count)]
        divergences = [
            np.mean([plain_jsd(kept[i][b], kept[j][b]) / (CLASSES - 1) for b in range(size)]) for i, j in pairs
        ]
        diversity = math.log(np.exp(divergences).sum() / len(pairs) + 1e-6)
        alignment = np.abs(cosines).mean(axis=1).sum() / count
    return {
        "kl": kl,
        "diversity": -hyper.diversity_weight * float(diversity),
        "alignment": hyper.alignment_weight * float(alignment),
    }


def plain_gradients(defense: ConditionalLabelDependencyLearning, member: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the divergence of each image by itself; soft labels move with the image."""

    def divergence(image: Tensor, label: Tensor) -> Tensor:
        logits, feature = member(image, with_feature=True)
        model = defense.label_model
        classes = torch.tanh(model.classes.weight @ model.project.weight.T + model.project.bias)
        u = ((feature @ classes.T) @ model.mix.weight.T + model.mix.bias).softmax(dim=1)
        s = (u + defense.hyper.one_hot_weight * torch.eye(CLASSES, dtype=u.dtype)[label]).softmax(dim=1)
        return (s * (s.log() - logits.softmax(dim=1).log())).sum()

    return per_image_gradients(divergence, x, y)


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_terms_are_those_of_a_plain_rewrite(variant: str, members: int) -> None:
    defense, given_batch = defense_of(members, variant=variant), batch()
    assert values(defense.loss(given_batch, 0.0)) == pytest.approx(
        plain_cldl(defense, given_batch.x, given_batch.y), rel=1e-6, abs=4e-6
    )


def test_the_variants_agree_in_the_divergence_from_the_soft_labels_alone() -> None:
    code, paper = (values(defense_of(variant=variant).loss(batch(), 0.0)) for variant in VARIANTS)
    assert paper["kl"] == code["kl"]
    assert paper["diversity"] != pytest.approx(code["diversity"], rel=1e-2)
    assert paper["alignment"] != pytest.approx(code["alignment"], rel=1e-2)


# --- soft labels ----------------------------------------------------------------------------------


def test_a_uniform_confusion_gives_the_worked_soft_label() -> None:
    uniform = torch.full((1, 10), -math.log(10), dtype=torch.float64)
    (soft,) = soft_labels(uniform, torch.tensor([3]), 4.0).exp().tolist()
    assert soft[3] == pytest.approx(0.858486, abs=1e-6)
    assert soft[:3] + soft[4:] == pytest.approx([0.015724] * 9, abs=1e-6)


@quick
@given(st.integers(2, 10), st.floats(1.01, 8), st.integers(0, 10**6), st.floats(0, 50))
def test_a_soft_label_is_a_distribution_that_prefers_the_label_within_known_bounds(
    classes: int, rho: float, seed: int, scale: float
) -> None:
    confusion = (scale * torch.randn(5, classes, generator=generator(seed), dtype=torch.float64)).log_softmax(dim=1)
    y = torch.arange(5) % classes
    soft = soft_labels(confusion, y, rho).exp()
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(soft.argmax(dim=1), y)
    true = soft.gather(1, y[:, None])
    assert bool((true >= math.exp(rho) / (math.exp(rho) + math.e + classes - 2) - 1e-12).all())
    assert bool((true <= math.exp(rho + 1) / (math.exp(rho + 1) + classes - 1) + 1e-12).all())


@pytest.mark.parametrize(("sure_of", "bound"), [(0, 0.943), (1, 0.836)])
def test_the_bounds_are_reached_where_the_confusion_is_certain(sure_of: int, bound: float) -> None:
    confusion = torch.full((1, 10), NEVER)
    confusion[0, sure_of] = 0.0
    assert number(soft_labels(confusion, torch.tensor([0]), 4.0).exp()[0, 0]) == pytest.approx(bound, abs=5e-4)


def test_the_divergence_is_zero_where_a_member_predicts_its_soft_label_and_positive_elsewhere() -> None:
    defense, given_batch = defense_of(), batch()
    divergences, _, soft = defense.divergences(given_batch.x, given_batch.y)
    assert all(bool((divergence > 0).all()) for divergence in divergences)
    logits = iter(soft)
    for member in defense.members:  # log s as logits: p = s
        member.forward = lambda x, with_feature, m=member: (next(logits), m.network(x))  # type: ignore[misc]
    for divergence in defense.divergences(given_batch.x, given_batch.y)[0]:
        torch.testing.assert_close(divergence, torch.zeros_like(divergence), atol=1e-12, rtol=0)


def test_hard_labels_alone_give_the_members_mean_cross_entropy() -> None:
    defense = defense_of(one_hot_weight=1e4, diversity_weight=0.0, alignment_weight=0.0)
    given_batch = batch()
    expected = member_cross_entropy(defense.member_logits(given_batch.x), given_batch.y).mean()
    torch.testing.assert_close(torch.stack(list(defense.loss(given_batch, 0.0).values())).sum(), expected)


def test_the_label_model_resembles_a_class_by_the_inner_product_with_its_embedding() -> None:
    defense, x = defense_of(), batch(3).x
    member = defense.members[0]
    confusion = defense.label_model(member(x, with_feature=True)[1]).exp()
    for b in range(3):
        np.testing.assert_allclose(
            confusion[b].detach().numpy(), plain_confusion(defense, member, x[b : b + 1]), rtol=1e-9
        )


# --- label diversity ------------------------------------------------------------------------------


def log_of(*probabilities: float) -> Tensor:
    return torch.tensor([math.log(p) if p else NEVER for p in probabilities], dtype=torch.float64)


def test_two_distributions_give_the_worked_divergence() -> None:
    assert number(jensen_shannon(log_of(0.5, 0.5, 0), log_of(0, 0.5, 0.5))) == pytest.approx(0.5, abs=1e-12)
    assert 0.5 * math.log(2) == pytest.approx(0.346574, abs=1e-6)


def test_distributions_without_overlap_are_one_bit_apart() -> None:
    assert number(jensen_shannon(log_of(1, 0), log_of(0, 1))) == pytest.approx(1, abs=1e-12)


@quick
@given(st.integers(2, 9), st.integers(0, 10**6), st.floats(0, 30))
def test_the_divergence_of_distributions_is_symmetric_and_between_zero_and_one(n: int, seed: int, scale: float) -> None:
    p, q = (scale * torch.randn(2, 4, n, generator=generator(seed), dtype=torch.float64)).log_softmax(dim=2)
    divergence = jensen_shannon(p, q)
    assert bool((divergence >= -1e-12).all())
    assert bool((divergence <= 1 + 1e-12).all())
    torch.testing.assert_close(divergence, jensen_shannon(q, p))
    torch.testing.assert_close(jensen_shannon(p, p), torch.zeros(4, dtype=torch.float64))


def test_an_impossible_class_gives_finite_slopes() -> None:
    p = torch.tensor([0.0, 0.0, NEVER], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(jensen_shannon(p.log_softmax(dim=0), log_of(0, 0.5, 0.5)), p)[0]
    assert bool(torch.isfinite(slope).all())


def test_wrong_classes_are_all_but_the_label_in_order() -> None:
    table = torch.arange(12).view(1, 3, 4)
    assert wrong_classes(table, torch.tensor([0, 3, 1])).tolist() == [[[1, 2, 3], [4, 5, 6], [8, 10, 11]]]


def test_the_mean_over_pairs_leans_towards_the_most_diverse() -> None:
    mean = number(log_mean_exp(torch.tensor([[0.0], [1.0]])).squeeze())
    assert mean == pytest.approx(math.log((1 + math.e) / 2), abs=1e-6)
    assert mean > 0.5


def identical(members: int, **hyper: Any) -> ConditionalLabelDependencyLearning:
    defense = defense_of(members, **hyper)
    defense.members = nn.ModuleList(copy.deepcopy(defense.members[0]) for _ in range(members))
    return defense


@pytest.mark.parametrize("members", [2, 3, 4])
def test_identical_members_have_no_diversity_and_full_alignment(members: int) -> None:
    code, paper = (values(identical(members, variant=variant).loss(batch(), 0.0)) for variant in VARIANTS)
    assert paper["diversity"] == pytest.approx(0, abs=1e-12)
    assert code["diversity"] == pytest.approx(0, abs=1e-12)
    assert paper["alignment"] == pytest.approx(4, abs=1e-9)
    assert code["alignment"] == pytest.approx(4 * (members - 1) / 2, abs=1e-9)  # pairs over members


def test_with_signed_cosines_opposed_gradients_earn_more_than_guessing_costs() -> None:
    """Three members: why the paper's variant gives up accuracy."""
    uniform = torch.full((1, 10), -math.log(10), dtype=torch.float64)
    soft = soft_labels(uniform, torch.tensor([0]), 4.0)
    guessing = number((soft.exp() * (soft - uniform)).sum())
    opposed = (torch.eye(3, dtype=torch.float64) - 1 / 3)[:, None]
    earned = -CldlHyper().alignment_weight * number(pairwise_cosines(opposed).mean())
    assert guessing == pytest.approx(1.58, abs=0.01)
    assert earned == pytest.approx(2)


# --- what moves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl", "diversity", "alignment"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_part_of_the_loss_is_detached(variant: str, name: str) -> None:
    defense, given_batch = defense_of(2, variant=variant), batch(4)
    by_autograd, by_differences = slopes(defense, lambda: defense.loss(given_batch, 0.0)[name])
    assert by_autograd == pytest.approx(by_differences, rel=1e-4)
    assert abs(by_autograd) > 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_term_moves_the_label_model_and_every_network(variant: str) -> None:
    defense = defense_of(variant=variant)
    parts = [defense.label_model, *(member.network for member in defense.members)]
    for name, term in defense.loss(batch(), 0.0).items():
        assert moved_by(term, parts) == [True] * 4, name


def test_diversity_moves_no_classifier() -> None:
    defense = defense_of()
    classifiers = [member.classifier for member in defense.members]
    terms = defense.loss(batch(), 0.0)
    assert moved_by(terms["diversity"], classifiers) == [False] * 3
    assert moved_by(terms["kl"], classifiers) == [True] * 3
    assert moved_by(terms["alignment"], classifiers) == [True] * 3


def test_the_label_model_is_one_for_all_members_saved_and_unused_in_prediction() -> None:
    defense, x = defense_of(), batch().x
    assert [type(part) for part in defense.modules()].count(LabelConfusion) == 1
    assert {name for name in defense.state_dict() if name.startswith("label_model")} == {
        f"label_model.{name}" for name in ("classes.weight", "project.weight", "project.bias", "mix.weight", "mix.bias")
    }
    before = defense(x)
    mean = torch.stack([member(x).softmax(dim=1) for member in defense.members]).mean(dim=0)
    torch.testing.assert_close(before.exp(), mean)
    with torch.no_grad():
        for parameter in defense.label_model.parameters():
            parameter.zero_()
    assert torch.equal(defense(x), before)


def test_in_the_code_s_variant_half_batches_do_not_average_to_the_whole() -> None:
    defense = defense_of(variant="code", diversity_weight=1e3)
    assert defense.batch_coupled
    whole = batch(8)
    halves = [Batch(whole.x[rows], whole.y[rows], whole.ids[rows], (), generator()) for rows in (slice(4), slice(4, 8))]
    averaged = sum(number(defense.loss(half, 0.0)["diversity"]) for half in halves) / 2
    assert number(defense.loss(whole, 0.0)["diversity"]) != pytest.approx(averaged, rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_the_order_of_members_changes_nothing(variant: str, order: list[int]) -> None:
    defense = defense_of(variant=variant)
    before = defense.loss(batch(), 0.0)
    defense.members = nn.ModuleList(defense.members[i] for i in order)
    torch.testing.assert_close(defense.loss(batch(), 0.0), before)


def test_divergences_are_computed_in_double_precision_whatever_that_of_the_networks() -> None:
    defense, given_batch = defense_of().float(), batch()
    divergences, confusion, soft = defense.divergences(given_batch.x.float(), given_batch.y)
    assert {value.dtype for value in [*divergences, confusion, soft]} == {torch.float64}
    for member, log_s, divergence in zip(defense.members, soft, divergences, strict=True):
        log_p = member(given_batch.x.float()).double().log_softmax(dim=1)
        torch.testing.assert_close(divergence, (log_s.exp() * (log_s - log_p)).sum(dim=1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("height", [1e2, 1e4])
def test_near_certain_members_and_label_models_give_finite_values_and_slopes(variant: str, height: float) -> None:
    defense, given_batch = defense_of(variant=variant).float(), batch()
    given_batch = Batch(given_batch.x.float(), given_batch.y, given_batch.ids, (), generator())
    with torch.no_grad():
        for member in defense.members:
            member.classifier[1].weight.mul_(height)
        defense.label_model.mix.weight.mul_(height)
    terms = defense.loss(given_batch, 0.0)
    gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(defense.parameters()))
    assert all(bool(torch.isfinite(value).all()) for value in [*terms.values(), *gradients])


# --- the defence ----------------------------------------------------------------------------------


def test_adversarial_training_adds_the_divergence_on_examples_against_the_ensemble_with_hard_labels() -> None:
    plain, defense, stub, given_batch = defense_of(), defense_of(adversarial=True), Stub(), batch()
    defense._adversary = stub
    terms, expected = defense.loss(given_batch, 0.0), plain.loss(given_batch, 0.0)
    assert terms.keys() == {"kl", "diversity", "alignment", "adv_kl"}
    assert [objective for objective, _, _ in stub.calls] == [defense]
    assert torch.equal(stub.calls[0][1], given_batch.x)
    assert torch.equal(stub.calls[0][2], given_batch.y)
    for name, value in expected.items():  # diversity and alignment stay those of clean images
        torch.testing.assert_close(terms[name], value)
    assert number(terms["adv_kl"]) == pytest.approx(plain_cldl(defense, 1 - given_batch.x, given_batch.y)["kl"])


def test_only_adversarial_training_meets_attacks() -> None:
    assert not ConditionalLabelDependencyLearning.trains_on_attacks(CldlHyper())
    assert ConditionalLabelDependencyLearning.trains_on_attacks(CldlHyper(adversarial=True))


def test_one_pass_gives_logits_and_feature() -> None:
    defense, x = defense_of(), batch().x
    member, passes = defense.members[0], []
    logits, feature = member(x, with_feature=True)
    torch.testing.assert_close(member(x), logits)
    torch.testing.assert_close(feature, member.network(x))
    assert feature.shape == (6, 64)
    member.network.register_forward_hook(lambda *_: passes.append(1))
    defense.train().loss(batch(), 0.0)
    assert passes == [1]


def test_members_have_leaky_relus_unless_the_user_says_otherwise() -> None:
    def kinds(architecture: str) -> set[type]:
        network = defense_of(architecture=architecture).members[0].network
        return {type(part) for part in network.modules() if isinstance(part, nn.ReLU | nn.LeakyReLU)}

    assert kinds(ARCHITECTURE) == {nn.LeakyReLU}
    assert kinds("small_resnet[width=4,activation=relu]") == {nn.ReLU}


def test_the_batch_is_left_as_it_was() -> None:
    defense, given_batch = defense_of(), batch()
    sum(defense.loss(given_batch, 0.0).values()).backward()  # type: ignore[union-attr]
    assert not given_batch.x.requires_grad
    assert given_batch.x.grad is None


def test_one_member_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cldl with 1 member has no two soft labels.*at least 2"):
        defense_of(members=1)


@pytest.mark.parametrize("name", ["diversity_weight", "alignment_weight"])
def test_a_negative_weight_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=rf"cldl: {name} is -1\.0; expected at least 0"):
        defense_of(**{name: -1.0})


@pytest.mark.parametrize("rho", [1.0, 0.0, -3.0])
def test_a_one_hot_label_too_light_to_win_is_refused(rho: float) -> None:
    with pytest.raises(UsageError, match=rf"cldl: one_hot_weight is {rho}; expected more than 1"):
        defense_of(one_hot_weight=rho)

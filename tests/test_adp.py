"""Adaptive diversity promoting: entropy of the mean, and the volume that wrong-class predictions span."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.adp import AdaptiveDiversityPromoting, AdpHyper, adp_terms, log_det_diversity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys_defense import CLASSES, SHAPE, generator, number, spread

from ensdef.build import create_defense
from ensdef.defense import Batch
from ensdef.errors import UsageError
from ensdef.losses import member_cross_entropy
from ensdef.testing import lend_adversary

quick = settings(deadline=None, max_examples=60, derandomize=True)
OFFSET = 1e-6
NEVER = -1e4  # the logarithm of a probability that is 0 in every float format


def logits_of(*probabilities: tuple[float, ...]) -> Tensor:
    """Logits (K, 1, C) whose softmax is the given probabilities."""
    return torch.tensor([[[math.log(p) if p else NEVER for p in member]] for member in probabilities])


def drawn(members: int, batch: int, classes: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = generator(seed)
    logits = scale * torch.randn(members, batch, classes, generator=rng)
    return logits, torch.randint(classes, (batch,), generator=rng)


def numpy_adp(logits: Tensor, y: Tensor, alpha: float, beta: float, offset: float = OFFSET) -> dict[str, float]:
    """The loss as its authors write it, image by image, in float64 probabilities."""
    scores = logits.double().numpy()
    p = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    members, batch, _ = p.shape
    ce, entropy, logdet = 0.0, 0.0, 0.0
    for b in range(batch):
        true = int(y[b])
        ce += sum(-math.log(p[i, b, true]) for i in range(members))
        mean = p[:, b].mean(axis=0)
        entropy += -sum(q * math.log(q) for q in mean)
        columns = np.array([np.delete(p[i, b], true) for i in range(members)])
        columns /= np.linalg.norm(columns, axis=1, keepdims=True)
        logdet += math.log(np.linalg.det(columns @ columns.T + offset * np.eye(members)))
    return {"ce": ce / batch, "entropy": -alpha * entropy / batch, "logdet": -beta * logdet / batch}


def diversity(logits: Tensor, y: Tensor) -> Tensor:
    """Determinant without the offset, (B,)."""
    return log_det_diversity(logits.double(), y, 0.0).exp()


# --- golden values --------------------------------------------------------------------------------


def test_two_members_on_four_classes_give_the_worked_example() -> None:
    logits, y = logits_of((0.7, 0.2, 0.1, 0.0), (0.7, 0.0, 0.1, 0.2)), torch.tensor([0])
    assert number(diversity(logits, y)) == pytest.approx(0.96, abs=1e-6)
    assert number(log_det_diversity(logits, y, OFFSET)) == pytest.approx(-0.040820, abs=1e-6)
    terms = adp_terms(logits, y, AdpHyper(entropy_weight=2.0, logdet_weight=0.5))
    assert number(terms["ce"]) == pytest.approx(0.713350, abs=1e-6)
    assert number(terms["entropy"]) == pytest.approx(-2 * 0.940448, abs=2e-6)
    assert number(terms["logdet"]) == pytest.approx(0.5 * 0.040820, abs=1e-6)
    assert sum(map(number, terms.values())) == pytest.approx(-1.147136, abs=2e-6)


@pytest.mark.parametrize(("members", "value"), [(2, -13.12), (3, -26.53), (5, -53.65), (8, -94.63)])
def test_identical_members_meet_the_floor_that_the_offset_sets(members: int, value: float) -> None:
    logits = torch.randn(1, 4, 10, generator=generator()).expand(members, 4, 10)
    y = torch.tensor([0, 1, 2, 3])
    log_volume = log_det_diversity(logits, y, OFFSET)
    assert log_volume.tolist() == pytest.approx([value] * 4, abs=0.005)
    assert log_volume.tolist() == pytest.approx([math.log(members) + (members - 1) * math.log(1e-6)] * 4, abs=1e-3)


@pytest.mark.parametrize("members", [2, 3])
def test_orthogonal_members_have_log_volume_zero_up_to_the_offset(members: int) -> None:
    rows = []
    for member in range(members):
        row = [0.0] * (2 * members + 1)
        row[0] = 0.5
        row[1 + 2 * member], row[2 + 2 * member] = 0.3, 0.2
        rows.append(tuple(row))
    logits, y = logits_of(*rows), torch.tensor([0])
    assert number(log_det_diversity(logits.double(), y, 0.0)) == pytest.approx(0.0, abs=1e-12)
    assert number(log_det_diversity(logits.double(), y, OFFSET)) == pytest.approx(members * 1e-6, rel=1e-4)


def test_one_member_is_as_diverse_as_can_be() -> None:
    logits, y = drawn(1, 6, 4, seed=0)
    torch.testing.assert_close(diversity(logits, y), torch.ones(6, dtype=torch.float64))


def test_a_single_member_on_two_classes_is_allowed() -> None:
    logits, y = drawn(1, 6, 2, seed=0)
    torch.testing.assert_close(diversity(logits, y), torch.ones(6, dtype=torch.float64))


# --- the formula, and what leaves it alone --------------------------------------------------------


@quick
@given(st.integers(1, 4), st.integers(1, 5), st.integers(5, 8), st.integers(0, 10**6))
def test_the_terms_are_those_of_a_plain_rewrite(members: int, batch: int, classes: int, seed: int) -> None:
    logits, y = drawn(members, batch, classes, seed)
    terms = adp_terms(logits.double(), y, AdpHyper(entropy_weight=1.5, logdet_weight=0.25))
    assert {name: number(value) for name, value in terms.items()} == pytest.approx(
        numpy_adp(logits, y, alpha=1.5, beta=0.25), rel=1e-6, abs=1e-9
    )


def test_the_offset_is_a_parameter() -> None:
    logits, y = drawn(3, 5, 6, seed=1)
    terms = adp_terms(logits.double(), y, AdpHyper(det_offset=0.1))
    assert number(terms["logdet"]) == pytest.approx(numpy_adp(logits, y, 2.0, 0.5, offset=0.1)["logdet"], rel=1e-9)


@quick
@given(st.integers(1, 4), st.integers(5, 8), st.integers(0, 10**6), st.floats(0.01, 8))
def test_the_volume_lies_between_zero_and_one(members: int, classes: int, seed: int, scale: float) -> None:
    logits, y = drawn(members, 6, classes, seed, scale)
    volume = diversity(logits, y)
    assert bool((volume >= 0).all())
    assert bool((volume <= 1 + 1e-9).all())


@quick
@given(st.integers(2, 4), st.integers(0, 10**6))
def test_the_entropy_term_never_exceeds_the_logarithm_of_the_number_of_classes(members: int, seed: int) -> None:
    logits, y = drawn(members, 6, 5, seed)
    entropy = -number(adp_terms(logits, y, AdpHyper(entropy_weight=1.0))["entropy"])
    assert 0 <= entropy <= math.log(5) + 1e-6


@quick
@given(st.permutations(range(3)), st.integers(0, 10**6))
def test_the_order_of_members_changes_nothing(order: list[int], seed: int) -> None:
    logits, y = drawn(3, 5, 6, seed)
    ours, theirs = (adp_terms(z.double(), y, AdpHyper()) for z in (logits, logits[order]))
    assert {name: number(value) for name, value in ours.items()} == pytest.approx(
        {name: number(value) for name, value in theirs.items()}, rel=1e-7, abs=1e-9
    )


@quick
@given(st.permutations(range(1, 6)), st.integers(0, 10**6))
def test_the_order_of_the_wrong_classes_changes_nothing(order: list[int], seed: int) -> None:
    logits, _ = drawn(3, 5, 6, seed)
    y = torch.zeros(5, dtype=torch.int64)
    ours, theirs = (adp_terms(z.double(), y, AdpHyper()) for z in (logits, logits[:, :, [0, *order]]))
    assert {name: number(value) for name, value in ours.items()} == pytest.approx(
        {name: number(value) for name, value in theirs.items()}, rel=1e-7, abs=1e-9
    )


def test_another_true_class_changes_the_loss() -> None:
    logits, y = drawn(3, 5, 6, seed=2)
    assert not torch.allclose(log_det_diversity(logits, y, OFFSET), log_det_diversity(logits, (y + 1) % 6, OFFSET))


def test_the_volume_does_not_depend_on_the_true_class_s_score() -> None:
    logits, y = drawn(3, 5, 6, seed=2)
    raised = logits.clone()
    raised[:, torch.arange(5), y] += 3.0
    torch.testing.assert_close(log_det_diversity(raised, y, OFFSET), log_det_diversity(logits, y, OFFSET))


def test_without_weights_the_loss_is_the_members_summed_cross_entropy() -> None:
    logits, y = drawn(3, 5, 6, seed=3)
    terms = adp_terms(logits, y, AdpHyper(entropy_weight=0.0, logdet_weight=0.0))
    assert number(sum(terms.values())) == pytest.approx(  # type: ignore[arg-type]
        number(member_cross_entropy(logits, y).mean(dim=1).sum()), rel=1e-6
    )


# --- where float32 ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("height", [30.0, 200.0, 1e4])
@pytest.mark.parametrize("true", ["raised", "zero"])
def test_a_true_class_near_certainty_gives_finite_values_and_gradients(height: float, true: str) -> None:
    """Whether its logit is high or, as in log-probabilities, the others are low."""
    logits, y = drawn(3, 5, 6, seed=4)
    expected = numpy_adp(logits, y, 2.0, 0.5)["logdet"]
    logits[:, torch.arange(5), y] += height
    if true == "zero":
        logits = logits - height
    logits.requires_grad_()
    terms = adp_terms(logits, y, AdpHyper())
    gradient = torch.autograd.grad(torch.stack(list(terms.values())).sum(), logits)[0]
    assert all(bool(torch.isfinite(value)) for value in terms.values())
    assert bool(torch.isfinite(gradient).all())
    assert number(terms["logdet"]) == pytest.approx(expected, rel=5e-3)


def test_nearly_identical_members_give_finite_values_and_gradients() -> None:
    one, y = drawn(1, 6, 10, seed=5)
    logits = (one + 1e-5 * torch.randn(4, 6, 10, generator=generator(6))).requires_grad_()
    log_volume = log_det_diversity(logits, y, OFFSET)
    assert bool(torch.isfinite(log_volume).all())
    assert bool(torch.isfinite(torch.autograd.grad(log_volume.sum(), logits)[0]).all())


def test_no_part_of_the_loss_is_detached() -> None:
    logits, y = drawn(2, 3, 5, seed=7)
    hyper = AdpHyper(det_offset=1e-3)
    wide = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tuple(adp_terms(z, y, hyper).values()), wide)


# --- the defence ----------------------------------------------------------------------------------


def defense_of(members: int = 3, **hyper: Any) -> AdaptiveDiversityPromoting:
    defense = create_defense(
        "adp",
        architecture="small_resnet[width=4]",
        members=members,
        num_classes=CLASSES,
        image_shape=SHAPE,
        **hyper,
    )
    spread(defense)
    assert isinstance(defense, AdaptiveDiversityPromoting)
    return defense


def batch() -> Batch:
    x = torch.rand(10, *SHAPE, generator=generator())
    return Batch(x, torch.arange(10) % CLASSES, torch.arange(10), (), generator())


@pytest.mark.parametrize(("members", "classes"), [(10, 10), (11, 10), (2, 2), (5, 5)])
def test_more_members_than_wrong_classes_are_refused(members: int, classes: int) -> None:
    with pytest.raises(UsageError, match=rf"{members} members on {classes} classes.*at most {classes - 1} members"):
        create_defense("adp", architecture="resnet8", members=members, num_classes=classes)


def test_as_many_members_as_wrong_classes_are_allowed() -> None:
    assert len(defense_of(members=CLASSES - 1).members) == CLASSES - 1


@pytest.mark.parametrize(
    ("mode", "names", "attacks"),
    [
        ("none", {"ce", "entropy", "logdet"}, 0),
        ("ce", {"ce", "entropy", "logdet", "adv_ce"}, 1),
        ("full", {"ce", "entropy", "logdet", "adv_ce", "adv_entropy", "adv_logdet"}, 1),
    ],
)
def test_the_adversarial_mode_says_what_is_trained_on_crafted_images(mode: str, names: set[str], attacks: int) -> None:
    defense, given_batch, calls = defense_of(adversarial=mode).eval(), batch(), []
    x_adv = 1 - given_batch.x

    def crafting(objective: Any, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        calls.append((objective, y))
        return x_adv

    defense._adversary = crafting
    terms = defense.loss(given_batch, 0.0)
    assert terms.keys() == names
    assert calls == [(defense, given_batch.y)] * attacks
    for prefix, x in (("", given_batch.x), ("adv_", x_adv)):
        expected = adp_terms(defense.member_logits(x), given_batch.y, defense.hyper)
        for name in names & {f"{prefix}{name}" for name in expected}:
            torch.testing.assert_close(terms[name], expected[name.removeprefix("adv_")])


def test_only_the_mode_none_trains_without_attacks() -> None:
    modes = ("full", "ce", "none")
    trains = [AdaptiveDiversityPromoting.trains_on_attacks(AdpHyper(adversarial=mode)) for mode in modes]
    assert trains == [True, True, False]


@pytest.mark.parametrize("hyper", [{}, {"adversarial": "none"}, {"entropy_weight": 0, "adversarial": "ce"}])
def test_every_member_gets_a_gradient_from_every_term(hyper: dict[str, Any]) -> None:
    defense = defense_of(**hyper).train()
    lend_adversary(defense)
    for name, value in defense.loss(batch(), 0.0).items():
        if name == "entropy" and not defense.hyper.entropy_weight:
            continue
        gradients = torch.autograd.grad(
            value, [member.classifier.weight for member in defense.members], retain_graph=True
        )
        assert all(bool((gradient != 0).any()) for gradient in gradients), name


def test_the_members_probabilities_are_averaged() -> None:
    defense, x = defense_of(), batch().x
    mean = torch.stack([member(x).softmax(dim=1) for member in defense.members]).mean(dim=0)
    torch.testing.assert_close(defense(x).exp(), mean)


def test_a_step_along_the_gradient_makes_alike_members_more_diverse() -> None:
    one, y = drawn(1, 8, 6, seed=8)
    logits = (one + 0.1 * torch.randn(3, 8, 6, generator=generator(9))).requires_grad_()
    before = log_det_diversity(logits, y, OFFSET).mean()
    loss = adp_terms(logits, y, AdpHyper(entropy_weight=0.0))["logdet"]
    moved = (logits - 0.01 * torch.autograd.grad(loss, logits)[0]).detach()
    assert number(log_det_diversity(moved, y, OFFSET).mean()) > number(before) + 0.01

"""Crossing collaborative ensembles: own adversarial examples, and what a member does on another's."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.cce import CceHyper, CrossingCollaborativeEnsemble, crossing_terms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys_defense import CLASSES, SHAPE, generator, number, spread

from ensdef.build import create_defense
from ensdef.defense import Batch, EnsembleDefense
from ensdef.errors import UsageError
from ensdef.losses import cross_entropy
from ensdef.recipe import InnerAttack
from ensdef.testing import lend_adversary

quick = settings(deadline=None, max_examples=60, derandomize=True)
INDICATORS = ("soft", "hard", "no_sg")
MODES: Mapping[str, tuple[float, float]] = {"base": (0, 0), "rm": (1, 1), "dm": (0, 5)}


def logits_of(*probabilities: float) -> Tensor:
    """Logits of one pair and one image, (1, 1, C)."""
    return torch.tensor(probabilities).log().view(1, 1, -1)


def numpy_crossing(logits: Tensor, y: Tensor, indicator: str) -> tuple[np.ndarray, np.ndarray]:
    """w CE and (1 - w) H of every pair and image, from float64 probabilities."""
    scores = logits.detach().double().numpy()
    p = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    promote, demote = np.zeros(p.shape[:2]), np.zeros(p.shape[:2])
    for pair, b in np.ndindex(*p.shape[:2]):
        true = p[pair, b, int(y[b])]
        w = float(p[pair, b].argmax() == int(y[b])) if indicator == "hard" else true
        promote[pair, b] = -w * math.log(true)
        demote[pair, b] = -(1 - w) * sum(q * math.log(q) for q in p[pair, b])
    return promote, demote


def drawn(pairs: int, batch: int, classes: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = generator(seed)
    logits = scale * torch.randn(pairs, batch, classes, generator=rng)
    return logits, torch.randint(classes, (batch,), generator=rng)


# --- golden values --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "total"), [("rm", -0.401396), ("dm", -3.839563), ("base", 0.0)])
def test_four_classes_give_the_worked_example(mode: str, total: float) -> None:
    promote, demote = crossing_terms(logits_of(0.4, 0.3, 0.2, 0.1), torch.tensor([0]), "soft")
    assert promote.item() == pytest.approx(0.366516, abs=1e-6)
    assert demote.item() == pytest.approx(-0.767913, abs=1e-6)
    assert demote.item() / -(1 - 0.4) == pytest.approx(1.279854, abs=1e-6)
    promoting, demoting = CceHyper(mode=mode).weights  # type: ignore[arg-type]
    assert promoting * promote.item() + demoting * demote.item() == pytest.approx(total, abs=2e-6)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_a_uniform_prediction_is_promoted_by_its_probability_and_demoted_by_the_rest(classes: int) -> None:
    promote, demote = crossing_terms(torch.zeros(1, 1, classes), torch.tensor([1]), "soft")
    assert promote.item() == pytest.approx(math.log(classes) / classes, abs=1e-6)
    assert demote.item() == pytest.approx(-(1 - 1 / classes) * math.log(classes), abs=1e-6)
    if classes == 10:
        assert promote.item() + demote.item() == pytest.approx(-1.842068, abs=1e-6)


def test_the_modes_are_the_paper_s_weights() -> None:
    assert {mode: CceHyper(mode=mode).weights for mode in MODES} == MODES  # type: ignore[arg-type]
    assert CceHyper().weights == MODES["rm"]


def slope_of_promoting(true_logit: float, indicator: str) -> float:
    """Derivative of the promote term in the true class's logit; the nine others are 0."""
    logits = torch.zeros(1, 1, 10, dtype=torch.float64)
    logits[..., 0] = true_logit
    logits.requires_grad_()
    promote, _ = crossing_terms(logits, torch.tensor([0]), indicator)  # type: ignore[arg-type]
    return float(torch.autograd.grad(promote.sum(), logits)[0][0, 0, 0])


@pytest.mark.parametrize(("true_logit", "slope"), [(0, -0.090), (2, -0.248), (4, -0.121)])
def test_promoting_raises_the_true_class_by_p_times_1_minus_p(true_logit: float, slope: float) -> None:
    assert slope_of_promoting(true_logit, "soft") == pytest.approx(slope, abs=1e-3)
    p = math.exp(true_logit) / (math.exp(true_logit) + 9)
    assert slope_of_promoting(true_logit, "soft") == pytest.approx(-p * (1 - p), rel=1e-9)


@pytest.mark.parametrize(("true_logit", "lowers"), [(0, True), (1.6, True), (1.7, False), (4, False)])
def test_without_the_stop_gradient_promoting_lowers_probabilities_below_1_over_e(
    true_logit: float, lowers: bool
) -> None:
    p = math.exp(true_logit) / (math.exp(true_logit) + 9)
    assert (p < 1 / math.e) == lowers
    slope = slope_of_promoting(true_logit, "no_sg")
    assert slope == pytest.approx(-p * (1 - p) * (1 + math.log(p)), rel=1e-6)
    assert (slope > 0) == lowers


@pytest.mark.parametrize(("true_logit", "slope"), [(0, 0.198), (2, 0.379), (4, 0.100)])
def test_the_released_promote_term_lowers_the_true_class_where_ours_raises_it(true_logit: float, slope: float) -> None:
    """It has no stop-gradient, and hands probabilities to a cross-entropy that takes the softmax of its input."""
    logits = torch.zeros(1, 10, dtype=torch.float64)
    logits[:, 0] = true_logit
    logits.requires_grad_()
    p, y = logits.softmax(dim=1), torch.tensor([0])
    released = float(torch.autograd.grad((p[:, 0] * cross_entropy(p, y)).sum(), logits)[0][0, 0])
    assert released == pytest.approx(slope, abs=1e-3)
    assert released * slope_of_promoting(true_logit, "soft") < 0


# --- the crossing terms ---------------------------------------------------------------------------


@quick
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 8), st.integers(0, 10**6), st.sampled_from(INDICATORS))
def test_the_terms_are_those_of_a_plain_rewrite(
    pairs: int, batch: int, classes: int, seed: int, indicator: Any
) -> None:
    logits, y = drawn(pairs, batch, classes, seed)
    promote, demote = crossing_terms(logits.double(), y, indicator)
    expected = numpy_crossing(logits, y, indicator)
    np.testing.assert_allclose(promote.numpy(), expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(demote.numpy(), -expected[1], rtol=1e-9, atol=1e-12)


@quick
@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(0.01, 50))
def test_promoting_costs_at_most_1_over_e_and_demoting_gains_at_most_ln_c(
    classes: int, seed: int, scale: float
) -> None:
    logits, y = drawn(4, 6, classes, seed, scale)
    promote, demote = crossing_terms(logits, y, "soft")
    assert bool(((promote >= 0) & (promote <= 1 / math.e + 1e-6)).all())
    assert bool(((demote <= 0) & (demote >= -math.log(classes) - 1e-5)).all())


@pytest.mark.parametrize("indicator", ["soft", "hard"])
def test_the_indicator_gets_no_gradient(indicator: Any) -> None:
    logits, y = drawn(3, 5, 6, seed=0)
    logits = logits.double().requires_grad_()
    p = logits.detach().softmax(dim=2)
    true = nn.functional.one_hot(y, 6)
    w = (p * true).sum(dim=2) if indicator == "soft" else (p.argmax(dim=2) == y).double()
    promote, demote = crossing_terms(logits, y, indicator)
    of_promote = torch.autograd.grad(promote.sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(of_promote, w[..., None] * (p - true))
    of_demote = torch.autograd.grad(demote.sum(), logits)[0]
    entropy = -(p * p.log()).sum(dim=2, keepdim=True)
    torch.testing.assert_close(of_demote, (1 - w)[..., None] * p * (p.log() + entropy))


def test_without_the_stop_gradient_the_indicator_gets_one() -> None:
    logits, y = drawn(3, 5, 6, seed=0)
    logits.requires_grad_()
    for ours, ablation in zip(crossing_terms(logits, y, "soft"), crossing_terms(logits, y, "no_sg"), strict=True):
        torch.testing.assert_close(ours, ablation)
        slopes = [torch.autograd.grad(term.sum(), logits, retain_graph=True)[0] for term in (ours, ablation)]
        assert not torch.allclose(*slopes)


def test_the_hard_indicator_promotes_members_that_are_right_and_demotes_the_others() -> None:
    logits, y = drawn(3, 20, 6, seed=1)
    right = logits.argmax(dim=2) == y
    assert right.any()
    assert not right.all()
    promote, demote = crossing_terms(logits, y, "hard")
    assert torch.equal(promote != 0, right)
    assert torch.equal(demote != 0, ~right)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_predictions_near_certainty_give_finite_values_and_gradients(scale: float) -> None:
    logits, y = drawn(3, 20, 6, seed=2, scale=scale)
    logits.requires_grad_()
    for indicator in INDICATORS:
        for term in crossing_terms(logits, y, indicator):  # type: ignore[arg-type]
            gradient = torch.autograd.grad(term.sum(), logits, retain_graph=True)[0]
            assert bool(torch.isfinite(term).all())
            assert bool(torch.isfinite(gradient).all())


def test_a_step_along_the_demote_term_makes_a_prediction_less_certain() -> None:
    logits, y = drawn(3, 20, 6, seed=3)
    logits.requires_grad_()
    _, demote = crossing_terms(logits, y, "soft")
    moved = logits - 0.01 * torch.autograd.grad(demote.sum(), logits)[0]
    entropies = [-(z.softmax(dim=2) * z.log_softmax(dim=2)).sum(dim=2) for z in (logits, moved)]
    assert bool((entropies[1] > entropies[0]).all())


# --- the defence ----------------------------------------------------------------------------------


def defense_of(members: int = 3, method: str = "cce", **hyper: Any) -> Any:
    defense = create_defense(
        method,
        architecture="small_resnet[width=4]",
        members=members,
        num_classes=CLASSES,
        image_shape=SHAPE,
        **hyper,
    )
    spread(defense)
    return defense


def batch(count: int = 10) -> Batch:
    x = torch.rand(count, *SHAPE, generator=generator())
    return Batch(x, torch.arange(count) % CLASSES, torch.arange(count), (), generator())


class Stub:
    """Stands in for the trainer's adversary: noise of its own for every call, and a memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor]] = []

    def __call__(self, objective: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        assert not any(options.values())
        self.calls.append((objective, x, y))
        return self.crafted(len(self.calls) - 1, x)

    @staticmethod
    def crafted(call: int, x: Tensor) -> Tensor:
        return (x + 0.3 * torch.randn(x.shape, generator=generator(100 + call))).clamp(0, 1)


def losses_by_member(
    members: Any, given_batch: Batch, crafted: list[Tensor], weights: tuple[float, float]
) -> list[Tensor]:
    """Eq. (5), member by member and source by source."""

    def ce(z: Tensor) -> Tensor:
        return -z.softmax(dim=1)[torch.arange(len(z)), given_batch.y].log()

    promoting, demoting = weights
    totals = []
    for n, member in enumerate(members):
        total = ce(member(given_batch.x)).mean() + ce(member(crafted[n])).mean()
        for i, x in enumerate(crafted):
            if i != n and any(weights):
                z = member(x)
                p = z.softmax(dim=1)
                w = p[torch.arange(len(p)), given_batch.y].detach()
                entropy = -(p * p.log()).sum(dim=1)
                total = total + (promoting * w * ce(z) - demoting * (1 - w) * entropy).mean() / (len(crafted) - 1)
        totals.append(total)
    return totals


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize(
    ("hyper", "weights"),
    [
        *(({"mode": mode}, weights) for mode, weights in MODES.items()),
        ({"mode": "dm", "promote_weight": 0.5}, (0.5, 5)),
    ],
    ids=[*MODES, "own weight"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_whole_loss_is_that_of_a_plain_rewrite(
    members: int, hyper: dict[str, Any], weights: tuple[float, float], training: bool
) -> None:
    """Also in train mode: a forward that joined sources would have other batch statistics."""
    defense, given_batch = defense_of(members, **hyper).train(training), batch()
    defense._adversary = Stub()
    terms = defense.loss(given_batch, 0.0)
    crafted = [Stub.crafted(call, given_batch.x) for call in range(members)]
    expected = sum(losses_by_member(defense.members, given_batch, crafted, weights))
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), expected, rtol=1e-5, atol=1e-6)
    crossing = {"promote", "demote"} if members > 1 and any(weights) else set()
    assert terms.keys() == {"ce", "adv_ce", *crossing}


def test_the_terms_are_weighted_and_signed() -> None:
    given_batch, terms = batch(), {}
    for promoting, demoting in ((1, 1), (3, 0.5)):
        defense = defense_of(promote_weight=promoting, demote_weight=demoting).eval()
        defense._adversary = Stub()
        terms[promoting] = {name: number(value) for name, value in defense.loss(given_batch, 0.0).items()}
    assert terms[1]["promote"] > 0 > terms[1]["demote"]
    factors = {"ce": 1, "adv_ce": 1, "promote": 3, "demote": 0.5}
    assert terms[3] == pytest.approx({name: factors[name] * value for name, value in terms[1].items()})


def test_every_member_is_attacked_once_with_the_true_labels() -> None:
    defense, given_batch, stub = defense_of(), batch(), Stub()
    defense._adversary = stub
    defense.loss(given_batch, 0.0)
    assert [objective for objective, _, _ in stub.calls] == list(defense.members)
    assert all(x is given_batch.x and y is given_batch.y for _, x, y in stub.calls)


@pytest.mark.parametrize(("mode", "forwards"), [("base", 2), ("rm", 4), ("dm", 4)])
def test_a_member_sees_clean_and_crafted_images_in_batches_of_their_own(mode: str, forwards: int) -> None:
    """Three members: clean, its own, and where crossing terms count those of two others."""
    defense = defense_of(mode=mode).train()
    lend_adversary(defense)
    defense.loss(batch(), 0.0)
    seen = {int(part.num_batches_tracked) for part in defense.modules() if isinstance(part, nn.BatchNorm2d)}
    assert seen == {forwards}


def test_a_member_s_gradient_does_not_depend_on_another_s_weights() -> None:
    gradients = []
    for scale in (0.0, 0.5):
        defense = defense_of().train()
        spread(defense.members[1], seed=9, scale=scale)
        defense._adversary = Stub()
        total = torch.stack(list(defense.loss(batch(), 0.0).values())).sum()
        gradients.append(torch.autograd.grad(total, list(defense.parameters())))
    of_first = len(list(defense.members[0].parameters()))
    assert all(torch.equal(*pair) for pair in zip(*(part[:of_first] for part in gradients), strict=True))
    of_second = [part[of_first : 2 * of_first] for part in gradients]
    assert not all(torch.equal(*pair) for pair in zip(*of_second, strict=True))


def test_a_member_s_gradient_is_that_of_its_own_loss_alone() -> None:
    defense, given_batch = defense_of().eval(), batch()
    defense._adversary = Stub()
    total = torch.stack(list(defense.loss(given_batch, 0.0).values())).sum()
    crafted = [Stub.crafted(call, given_batch.x) for call in range(3)]
    own = losses_by_member(defense.members, given_batch, crafted, MODES["rm"])
    for member, loss in zip(defense.members, own, strict=True):
        weights = list(member.parameters())
        ours = torch.autograd.grad(total, weights, retain_graph=True)
        for one, other in zip(ours, torch.autograd.grad(loss, weights), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def total_of(defense: EnsembleDefense, given_batch: Batch) -> float:
    defense.train()
    lend_adversary(defense, attack=InnerAttack(steps=3, start="zero"))
    terms = defense.loss(given_batch, 0.0)
    assert isinstance(terms, dict)
    return sum(number(value) for value in terms.values())


def test_in_base_mode_members_train_as_adv_with_its_clean_term_would_alone() -> None:
    """The same losses, and the same running statistics."""
    together, given_batch = defense_of(mode="base"), batch()
    alone = []
    for member in together.members:
        adv = defense_of(method="adv", clean_term=True)
        adv.members[0].load_state_dict(member.state_dict())
        alone.append(adv)
    assert total_of(together, given_batch) == pytest.approx(sum(total_of(adv, given_batch) for adv in alone), rel=1e-6)
    for member, adv in zip(together.members, alone, strict=True):
        for ours, theirs in zip(member.buffers(), adv.members[0].buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_member_trains_as_adv_with_its_clean_term(mode: str) -> None:
    defense = defense_of(1, mode=mode)
    adv = defense_of(1, method="adv", clean_term=True)
    adv.load_state_dict(defense.state_dict())
    assert total_of(copy.deepcopy(defense), batch()) == pytest.approx(total_of(adv, batch()), rel=1e-6)


def test_base_differs_from_adv_en_in_the_attacked_model_alone() -> None:
    given_batch, seen, totals = batch(), [], []
    for method, hyper in (("cce", {"mode": "base"}), ("adv_en", {"clean_term": True})):
        defense = defense_of(method=method, **hyper).eval()
        calls: list[Any] = []

        def mirrored(objective: Any, x: Tensor, y: Tensor, calls: list[Any] = calls, **options: Any) -> Tensor:
            calls.append(objective)
            return 1 - x

        defense._adversary = mirrored
        totals.append(sum(number(value) for value in defense.loss(given_batch, 0.0).values()))
        seen.append((calls, defense))
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    (of_members, cce), (of_ensemble, adv_en) = seen
    assert of_members == list(cce.members)
    assert of_ensemble == [adv_en]


@pytest.mark.parametrize(
    "hyper", [{}, {"mode": "base"}, {"mode": "dm"}, {"indicator": "hard"}, {"indicator": "no_sg", "mode": "dm"}]
)
def test_every_option_gives_finite_terms_and_every_member_a_gradient(hyper: dict[str, Any]) -> None:
    defense = defense_of(**hyper).train()
    lend_adversary(defense)
    terms = defense.loss(batch(), 0.0)
    assert all(bool(torch.isfinite(value)) for value in terms.values())
    for name in terms.keys() - ({"promote"} if hyper.get("mode") == "dm" else set()):
        weights = [member.classifier.weight for member in defense.members]
        gradients = torch.autograd.grad(terms[name], weights, retain_graph=True)
        assert all(bool((gradient != 0).any()) for gradient in gradients), name


def test_the_members_probabilities_are_averaged() -> None:
    defense, x = defense_of(), batch().x
    mean = torch.stack([member(x).softmax(dim=1) for member in defense.members]).mean(dim=0)
    torch.testing.assert_close(defense(x).exp(), mean)


def test_the_learning_rate_falls_after_epochs_80_120_and_160() -> None:
    recipe = CrossingCollaborativeEnsemble.recipe
    rates = [recipe.lr_at(epoch / recipe.epochs) for epoch in (0, 79, 80, 119, 120, 159, 160, 179)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["promote_weight", "demote_weight"])
def test_a_negative_weight_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=rf"cce: {name} is -1.0; expected at least 0"):
        defense_of(**{name: -1})


@pytest.mark.parametrize("hyper", [{"mode": "base"}, {"promote_weight": 0, "demote_weight": 0}])
def test_an_indicator_without_crossing_terms_is_refused(hyper: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="indicator means nothing"):
        defense_of(indicator="hard", **hyper)


def test_an_unknown_mode_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match="expected one of base, rm, dm"):
        defense_of(mode="robust")

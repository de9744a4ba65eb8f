"""Interactive global adversarial training: who gets which example, the penalty, and how a defence is wrapped."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods._allocation import LARGEST_PENALTY, draw_probabilities, misclassification_penalty
from ensdef.methods.adp import AdaptiveDiversityPromoting
from ensdef.methods.baseline import Natural
from ensdef.methods.igat import IgatHyper, InteractiveGlobalAdversarialTraining
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys_defense import (
    CLASSES,
    SHAPE,
    TOYS,
    Plain,
    TwoSteps,
    generator,
    number,
    registered,
    same_weights,
    spread,
    toy_data,
    toy_spec,
)

from ensdef import combine
from ensdef.attack_spec import AttackSpec
from ensdef.build import build_defense, create_defense
from ensdef.checkpoints import WEIGHTS, checkpoint_folder, load_checkpoint, read_weights, save_checkpoint
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import CheckpointError, UsageError
from ensdef.loading import attacked_subset, find_data
from ensdef.losses import cross_entropy, member_cross_entropy
from ensdef.notation import parse_call, split_list
from ensdef.runner import Run, preflight, run_cells
from ensdef.specs import Cell, ModelSpec, Setting, TrainSpec
from ensdef.testing import lend_adversary
from ensdef.training import train

quick = settings(deadline=None, max_examples=60, derandomize=True)
DATA = toy_data()
RULES = ("soft", "hard", "opposite", "random")
KINDS = ("sum", "worst", "literal")


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


def logits_of(*probabilities: tuple[float, ...]) -> Tensor:
    """Logits (K, 1, C) whose softmax is the given probabilities."""
    return torch.tensor([[[math.log(p) for p in member]] for member in probabilities])


def drawn(members: int, count: int, seed: int, classes: int = 4, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = generator(seed)
    return scale * torch.randn(members, count, classes, generator=rng), torch.randint(classes, (count,), generator=rng)


def all_wrong(y: Tensor) -> Tensor:
    return torch.ones_like(y, dtype=torch.bool)


def images(count: int = 10, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed))


def batch(count: int = 10, streams: int = 1) -> Batch:
    more = tuple((images(count, seed), torch.arange(count) % 3) for seed in range(1, streams))
    return Batch(images(count), torch.arange(count) % CLASSES, torch.arange(count), more, generator())


class Stub:
    """Stands in for the trainer's adversary: mirrors the images and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor | None, dict[str, Any]]] = []

    def __call__(self, objective: Any, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        self.calls.append((objective, x, y, options))
        return 1 - x

    def __deepcopy__(self, memo: Any) -> Stub:
        return self

    def as_attacked(self, module: nn.Module) -> nn.Module:
        return module


def defense_of(base: str = "adp", members: int = 3, **hyper: Any) -> InteractiveGlobalAdversarialTraining:
    defense = create_defense(
        "igat",
        architecture="small_resnet[width=4]",
        members=members,
        num_classes=CLASSES,
        image_shape=SHAPE,
        base=base,
        **hyper,
    )
    assert isinstance(defense, InteractiveGlobalAdversarialTraining)
    spread(defense)
    return defense


def stubbed(base: str = "adp", **hyper: Any) -> tuple[InteractiveGlobalAdversarialTraining, Stub]:
    """In eval mode, so that a second forward pass gives the same logits."""
    defense, stub = defense_of(base, **hyper).eval(), Stub()
    defense.lend(stub)  # type: ignore[arg-type]
    return defense, stub


def terms_of(defense: EnsembleDefense, given_batch: Batch) -> Terms:
    terms = defense.loss(given_batch, 0.0)
    assert isinstance(terms, dict)
    return terms


class Table(nn.Module):
    """A member with a row of logits for every image of the batch, whatever the image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def over_tables(logits: Tensor, **hyper: Any) -> InteractiveGlobalAdversarialTraining:
    """iGAT over a plain ensemble with the given logits, (K, B, C)."""
    tables = Natural([Table(member) for member in logits])
    defense = InteractiveGlobalAdversarialTraining(tables, IgatHyper(base="nat", **hyper))
    defense.lend(Stub())  # type: ignore[arg-type]
    return defense


def table_batch(y: Tensor, seed: int = 0) -> Batch:
    return Batch(torch.zeros(len(y), 1), y, torch.arange(len(y)), (), generator(seed))


def slopes(defense: EnsembleDefense, term: str, y: Tensor, seed: int = 0) -> Tensor:
    """Gradient of a term with respect to all logits, (K, B, C)."""
    value = terms_of(defense, table_batch(y, seed))[term]
    return torch.stack(torch.autograd.grad(value, [table.logits for table in defense.members]))


def receivers(logits: Tensor, y: Tensor, seed: int = 0, **hyper: Any) -> Tensor:
    """Which member each image is given to, read from who has a gradient: (K, B) bool."""
    return (slopes(over_tables(logits, **hyper), "distributed", y, seed) != 0).any(dim=2)


# --- the penalty ----------------------------------------------------------------------------------


def test_three_members_give_the_worked_example() -> None:
    logits, y = logits_of((0.5, 0.4, 0.1), (0.2, 0.7, 0.1), (0.1, 0.3, 0.6)), torch.tensor([0])
    assert int(combine.mean_of_probabilities(logits).argmax()) == 1, "the ensemble is wrong"
    value = {kind: number(misclassification_penalty(logits, y, all_wrong(y), kind)) for kind in KINDS}
    assert value["sum"] == pytest.approx(2.631089, abs=1e-6)
    assert value["worst"] == pytest.approx(1.203973, abs=1e-6)
    assert 2 * value["worst"] == pytest.approx(2.407946, abs=1e-6), "the released code's other type"


def test_taken_literally_the_paper_s_penalty_punishes_a_right_and_confident_member() -> None:
    logits, y = logits_of((0.6, 0.3, 0.1), (0.1, 0.5, 0.4), (0.1, 0.5, 0.4)), torch.tensor([0])
    logits.requires_grad_()
    literal = misclassification_penalty(logits, y, all_wrong(y), "literal").sum()
    assert number(literal) == pytest.approx(0.916291, abs=1e-6)
    assert float(torch.autograd.grad(literal, logits)[0][0, 0, 0]) > 0, "descent lowers the first member's true class"
    worst = misclassification_penalty(logits, y, all_wrong(y), "worst").sum()
    assert number(worst) == pytest.approx(0.693147, abs=1e-6)
    assert not torch.autograd.grad(worst, logits)[0][0].any()


def plain_penalty(logits: Tensor, y: Tensor, kind: str) -> list[float]:
    """The penalty in probabilities, image by image, as if every image were misclassified."""
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=2, keepdims=True)
    values = []
    for b, true in enumerate(y.tolist()):
        rows = [[q for c, q in enumerate(member[b]) if kind == "literal" or c != true] for member in p]
        worst = [max(row) for row in rows] if kind == "sum" else [max(max(row) for row in rows)]
        values.append(sum(-math.log(1 - min(q, 0.99)) for q in worst))
    return values


@quick
@given(st.integers(1, 5), st.integers(2, 6), st.sampled_from(KINDS), st.integers(0, 10**6), st.floats(0.1, 8))
def test_the_penalty_is_that_of_a_plain_rewrite(members: int, classes: int, kind: str, seed: int, scale: float) -> None:
    logits, y = drawn(members, 6, seed, classes, scale)
    ours = misclassification_penalty(logits.double(), y, all_wrong(y), kind)
    assert ours.tolist() == pytest.approx(plain_penalty(logits, y, kind), rel=1e-9, abs=1e-12)


@quick
@given(st.integers(1, 8), st.sampled_from(KINDS), st.integers(0, 10**6), st.floats(0, 100))
def test_the_penalty_lies_between_zero_and_the_cap_of_every_member(
    members: int, kind: str, seed: int, scale: float
) -> None:
    logits, y = drawn(members, 6, seed, scale=scale)
    penalty = misclassification_penalty(logits, y, all_wrong(y), kind)
    assert float(penalty.min()) >= 0
    assert float(penalty.max()) <= (members if kind == "sum" else 1) * 4.6052


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height", [6.0, 20.0, 1000.0])
def test_the_worst_errors_have_the_released_value_and_still_a_gradient(kind: str, height: float) -> None:
    logits = torch.tensor([[[0.0, height, 0.0]], [[1.0, 0.0, 0.0]]]).requires_grad_()
    y = torch.tensor([0])
    penalty = misclassification_penalty(logits, y, all_wrong(y), kind)
    of_second = -math.log(1 - math.exp(0) / (math.e + 2)) if kind == "sum" else 0
    assert number(penalty) == pytest.approx(-math.log(0.01) + of_second, abs=1e-5)
    slope = torch.autograd.grad(penalty.sum(), logits)[0][0, 0]
    # of -log(1 - p): p for the confident class, and its counterpart split between the two others
    assert slope.tolist() == pytest.approx([-0.5, 1.0, -0.5], abs=0.01)


@quick
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
def test_below_the_cap_the_gradient_is_that_of_the_plain_formula(kind: str, seed: int) -> None:
    logits, y = drawn(3, 6, seed, scale=0.7)
    logits = logits.double().requires_grad_()
    p = logits.softmax(dim=2)
    counted = p if kind == "literal" else p.scatter(2, y.view(1, -1, 1).expand(3, -1, 1), 0.0)
    worst = counted.amax(dim=2) if kind == "sum" else counted.amax(dim=(0, 2))
    expected = torch.autograd.grad(-torch.log1p(-worst).sum(), logits)[0]
    ours = torch.autograd.grad(misclassification_penalty(logits, y, all_wrong(y), kind).sum(), logits)[0]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("combiner", ["avg", "max"])
def test_images_that_the_ensemble_gets_right_have_no_penalty_and_no_gradient(combiner: str) -> None:
    logits, y = drawn(3, 200, seed=4)
    defense = over_tables(logits, combiner=combiner)
    p = logits.softmax(dim=2)
    wrong = (p.mean(dim=0) if combiner == "avg" else p.amax(dim=0)).argmax(dim=1) != y
    assert 20 < int(wrong.sum()) < 180
    assert torch.equal((slopes(defense, "penalty", y) != 0).any(dim=2).any(dim=0), wrong)
    assert not misclassification_penalty(logits, y, wrong, "sum")[~wrong].any()


def test_the_two_combiners_do_not_agree_on_what_is_wrong() -> None:
    """One sure member outvotes two in the maximum and not in the mean."""
    logits, y = logits_of((0.05, 0.95), (0.8, 0.2), (0.8, 0.2)), torch.tensor([0])
    assert number(terms_of(over_tables(logits, combiner="avg"), table_batch(y))["penalty"]) == 0
    assert number(terms_of(over_tables(logits, combiner="max"), table_batch(y))["penalty"]) > 0


# --- who gets which example -----------------------------------------------------------------------


def test_the_best_of_three_gets_an_image_with_four_chances_in_seven() -> None:
    chances = draw_probabilities(torch.tensor([[0.5], [0.2], [0.1]]), "soft")
    assert chances.squeeze(1).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_eight_members_halve_their_chances_from_rank_to_rank() -> None:
    scores = torch.arange(8.0).flip(0)[:, None]
    chances = draw_probabilities(scores, "soft").squeeze(1)
    assert chances.tolist() == pytest.approx([2**power / 255 for power in range(7, -1, -1)])


@pytest.mark.parametrize(
    ("rule", "chances"), [("hard", [0, 1, 0]), ("opposite", [0, 0, 1]), ("random", [1 / 3, 1 / 3, 1 / 3])]
)
def test_the_other_rules_of_three_members(rule: str, chances: list[float]) -> None:
    scores = torch.tensor([[-2.0], [-1.0], [-3.0]])
    assert draw_probabilities(scores, rule).squeeze(1).tolist() == pytest.approx(chances)


@quick
@given(st.integers(2, 9), st.sampled_from(RULES), st.integers(0, 10**6))
def test_chances_sum_to_one_and_follow_the_members(members: int, rule: str, seed: int) -> None:
    scores = torch.randn(members, 7, generator=generator(seed))
    chances = draw_probabilities(scores, rule)
    torch.testing.assert_close(chances.sum(dim=0), torch.ones(7))
    order = torch.randperm(members, generator=generator(seed))
    assert torch.equal(draw_probabilities(scores[order], rule), chances[order])


@quick
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_the_hard_rule_is_the_soft_one_with_all_chances_on_its_favourite(members: int, seed: int) -> None:
    scores = torch.randn(members, 7, generator=generator(seed))
    soft, hard = (draw_probabilities(scores, rule) for rule in ("soft", "hard"))
    assert torch.equal(hard, (soft == soft.amax(dim=0)).float())
    assert torch.equal(hard.argmax(dim=0), scores.argmax(dim=0))


@pytest.mark.parametrize("rule", ["soft", "hard"])
def test_equal_members_still_have_chances_that_sum_to_one(rule: str) -> None:
    chances = draw_probabilities(torch.zeros(3, 4), rule)
    torch.testing.assert_close(chances.sum(dim=0), torch.ones(4))


@pytest.mark.parametrize("rule", RULES)
def test_every_image_goes_to_exactly_one_member(rule: str) -> None:
    logits, y = drawn(4, 300, seed=1)
    assert torch.equal(receivers(logits, y, rule=rule).sum(dim=0), torch.ones(300, dtype=torch.int64))


@pytest.mark.parametrize(("rule", "chances"), [("soft", (1 / 7, 4 / 7, 2 / 7)), ("random", (1 / 3, 1 / 3, 1 / 3))])
def test_ten_thousand_draws_agree_with_the_chances(rule: str, chances: tuple[float, ...]) -> None:
    """The second member is the best on the true class, though not the surest of all."""
    count = 10_000
    logits = logits_of((0.1, 0.8, 0.1), (0.5, 0.3, 0.2), (0.2, 0.1, 0.7)).expand(3, count, 3)
    given_to = receivers(logits, torch.zeros(count, dtype=torch.int64), rule=rule).sum(dim=1)
    for seen, chance in zip(given_to.tolist(), chances, strict=True):
        assert abs(seen - count * chance) <= 3 * math.sqrt(count * chance * (1 - chance))


@pytest.mark.parametrize(("rule", "pick"), [("hard", np.argmax), ("opposite", np.argmin)])
def test_the_rules_without_chance_rank_by_the_true_class(rule: str, pick: Callable[..., Any]) -> None:
    logits, y = drawn(4, 300, seed=2)
    true = logits.softmax(dim=2)[:, torch.arange(300), y]
    assert torch.equal(receivers(logits, y, rule=rule).int().argmax(dim=0), torch.as_tensor(pick(true.numpy(), axis=0)))


def test_draws_come_from_the_batch_s_generator() -> None:
    logits, y = drawn(4, 300, seed=3)
    first, again, other = (receivers(logits, y, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("combiner", ["avg", "max"])
def test_masked_only_what_the_ensemble_misclassifies_is_distributed(combiner: str) -> None:
    logits, y = drawn(3, 200, seed=5)
    p = logits.softmax(dim=2)
    wrong = (p.mean(dim=0) if combiner == "avg" else p.amax(dim=0)).argmax(dim=1) != y
    assert torch.equal(receivers(logits, y, mask="misclassified", combiner=combiner).any(dim=0), wrong)


def test_the_draw_has_no_gradient_and_the_sum_is_divided_by_the_batch() -> None:
    """Slope of CE over B for the member that got the image, 0 for the others."""
    logits, y = drawn(3, 40, seed=6)
    own = (logits.softmax(dim=2) - nn.functional.one_hot(y, 4)) / 40
    for mask in ("all", "misclassified"):
        hyper = {"distribute_weight": 3.0, "mask": mask}
        expected = 3.0 * own * receivers(logits, y, **hyper)[..., None]
        torch.testing.assert_close(slopes(over_tables(logits, **hyper), "distributed", y), expected)


# --- the loss over a base -------------------------------------------------------------------------


def plain_added(
    clean: Tensor, crafted: Tensor, y: Tensor, *, rule: str, mask: str, penalty: str, combiner: str
) -> tuple[float, float]:
    """Distributed cross-entropy (of a rule without chance) and penalty, image by image."""

    def wrong(p: np.ndarray, b: int) -> bool:
        joint = p[:, b].mean(axis=0) if combiner == "avg" else p[:, b].max(axis=0)
        return bool(joint.argmax() != int(y[b]))

    probabilities = [torch.softmax(logits.double(), dim=2).numpy() for logits in (clean, crafted)]
    count, distributed, punished = len(y), 0.0, 0.0
    for b in range(count):
        if mask == "all" or wrong(probabilities[1], b):
            true = probabilities[1][:, b, int(y[b])]
            distributed += -math.log(true.max() if rule == "hard" else true.min())
    for logits, p in zip((clean, crafted), probabilities, strict=True):
        values = plain_penalty(logits, y, penalty)
        punished += sum(value for b, value in enumerate(values) if wrong(p, b))
    return distributed / count, punished / count


@pytest.mark.parametrize("rule", ["hard", "opposite"])
@pytest.mark.parametrize("mask", ["all", "misclassified"])
@pytest.mark.parametrize("penalty", KINDS)
@pytest.mark.parametrize("combiner", ["avg", "max"])
def test_the_loss_over_adp_is_that_of_a_plain_rewrite(rule: str, mask: str, penalty: str, combiner: str) -> None:
    options = {"rule": rule, "mask": mask, "penalty": penalty, "combiner": combiner}
    defense, _ = stubbed(**options)
    given_batch = batch(20)
    terms = terms_of(defense, given_batch)
    with torch.no_grad():
        clean, crafted = (defense.member_logits(x) for x in (given_batch.x, 1 - given_batch.x))
    distributed, punished = plain_added(clean, crafted, given_batch.y, **options)
    assert distributed > 0
    assert punished > 0
    base = terms_of(defense.base, given_batch)
    expected = {f"base_{name}": number(value) for name, value in base.items()}
    expected |= {"distributed": 5 * distributed, "penalty": 10 * punished}
    assert {name: number(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_without_weights_the_loss_is_the_base_s_and_nothing_more_is_attacked() -> None:
    defense, stub = stubbed(distribute_weight=0, penalty_weight=0, halves=True)
    defense.train()
    alone = copy.deepcopy(defense.base)
    given_batch = batch()
    terms = terms_of(defense, given_batch)
    assert [objective for objective, *_ in stub.calls] == [defense.base]
    expected = terms_of(alone, given_batch)
    assert terms.keys() == {f"base_{name}" for name in expected}
    assert all(torch.equal(terms[f"base_{name}"], value) for name, value in expected.items())
    assert same_weights(alone, defense.base), "no forward pass moved the running statistics"


@pytest.mark.parametrize(("zero", "left"), [("distribute_weight", "penalty"), ("penalty_weight", "distributed")])
def test_a_term_without_weight_is_left_out(zero: str, left: str) -> None:
    defense, _ = stubbed("nat", **{zero: 0})
    assert terms_of(defense, batch()).keys() == {"base_ce", left}


@pytest.mark.parametrize(
    ("base", "weights"),
    [("adp", (5, 10)), ("nat", (5, 10)), ("adv_en", (5, 10)), ("soe", (0.25, 0.5)), ("soe[variant=code]", (0.25, 0.5))],
)
def test_the_paper_s_weights_depend_on_whether_the_base_selects(base: str, weights: tuple[float, float]) -> None:
    assert defense_of(base).weights == weights
    assert defense_of(base, distribute_weight=3).weights == (3, weights[1])
    assert defense_of(base, penalty_weight=0).weights == (weights[0], 0)


def test_weights_scale_their_own_term_alone() -> None:
    one = terms_of(stubbed(distribute_weight=1, penalty_weight=1)[0], batch())
    other = terms_of(stubbed(distribute_weight=3, penalty_weight=7)[0], batch())
    for name, value in one.items():
        torch.testing.assert_close(other[name], {"distributed": 3.0, "penalty": 7.0}.get(name, 1.0) * value)


def passes(defense: EnsembleDefense) -> int:
    """Forward passes of the first member during one loss."""
    seen: list[int] = []
    handle = defense.members[0].register_forward_hook(lambda *_: seen.append(1))
    defense.loss(batch(), 0.0)
    handle.remove()
    return len(seen)


def test_examples_pass_through_every_member_once_and_clean_images_once_more() -> None:
    assert passes(stubbed("nat")[0]) == 1 + 1 + 1
    assert passes(stubbed("nat", penalty_weight=0)[0]) == 1 + 1


@pytest.mark.parametrize("base", ["adp", "soe", "nat", "adv_en"])
def test_every_member_learns_from_the_sum(base: str) -> None:
    defense = defense_of(base).train()
    lend_adversary(defense)
    torch.stack(list(terms_of(defense, batch(20)).values())).sum().backward()
    for member in defense.members:
        assert all(parameter.grad is not None for parameter in member.parameters())
        assert any(bool((parameter.grad != 0).any()) for parameter in member.parameters())


def test_soe_s_heads_are_not_moved_by_the_added_terms() -> None:
    defense, _ = stubbed("soe")
    terms = terms_of(defense, batch(20))
    heads = [parameter for member in defense.members for parameter in member.head.parameters()]
    added = terms["distributed"] + terms["penalty"]
    assert torch.autograd.grad(added, heads, allow_unused=True) == (None,) * len(heads)


# --- one attack for both --------------------------------------------------------------------------


def test_a_base_that_attacks_the_averaged_ensemble_learns_from_the_same_examples() -> None:
    defense, stub = stubbed("adp")
    given_batch = batch()
    defense.loss(given_batch, 0.0)
    assert [(objective, x is given_batch.x, y is given_batch.y) for objective, x, y, _ in stub.calls] == [
        (defense, True, True)
    ]


@pytest.mark.parametrize("step", range(2))
def test_shared_examples_are_what_the_base_would_have_crafted(step: int) -> None:
    """With the true adversary: the base's terms are those of the base alone."""
    defense = defense_of("adp").eval()
    given_batch = batch()
    lend_adversary(defense, seed=step)
    together = terms_of(defense, given_batch)
    lend_adversary(defense, seed=step)
    for name, value in terms_of(defense.base, given_batch).items():
        torch.testing.assert_close(together[f"base_{name}"], value)


@pytest.mark.parametrize(
    ("base", "hyper"),
    [("adp", {"combiner": "max"}), ("adp", {"halves": True}), ("soe[variant=code]", {})],
    ids=["igat attacks the maximum", "igat attacks other images", "the base attacks its selection"],
)
def test_a_base_that_attacks_something_else_crafts_its_own_examples(base: str, hyper: dict[str, Any]) -> None:
    defense, stub = stubbed(base, **hyper)
    given_batch = batch(20)
    defense.loss(given_batch, 0.0)
    assert [objective for objective, *_ in stub.calls] == [defense, defense.base]
    assert torch.equal(stub.calls[1][1], given_batch.x[:10] if hyper.get("halves") else given_batch.x)


def test_a_base_that_attacks_its_members_crafts_its_own_examples() -> None:
    defense, stub = stubbed("soe[phases=submodel]")
    defense.loss(batch(), 0.0)
    assert [objective for objective, *_ in stub.calls] == [defense, *defense.members]


class Asking(Plain):
    """Attacks its average in several ways and hands the examples out."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        other = batch.y.roll(1)
        self.own = self.adversary(self, batch.x, batch.y)
        self.asked = [
            self.adversary(self, batch.x, batch.y, steps=0),
            self.adversary(self, batch.x, batch.y, momentum=1.0),
            self.adversary(self, batch.x, batch.y, start="zero"),
            self.adversary(self, batch.x, batch.y, descend=True),
            self.adversary(self, batch.x, other),
            self.adversary(self, batch.x),
            self.adversary(self, batch.x.clone(), batch.y),
            self.adversary(self.members[0], batch.x, batch.y),
            self.adversary(lambda x: cross_entropy(self.predict(x), other), batch.x),
        ]
        self.surface = self.as_attacked(self.members[0])
        self.copied = copy.deepcopy(self)._adversary is self._adversary
        self.radius = self._lent().threat.eps  # type: ignore[attr-defined]
        return {"ce": torch.zeros(())}


def over_asking() -> tuple[InteractiveGlobalAdversarialTraining, Asking]:
    base = Asking(list(defense_of("nat").members))
    return InteractiveGlobalAdversarialTraining(base, IgatHyper(base="nat")), base


def test_only_the_same_request_is_answered_without_an_attack() -> None:
    defense, base = over_asking()
    stub = Stub()
    stub.threat = type("Radius", (), {"eps": 0.1})  # type: ignore[attr-defined]
    defense.lend(stub)  # type: ignore[arg-type]
    defense.loss(batch(), 0.0)
    assert len(stub.calls) == 1 + len(base.asked)


def test_everything_else_reaches_the_trainer_s_adversary() -> None:
    """Copies for the attack are deep: a lent adversary inside them must not be copied along."""
    defense, base = over_asking()
    defense.eval()
    adversary = lend_adversary(defense, eps=0.1)
    given_batch = batch()
    defense.loss(given_batch, 0.0)
    for x_adv in (base.own, *base.asked):
        assert 0 < float((x_adv - given_batch.x).abs().max()) <= 0.1 + 1e-6
    assert base.surface is not base.members[0], "a folded copy"
    assert base.copied, "a copied defence shares the adversary"
    assert base.radius == pytest.approx(0.1)
    assert base._adversary is adversary, "given back after the loss"


# --- bases of several steps or batches ------------------------------------------------------------


class Steps(TwoSteps):
    """Attacks the average before each of two steps."""

    def loss(self, batch: Batch, progress: float) -> Iterator[Terms]:
        for name in ("first", "second"):
            self.adversary(self, batch.x, batch.y)
            yield {name: self.number * 1.0}


def test_a_base_of_several_steps_is_followed_by_a_step_on_the_added_terms() -> None:
    defense, stub = stubbed("toy_two_steps")
    given_batch = batch(20)
    steps = defense.loss(given_batch, 0.0)
    assert isinstance(steps, Iterator)
    assert [objective for objective, *_ in stub.calls] == [defense], "crafted before the first step"
    assert torch.equal(stub.calls[0][1], given_batch.x[10:]), "from the second half"
    taken = list(steps)
    assert [list(terms) for terms in taken] == [["base_first"], ["base_second"], ["distributed", "penalty"]]
    assert len(stub.calls) == 1


def test_the_added_terms_see_the_weights_that_the_base_s_steps_left() -> None:
    defense, _ = stubbed("toy_two_steps", halves=False)
    given_batch = batch()
    steps = iter(defense.loss(given_batch, 0.0))  # type: ignore[arg-type]
    next(steps), next(steps)
    spread(defense, seed=5)
    added = next(steps)
    with torch.no_grad():
        y = given_batch.y
        penalty = sum(
            misclassification_penalty(logits, y, defense._wrong(logits, y), "sum").mean()
            for logits in (defense.member_logits(x) for x in (given_batch.x, 1 - given_batch.x))
        )
    torch.testing.assert_close(added["penalty"].detach(), 10 * penalty)


def test_a_base_of_several_steps_attacks_the_weights_of_its_own_step() -> None:
    members = list(defense_of("nat").members)
    defense, stub = InteractiveGlobalAdversarialTraining(Steps(members), IgatHyper(base="nat", halves=False)), Stub()
    defense.lend(stub)  # type: ignore[arg-type]
    list(defense.loss(batch(), 0.0))
    assert [objective for objective, *_ in stub.calls] == [defense, defense.base, defense.base]


def test_without_weights_a_base_of_several_steps_takes_its_own_alone() -> None:
    defense, stub = stubbed("toy_two_steps", distribute_weight=0, penalty_weight=0)
    assert [list(terms) for terms in defense.loss(batch(), 0.0)] == [["base_first"], ["base_second"]]
    assert not stub.calls


@pytest.mark.parametrize("halves", [None, True, False])
def test_a_base_of_several_batches_gets_the_first_half_of_each(halves: bool | None) -> None:
    defense, stub = stubbed("toy_two_streams", halves=halves)
    seen: list[Batch] = []
    defense.base.loss = lambda batch, progress: seen.append(batch) or {"ce": torch.zeros(())}  # type: ignore[assignment]
    given_batch = batch(9, streams=2)
    taken = list(defense.loss(given_batch, 0.25))
    assert [list(terms) for terms in taken] == [["base_ce"], ["distributed", "penalty"]], "as the released script"
    own, rest = (slice(0, 9), slice(0, 9)) if halves is False else (slice(0, 4), slice(4, 9))
    (part,) = seen
    assert torch.equal(part.x, given_batch.x[own])
    assert torch.equal(part.y, given_batch.y[own])
    assert torch.equal(part.ids, given_batch.ids[own])
    assert [torch.equal(x, given_batch.streams[0][0][own]) for x, _ in part.streams] == [True]
    assert [torch.equal(y, given_batch.streams[0][1][own]) for _, y in part.streams] == [True]
    assert part.rng is given_batch.rng
    assert torch.equal(stub.calls[0][1], given_batch.x[rest])
    assert stub.calls[0][2] is not None
    assert torch.equal(stub.calls[0][2], given_batch.y[rest])


def test_halves_over_a_base_of_one_step_are_one_step() -> None:
    """The penalty is on the clean images that the base sees and on examples from the others."""
    defense, stub = stubbed("nat", halves=True)
    given_batch = batch(20)
    terms = terms_of(defense, given_batch)
    x, y = given_batch.x, given_batch.y
    with torch.no_grad():
        clean, crafted = defense.member_logits(x[:10]), defense.member_logits(1 - x[10:])
        penalty = sum(
            misclassification_penalty(logits, labels, defense._wrong(logits, labels), "sum").mean()
            for logits, labels in ((clean, y[:10]), (crafted, y[10:]))
        )
        ce = member_cross_entropy(clean, y[:10]).mean(dim=1).sum()
    torch.testing.assert_close(terms["penalty"].detach(), 10 * penalty)
    torch.testing.assert_close(terms["base_ce"].detach(), ce)
    assert len(stub.calls) == 1


def test_a_batch_of_one_image_has_no_halves() -> None:
    defense, _ = stubbed("nat", halves=True)
    with pytest.raises(UsageError, match=r"halves.*batch_size of at least 2"):
        defense.loss(batch(1), 0.0)


# --- what the base decides ------------------------------------------------------------------------


def trained(base: str, **changes: Any) -> EnsembleDefense:
    spec = toy_spec("igat", DATA, {"base": base}, **changes)
    return train(spec, DATA, {"base": build_defense(spec.prerequisites["base"].model)}, device="cpu").defense


def test_the_trainer_draws_as_many_batches_as_the_base_asks_for() -> None:
    defense: Any = trained("toy_two_streams")
    assert defense.streams == 2
    assert [len(seen.streams) for seen, *_ in defense.base.seen] == [1, 1, 1]
    assert [len(seen.x) for seen, *_ in defense.base.seen] == [4, 4, 4]


def test_a_base_of_several_steps_trains() -> None:
    assert float(trained("toy_two_steps").base.number.detach()) < 1  # type: ignore[union-attr, arg-type]


def test_the_base_hears_of_epochs() -> None:
    calls: Any = trained("toy_epochs", epochs=2).base.calls  # type: ignore[union-attr]
    assert [call[0] for call in calls] == ["epoch", "batch", "batch", "batch"] * 2


def test_what_the_base_does_not_train_stays_as_it_was() -> None:
    spec = toy_spec("igat", DATA, {"base": "toy_first_only"})
    start = build_defense(spec.prerequisites["base"].model, seed=3)
    defense = train(spec, DATA, {"base": start}, device="cpu").defense
    assert [same_weights(*pair) for pair in zip(defense.members, start.members, strict=True)] == [False, True]


class Leaky(Plain):
    """Members of its own kind, two of them."""

    batch_coupled = True

    @classmethod
    def member_count(cls, hyper: Any) -> int:
        return 2

    @classmethod
    def network_params(cls, hyper: Any) -> Mapping[str, Any]:
        return {"activation": "leaky_relu"}


def test_number_kind_and_coupling_of_the_members_are_the_base_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOYS, "toy_leaky", Leaky)  # type: ignore[arg-type]
    with registered():
        spec = toy_spec("igat", DATA, {"base": "toy_leaky"}, members=5)
        defense = build_defense(spec.model)
        assert len(defense.members) == spec.model.members == 2
        assert spec.model.architecture_params["activation"] == "leaky_relu"
        assert spec.prerequisites["base"].model.architecture_params == spec.model.architecture_params
        assert any(isinstance(part, nn.LeakyReLU) for part in defense.modules())
        assert defense.batch_coupled
    assert not defense_of("nat").batch_coupled


@pytest.mark.parametrize(
    ("call", "attacks"),
    [
        ({"base": "nat"}, True),
        ({"base": "nat", "penalty_weight": 0}, True),
        ({"base": "nat", "penalty_weight": 0, "distribute_weight": 0}, False),
        ({"base": "adp", "penalty_weight": 0, "distribute_weight": 0}, True),
        ({"base": "adp[adversarial=none]", "penalty_weight": 0, "distribute_weight": 0}, False),
    ],
)
def test_training_attacks_where_the_added_terms_or_the_base_do(call: dict[str, Any], attacks: bool) -> None:
    assert InteractiveGlobalAdversarialTraining.trains_on_attacks(IgatHyper(**call)) is attacks


def test_the_base_s_hyper_parameters_reach_it() -> None:
    defense = defense_of("adp[entropy_weight=1,adversarial=ce]")
    assert isinstance(defense.base, AdaptiveDiversityPromoting)
    assert (defense.base.hyper.entropy_weight, defense.base.hyper.adversarial) == (1.0, "ce")


@pytest.mark.parametrize(
    ("combiner", "rule", "told"),
    [("avg", combine.mean_of_probabilities, "mean"), ("max", combine.max_probability, "max")],
)
@pytest.mark.parametrize("base", ["adp", "soe"])
def test_the_combiner_answers_whatever_the_base_would(base: str, combiner: str, rule: Any, told: str) -> None:
    defense, x = defense_of(base, combiner=combiner), images()
    logits = torch.stack([member(x) for member in defense.base.members])
    torch.testing.assert_close(defense(x), rule(logits))
    assert defense.combiner == told
    assert defense.selection(x) is None
    assert list(defense.views()) == ["predict", "mean_probability", "mean_logit", "member0", "member1", "member2"]


class Tempered(Plain):
    """Reads its members at another temperature."""

    def member_logits(self, x: Tensor) -> Tensor:
        return 0.5 * super().member_logits(x)


def test_members_are_read_as_the_base_reads_them() -> None:
    base = Tempered(list(defense_of("nat").members))
    defense = InteractiveGlobalAdversarialTraining(base, IgatHyper(base="nat"))
    torch.testing.assert_close(defense(images()), base(images()))


def test_the_ensemble_that_is_attacked_is_the_one_that_answers() -> None:
    defense, stub = stubbed("nat", combiner="max")
    defense.loss(batch(), 0.0)
    assert stub.calls[0][0] is defense


# --- the trained base comes first -----------------------------------------------------------------


def test_the_base_s_training_is_the_one_of_its_own_row() -> None:
    spec = toy_spec("igat", DATA, {"base": "adp[entropy_weight=1]"}, seed=4)
    assert {role: needed.key for role, needed in spec.prerequisites.items()} == {
        "base": toy_spec("adp", DATA, {"entropy_weight": 1}, seed=4).key
    }


def test_another_base_makes_another_training() -> None:
    bases = ("adp", "adp[entropy_weight=1]", "nat", "soe")
    assert len({toy_spec("igat", DATA, {"base": base}).key for base in bases}) == len(bases)


@pytest.mark.parametrize("base", ["adp", "soe"])
def test_it_starts_from_the_base_s_weights(base: str) -> None:
    start = defense_of(base).base
    spread(start, seed=8)
    defense = defense_of(base)
    assert not same_weights(defense.base, start)
    defense.warm_start({"base": start})
    assert same_weights(defense.base, start)
    assert not {tensor.data_ptr() for tensor in defense.state_dict().values()} & {
        tensor.data_ptr() for tensor in start.state_dict().values()
    }, "its own copy"


@pytest.mark.parametrize("base", ["adp", "soe"])
def test_every_weight_is_saved_once_and_comes_back(base: str, tmp_path: Path) -> None:
    spec = toy_spec("igat", DATA, {"base": base, "rule": "hard"})
    defense = build_defense(spec.model, seed=3)
    spread(defense)
    save_checkpoint(tmp_path, defense, spec, {})
    weights = read_weights(tmp_path / WEIGHTS)
    alone = build_defense(spec.prerequisites["base"].model)
    assert weights.keys() == {f"base.{name}" for name in alone.state_dict()}
    loaded = load_checkpoint(tmp_path)
    assert same_weights(loaded, defense)
    assert loaded.hyper == defense.hyper
    assert torch.equal(loaded(images()), defense(images()))


def digits_cell(base: str = "adp", **changes: Any) -> Cell:
    data, spec = find_data("digits", limit=120)
    recipe = {"epochs": 1, "batch_size": 60, "lr": 0.01, "schedule": "constant", "attack": {"steps": 1}}
    fields = {"data": spec, "architecture": "small_resnet[width=4]", "members": 2, "norm": "linf", "train_eps": "0.2"}
    setting = Setting(**{**fields, "recipe": recipe, **changes})  # type: ignore[arg-type]
    test, _ = attacked_subset(data, 20)
    attack = AttackSpec.create("pgd", {"steps": 1}, "linf", "0.2")
    return Cell(TrainSpec.create("igat", {"base": base}, setting), attack, len(test), test.checksum())


def test_one_command_trains_the_base_once_and_then_wraps_it(tmp_path: Path) -> None:
    cell = digits_cell()
    (record,) = run_cells([cell], Run(tmp_path))
    assert record.error is None
    folders = [checkpoint_folder(tmp_path, spec) for spec in (cell.training.prerequisites["base"], cell.training)]
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted(folders)
    stamps = [(folder / WEIGHTS).stat().st_mtime_ns for folder in folders]
    shutil.rmtree(tmp_path / "records")
    run_cells([cell], Run(tmp_path))
    assert [(folder / WEIGHTS).stat().st_mtime_ns for folder in folders] == stamps


def test_a_checkpoint_of_another_architecture_is_refused_before_training(tmp_path: Path) -> None:
    """Weights that do not fit, in the folder where the base's training is expected."""
    cell = digits_cell()
    needed = cell.training.prerequisites["base"]
    other = digits_cell(architecture="small_resnet[width=6]").training.prerequisites["base"]
    folder = checkpoint_folder(tmp_path, needed)
    save_checkpoint(folder, build_defense(needed.model), needed, {})
    save_checkpoint(tmp_path / "other", build_defense(other.model), other, {})
    preflight([cell], tmp_path)
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="another architecture"):
        preflight([cell], tmp_path)
    with pytest.raises(CheckpointError, match="another architecture"):
        run_cells([cell], Run(tmp_path))
    assert not checkpoint_folder(tmp_path, cell.training).exists()


# --- asking for it --------------------------------------------------------------------------------


def model_of(**hyper: Any) -> ModelSpec:
    return ModelSpec.create("igat", hyper, "small_resnet[width=4]", 3, CLASSES, SHAPE, (0.5,), (0.25,))


@pytest.mark.parametrize(
    "call",
    [
        "igat",
        "igat[base=soe]",
        "igat[base=adp[entropy_weight=1]]",
        "igat[base=adp[entropy_weight=1,adversarial=ce],rule=hard,halves=true]",
        "igat[distribute_weight=1.5,penalty_weight=0.0]",
    ],
)
def test_a_call_prints_as_it_is_written(call: str) -> None:
    assert split_list(f"{call},nat") == [call, "nat"]
    name, params = parse_call(call)
    model = model_of(**params)
    assert name == "igat"
    assert model.method_call == call
    assert model_of(**parse_call(model.method_call)[1]) == model


@pytest.mark.parametrize(
    ("hyper", "match"),
    [
        ({"base": "igat"}, r"igat: base is igat; igat does not wrap itself"),
        ({"base": "igat[base=adp]"}, r"igat does not wrap itself"),
        ({"base": "adpp"}, r"unknown method 'adpp'; did you mean 'adp'"),
        ({"base": "adp[entropy=1]"}, r"adp has no parameter 'entropy'"),
        ({"base": "soe[sigma=0]"}, r"soe: sigma is 0"),
        ({"base": "adp["}, r"bracket that is never closed"),
        ({"base": "adv"}, r"base is adv, a single network"),
        ({"distribute_weight": -1}, r"distribute_weight is -1.0; expected at least 0"),
        ({"penalty_weight": "-0.5"}, r"penalty_weight is -0.5; expected at least 0"),
        ({"rule": "best"}, r"rule.*expected one of soft, hard, opposite, random"),
        ({"penalty": "type0"}, r"penalty.*expected one of sum, worst, literal"),
        ({"combiner": "vote"}, r"combiner.*expected one of avg, max"),
        ({"mask": "none"}, r"mask.*expected one of all, misclassified"),
    ],
)
def test_what_cannot_be_is_refused_before_training(hyper: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        model_of(**hyper)


def test_one_member_is_refused() -> None:
    with pytest.raises(UsageError, match=r"igat with 1 member.*at least 2"):
        defense_of("nat", members=1)


def test_what_the_base_refuses_is_refused() -> None:
    with pytest.raises(UsageError, match=r"adp with 5 members on 5 classes"):
        defense_of("adp", members=5)


def test_the_cap_is_that_of_the_released_code() -> None:
    assert pytest.approx(4.605170, abs=1e-6) == LARGEST_PENALTY

"""Attacks made for ensembles: what they find where the decision hides its members, and that they find no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensdef import combine
from ensdef.attack_spec import AttackSpec
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.harness import Outcome, attack_model
from ensdef.registry import ATTACKS
from ensdef.target import Target
from ensdef.testing import LinearClassifier

SHAPE, PIXELS, CLASSES = (1, 8, 8), 64, 4


class Ensemble(EnsembleDefense):
    """Members of which a test decides how they answer together."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError


class HardVote(Ensemble):
    """Votes alone, with a gradient of exactly zero."""

    combiner = "vote"

    def predict(self, x: Tensor) -> Tensor:
        logits = self.member_logits(x)
        return combine.vote(logits).detach() + 0 * logits.sum(dim=0)


class Selecting(Ensemble):
    """The member that a linear gate scores highest answers; the choice has no gradient."""

    combiner = "select"

    def __init__(self, members: list[nn.Module], gate: LinearClassifier) -> None:
        super().__init__(members)
        self.gate = gate

    def selection(self, x: Tensor) -> Tensor:
        scores: Tensor = self.gate(x)
        return scores

    def predict(self, x: Tensor) -> Tensor:
        return combine.select(self.member_logits(x), self.selection(x))


class Saturated(Selecting):
    """A mixture whose gate is so sure that float32 leaves it no gradient."""

    combiner = "gate"

    def predict(self, x: Tensor) -> Tensor:
        return combine.mixture(self.member_logits(x), 1e4 * self.selection(x))


def linear(classes: int = CLASSES, seed: int = 0, scale: float = 0.5) -> LinearClassifier:
    generator = torch.Generator().manual_seed(seed)
    return LinearClassifier(scale * torch.randn(classes, PIXELS, generator=generator))


def images(count: int = 100, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def decisions(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def attacked(model: nn.Module, x: Tensor, y: Tensor, call: str, eps: float, **params: Any) -> Outcome:
    combiner = params.pop("combiner", "native")
    return attack_model(model, x, y, AttackSpec.create(call, params, "linf", eps, combiner=combiner), batch_size=64)


def share(outcome: Outcome) -> float:
    return float(outcome.robust.double().mean())


def prototypes() -> Tensor:
    coarse = torch.rand(CLASSES, 1, 3, 3, generator=torch.Generator().manual_seed(4))
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy smooth pictures, one prototype a class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return (prototypes()[y] + 0.2 * torch.randn(count, *SHAPE, generator=generator)).clamp(0, 1), y


@cache
def trained(seed: int, eps: float = 0.0) -> nn.Module:
    """A small network, trained on single-step adversarial examples where ``eps`` is not 0."""
    x, y = pictures(512, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.LazyLinear(4)),
        )
        network(x[:1])
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        for step in range(120):
            rows = torch.arange(64) + 64 * (step % 8)
            point = (x[rows] + eps * (2 * torch.rand_like(x[rows]) - 1)).clamp(0, 1).requires_grad_()
            gradient = torch.autograd.grad(nn.functional.cross_entropy(network(point), y[rows]), point)[0]
            moved = x[rows] + (point.detach() + eps * gradient.sign() - x[rows]).clamp(-eps, eps)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(moved.clamp(0, 1)), y[rows]).backward()
            optimizer.step()
    return network.eval()


def sign_test(found: Tensor, missed: Tensor) -> float:
    """One-sided probability of that many images broken by one attack alone, were both equally strong."""
    wins, losses = int((found & ~missed).sum()), int((missed & ~found).sum())
    return sum(comb(wins + losses, k) for k in range(wins, wins + losses + 1)) / 2 ** (wins + losses)


# --- against the exact answer ---------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.01, 0.02, 0.04])
@pytest.mark.parametrize("kind", ["single", "ensemble"])
def test_on_a_linear_model_the_robust_set_is_the_exact_one(kind: str, eps: float) -> None:
    classes = 10
    oracle = linear(classes)
    model: nn.Module = oracle
    if kind == "ensemble":  # the mean of logits is linear; of copies of one member it is that member
        model = Ensemble([linear(classes) for _ in range(3)])
    x = images(80, low=-0.2, high=1.2).clamp(0, 1)
    y = decisions(oracle, x)
    exact = oracle.exactly_robust(x, y, eps)
    assert 0 < int(exact.sum()) < len(x)
    assert torch.equal(attacked(model, x, y, "adaptive", eps).robust, exact)


@pytest.mark.parametrize("combiner", ["avg", "max", "vote"])
def test_an_ensemble_of_copies_is_as_robust_as_the_one_model_under_every_combiner(combiner: str) -> None:
    oracle = linear(10)
    x = images(80)
    y = decisions(oracle, x)
    exact = oracle.exactly_robust(x, y, 0.02)
    outcome = attacked(Ensemble([linear(10) for _ in range(3)]), x, y, "adaptive", 0.02, combiner=combiner)
    assert torch.equal(outcome.robust, exact)


# --- where the decision hides its members ---------------------------------------------------------


def test_a_hard_vote_of_undefended_members_falls_to_its_members() -> None:
    model = HardVote([trained(seed) for seed in range(3)])
    x, y = pictures(200, seed=7)
    native, adaptive = attacked(model, x, y, "pgd", 0.15), attacked(model, x, y, "adaptive", 0.15)
    assert share(native) - share(adaptive) >= 0.2
    assert bool((adaptive.robust <= native.clean).all())


def hidden_member(kind: type[Selecting]) -> tuple[Selecting, Tensor, Tensor]:
    """One member right everywhere in reach, another wrong everywhere, and a gate that a few pixels decide.

    The first member does not look at those pixels: its gradient never moves them.
    """
    brightness, steering = torch.zeros(2, PIXELS), torch.zeros(2, PIXELS)
    brightness[1, 16:], brightness[0, 16:] = 1.0, -1.0
    steering[1, :16] = 1.0
    right = LinearClassifier(brightness, torch.tensor([24.0, -24.0]))
    wrong = LinearClassifier(-brightness, torch.tensor([-24.0, 24.0]))
    y = torch.arange(40) % 2
    x = (0.25 + 0.5 * y.view(-1, 1, 1, 1)).expand(-1, *SHAPE) + images(40, low=-0.05, high=0.05)
    x[:, 0, :2] = 0.5  # the gate's pixels: 0.06 each short of the switch
    return kind([right, wrong], LinearClassifier(steering, torch.tensor([0.0, -16 * (0.5 + 0.06)]))), x, y


@pytest.mark.parametrize("kind", [Selecting, Saturated])
def test_a_selector_without_gradient_is_steered_to_the_member_that_is_wrong(kind: type[Selecting]) -> None:
    model, x, y = hidden_member(kind)
    native, adaptive = attacked(model, x, y, "pgd", 0.1), attacked(model, x, y, "adaptive", 0.1)
    assert share(native) == 1.0, "the planted gate must hide the wrong member from gradients of the decision"
    assert share(adaptive) == 0.0


def test_a_gate_out_of_reach_cannot_be_steered() -> None:
    model, x, y = hidden_member(Selecting)
    assert share(attacked(model, x, y, "adaptive", 0.05)) == 1.0


def test_an_argmax_gated_ensemble_loses_more_than_its_decision_shows() -> None:
    experts = [linear(CLASSES, seed, scale=0.4) for seed in range(4)]
    model = Selecting(list(experts), linear(4, seed=9, scale=1.0))
    x = images(300)
    y = decisions(model, x)
    native = attacked(model, x, y, "pgd", 0.035)
    adaptive = attacked(model, x, y, "adaptive", 0.035)
    assert 0.3 <= share(native) <= 0.6
    assert share(native) - share(adaptive) >= 0.05
    assert sign_test(~adaptive.robust, ~native.robust) < 0.01


# --- where there is nothing to hide ---------------------------------------------------------------


@pytest.mark.slow
def test_on_an_honest_average_the_full_budget_ends_at_most_two_points_below_autoattack() -> None:
    model = Ensemble([trained(seed, eps=0.08) for seed in range(3)])
    x, y = pictures(32, seed=7)
    reference = attacked(model, x, y, "autoattack", 0.08)
    full = attacked(model, x, y, "adaptive", 0.08, budget="full")
    assert 0.2 < share(reference) < 0.95
    assert share(reference) - 0.02 <= share(full) <= share(reference)


def test_the_quick_budget_makes_fewer_passes_than_autoattack() -> None:
    """Attacks reference: 7,864 forward and 1,910 backward passes an image that is never fooled, ten classes."""
    model = Ensemble([linear(10, seed, scale=0.05) for seed in range(3)])
    x = images(16)
    for combiner in ("native", "max", "vote"):
        y = decisions(Target(model, combiner=combiner), x)
        outcome = attacked(model, x, y, "adaptive", 1e-6, combiner=combiner)
        assert bool(outcome.robust.all())
        per_image = len(x) * 3
        assert outcome.forwards / per_image <= 7864
        assert outcome.forwards / per_image + outcome.backwards / per_image <= 7864 + 1910


# --- what a plug-in author gets -------------------------------------------------------------------


def names(model: EnsembleDefense, **params: Any) -> list[str]:
    attack = ATTACKS.get("adaptive")(ATTACKS.get("adaptive").Params(**params))
    return [name for name, _ in attack.parts(Target(model).traits(images(2)))]


def test_every_declared_view_is_attacked_and_the_decision_first() -> None:
    class WithView(Ensemble):
        def views(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
            return {**super().views(), "mine": lambda x: self.members[0](x) * 2}

    found = names(WithView([linear(), linear()]))
    assert found[0] == "predict, cross-entropy"
    assert "mine, margin" in found
    assert {"member0, margin", "member1, margin", "mean_logit, margin"} <= set(found)


@pytest.mark.parametrize(
    ("model", "expected", "absent"),
    [
        (Ensemble([linear(), linear()]), "members, one class", "cheapest majority"),
        (HardVote([linear(), linear()]), "cheapest majority", "member0 the loudest"),
        (Selecting([linear(), linear()], linear(2)), "have member1 chosen, then fool it", "cheapest majority"),
    ],
    ids=["mean", "vote", "select"],
)
def test_the_combiner_decides_the_suite(model: EnsembleDefense, expected: str, absent: str) -> None:
    assert expected in names(model)
    assert absent not in names(model)


def test_a_view_without_gradient_is_left_out() -> None:
    class Blind(Ensemble):
        def predict(self, x: Tensor) -> Tensor:
            return super().predict(x).detach()

    found = names(Blind([linear(), linear()]))
    assert not [name for name in found if name.startswith("predict")]
    assert "mean_probability, margin" in found


def test_a_random_defence_is_attacked_in_expectation() -> None:
    class Noisy(Ensemble):
        def predict(self, x: Tensor) -> Tensor:
            return super().predict(x + 0.1 * torch.randn_like(x))

    assert "predict, mean of draws" in names(Noisy([linear(), linear()]))
    assert "predict, mean of draws" not in names(Ensemble([linear(), linear()]))


def test_the_full_budget_has_the_parts_of_the_quick_one_and_autoattack_last() -> None:
    model = Selecting([linear(), linear()], linear(2))
    quick, full = names(model), names(model, budget="full")
    assert set(quick) <= set(full)
    assert full[-1] == "autoattack"


def test_the_record_tells_which_part_broke_how_many() -> None:
    model, x, y = hidden_member(Selecting)
    outcome = attacked(model, x, y, "adaptive", 0.1)
    assert sum(outcome.broken_by.values()) == len(x)
    assert outcome.broken_by["predict, cross-entropy"] == 0
    assert list(outcome.broken_by) == names(model)


def test_members_without_gradient_behind_a_view_that_has_one_stop_nothing() -> None:
    class Quantised(Ensemble):
        def member_logits(self, x: Tensor) -> Tensor:
            return super().member_logits(x.mul(4).round().div(4)).detach()

        def views(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
            straight = super().member_logits
            return {"predict": self.predict, "straight_through": lambda x: combine.mean_of_logits(straight(x))}

    model = Quantised([linear(), linear(seed=1)])
    x = images(40)
    y = decisions(model, x)
    outcome = attacked(model, x, y, "adaptive", 0.2, steps=5)
    assert outcome.broken_by["straight_through, margin"] > 0
    assert sum(outcome.broken_by.values()) == outcome.broken_by["straight_through, margin"]


@pytest.mark.parametrize("aimed", [False, True])
def test_a_majority_that_is_split_still_has_a_gradient(aimed: bool) -> None:
    from ensdef.attacks import _objectives as objectives

    logits = torch.tensor([[0.0, 2, 0], [0, 0, 2], [9, 0, 0]])[:, None].requires_grad_()
    label = torch.zeros(1, dtype=torch.int64)
    at = objectives.Reading(logits, None, label, label + 1, torch.zeros(1))
    objective = objectives.cheapest_majority_for_a_class if aimed else objectives.cheapest_majority
    gradient = torch.autograd.grad(objective(at).sum(), logits)[0]
    assert bool((gradient[2, 0] != 0).any()), "the member that still says the truth"


def test_a_gate_wants_all_the_weight_and_a_selector_only_the_most() -> None:
    from ensdef.attacks import _objectives as objectives

    logits = torch.tensor([[0.0, 5], [5, 0]])[:, None]
    weights = torch.tensor([[0.3, 0.1]]).requires_grad_()
    label = torch.zeros(1, dtype=torch.int64)
    at = objectives.Reading(logits, weights, label, label + 1, torch.zeros(1))
    slopes = [
        torch.autograd.grad(objectives.fool_and_select(0, 1.0, gate=gate)(at).sum(), weights)[0]
        for gate in (False, True)
    ]
    assert not bool(slopes[0].any()), "already chosen"
    assert float(slopes[1][0, 0]) > 0 > float(slopes[1][0, 1])
